"""Which program of attention_triton.py's kernels computes which tile, and how large tiles are.

T tokens of a packed row, H query heads, K key/value heads, G = H/K, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Queries and keys of a tile of scores, warps of its program, tiles in flight (num_stages); for the
# forward, dQ and dK/dV kernels. The tile that a program keeps must be a whole number of the tiles
# it walks over. Hopper's at 128 are the fastest of about ten each that were timed on an H200, on a
# document of 4,096 tokens and on rows of chats; the others were chosen by the compiler's reports
# (registers, spills, shared memory).
BLOCKS = {
    ("hopper", 128): ((64, 64, 4, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
    ("hopper", 64): ((128, 128, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2)),
    ("ampere", 128): ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
    ("ampere", 64): ((128, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3)),
}
# Other head sizes, GPUs with less shared memory, and the interpreter.
SMALL = ((64, 32, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2))
FLOAT32 = ((16, 16, 4, 1),) * 3  # "ieee" matmuls, unrolled into FMAs: larger tiles only spill
HEAD_SIZES = (16, 32, 64, 128)


def choose_blocks(q: Tensor) -> tuple[tuple[int, int, int, int], ...]:
    """Lengths have no say: nothing compiles again for them."""
    if not q.is_cuda or q.dtype == torch.float32:
        return FLOAT32 if q.is_cuda else SMALL
    chip = {(9, 0): "hopper", (8, 0): "ampere"}.get(torch.cuda.get_device_capability(q.device))
    return BLOCKS.get((chip, q.shape[2]), SMALL)


# The schedule. Tiles of B tokens never cross a segment's border, so segment i of length n has
# ceil(n / B) tiles. The host knows T and the number of segments but not their lengths, and asking
# the GPU for them would stall every step. So the grid is an upper bound, T // B + n_segments slots,
# and segment i owns the slots from cu_seqlens[i] // B + i to the next segment's first: never fewer
# than its tiles, at most one more. A program finds its segment by bisection; a spare slot ends.
# Programs start in the grid's order: slots (each times the G query heads that share keys), then
# key heads, whose k and v so stay in the L2 cache. The longest work starts first: most queries see
# a segment's first keys; its last queries see most keys, so forward and dQ count slots backwards.


@triton.jit
def find_tile(cu_seqlens, n_segments, slot, B: tl.constexpr):
    """-> (first token of the segment in the row, its length, the tile's first token within it)."""
    low, high = n_segments * 0, n_segments
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) // B + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    return start, length, (slot - start // B - low) * B


@triton.jit
def find_queries(cu_seqlens, n_segments, G: tl.constexpr, QUERIES: tl.constexpr):
    """-> (find_tile's three, the query head and the key/value head of this program)."""
    slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // G
    start, length, first = find_tile(cu_seqlens, n_segments, slot, QUERIES)
    kv_head = tl.program_id(1)
    return start, length, first, kv_head * G + tl.program_id(0) % G, kv_head
