"""Which program of attention_triton.py's kernels computes which tile, how large tiles are, and how
they are read.

T tokens of a packed row, H query heads, K key/value heads, G = H/K, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Queries and keys of a tile of scores, warps of its program, tiles in flight (num_stages); for the
# forward, dQ and dK/dV kernels. The tile that a program keeps must be a whole number of the tiles
# it walks over. Hopper's at 128 are the fastest of about ten each that were timed on an H200, on
# documents of 4,096 or 8,192 tokens and on rows of chats; the others were chosen by the compiler's
# reports (registers, spills, shared memory).
BLOCKS = {
    ("hopper", 128): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
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


def readable(x: Tensor) -> Tensor:
    """Views of a projection are read where they lie, if a token's heads are adjacent, tokens begin
    at multiples of 16 bytes and offsets within a tile of up to 128 rows fit int32."""
    _, H, E = x.shape
    adjacent = x.stride(2) == 1 and (H == 1 or x.stride(1) == E)
    aligned = (x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0
    if adjacent and aligned and H * E <= x.stride(0) < 2**24:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def has_copy_engine(q: Tensor) -> bool:
    """Whether descriptors are of use: by Hopper's TMA, in the interpreter. On GPUs before Hopper
    Triton would fetch their tiles 2 bytes at a time."""
    return not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0)


def descriptors(
    q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, queries: int
) -> tuple[TensorDescriptor | None, ...]:
    """How the copy engine, if there is one, fetches `queries` rows of a head, and their numbers."""
    if not has_copy_engine(q):
        return (None,) * 4
    rows = [TensorDescriptor.from_tensor(x.flatten(1), [queries, x.shape[2]]) for x in (q, dout)]
    return *rows, *(TensorDescriptor.from_tensor(x, [1, queries]) for x in (lse, delta))


# The schedule. Tiles of B tokens never cross a segment's border, so segment i of length n has
# ceil(n / B) tiles. The host knows T and the number of segments but not their lengths, and asking
# the GPU for them would stall every step. So the grid is an upper bound, T // B + n_segments slots,
# and segment i owns the slots from cu_seqlens[i] // B + i to the next segment's first: never fewer
# than its tiles, at most one more. A program finds its segment by bisection; a spare slot ends.
# Programs start in the grid's order: slots (each times the G query heads that share keys), then
# key heads, whose k and v so stay in the L2 cache. The longest work starts first: most queries see
# a segment's first keys; its last queries see most keys, so forward and dQ count slots backwards.
#
# A token's numbers in lse and delta (one for each head) lie in slots of 4, by the same rule: those
# of every segment begin at a multiple of 16 bytes, as the copy engine wants it.


@triton.jit
def find_tile(cu_seqlens, n_segments, slot, B: tl.constexpr):
    """-> (first token of the segment in the row, its length, the tile's first token within it,
    the place of the segment's numbers in lse[head] and delta[head])."""
    low, high = n_segments * 0, n_segments
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_seqlens + middle) // B + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(cu_seqlens + low)
    length = tl.load(cu_seqlens + low + 1) - start
    return start, length, (slot - start // B - low) * B, (start // 4 + low) * 4


@triton.jit
def find_queries(cu_seqlens, n_segments, G: tl.constexpr, QUERIES: tl.constexpr):
    """-> (find_tile's four, the query head and the key/value head of this program)."""
    slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // G
    start, length, first, numbers = find_tile(cu_seqlens, n_segments, slot, QUERIES)
    kv_head = tl.program_id(1)
    return start, length, first, numbers, kv_head * G + tl.program_id(0) % G, kv_head


def n_numbers(T: int, n_segments: int) -> int:
    """How long lse[head] and delta[head] are, in slots of 4."""
    return (T // 4 + n_segments) * 4
