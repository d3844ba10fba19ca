"""Causal attention within packed segments, as `kernels/reference.py` defines it, in Triton.

Shapes: T tokens of a packed row, H query heads, K key/value heads, G = H/K query heads that share
one key/value head, E head size.

One query row with scores s_j gives o = sum_j p_j v_j, p_j = exp(s_j - L), L = log sum_j exp(s_j).
No row of scores is ever stored: they are visited a block at a time (Milakov and Gimelshein 2018;
Dao et al. 2022, FlashAttention), keeping the largest score so far `top`, `total` = sum exp(s - top)
and `acc` = sum exp(s - top) v. A block with a larger maximum first multiplies both sums by
exp(top - new_top). At the end o = acc / total and L = top + log total; L is all that the backward
pass needs to rebuild any p_j.

Scores are kept in units of log 2 (multiplied by log2(e) together with 1/sqrt(E)), because exp2 is
the GPU's own instruction; so is L. Scores, sums and accumulators are float32.

Every sum is taken by one program in a fixed order, without atomics: same inputs, same bits.
Only dK/dV reads through tensor descriptors, and there is no warp specialisation. cuDNN uses both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention_tiles import (
    HEAD_SIZES,
    choose_blocks,
    descriptors,
    find_queries,
    find_tile,
    n_numbers,
    readable,
)

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)  # the kernels' scale is log2(e) / sqrt(E)
# What differs between packed rows compiles nothing again.
FOR_ANY_ROW = {
    "do_not_specialize": ["n_numbers", "n_segments"],
    "do_not_specialize_on_alignment": ["cu_seqlens"],
}


@triton.jit
def _at(x, row, row_stride, head, head_stride):
    """Pointer to x[row, head]. In int64: T*H*E passes 2**31."""
    return x + tl.cast(row, tl.int64) * row_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def _load(x, row, length, stride, ROWS: tl.constexpr, E: tl.constexpr, BOUNDED: tl.constexpr):
    """x[row : row + ROWS], zeros from row `length` on: that is another segment, which may hold
    anything, and 0 * NaN is NaN. Not BOUNDED: the caller knows that all rows are inside."""
    rows = tl.arange(0, ROWS)[:, None]
    pointers = _at(x, row, stride, 0, 0) + (rows * stride + tl.arange(0, E)[None, :])
    if BOUNDED:
        return tl.load(pointers, mask=row + rows < length, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(x, tile, row, length, stride, ROWS: tl.constexpr, E: tl.constexpr):
    """x[row : row + ROWS] = tile, except rows from `length` on: they are the neighbour's."""
    rows = tl.arange(0, ROWS)[:, None]
    pointers = _at(x, row, stride, 0, 0) + (rows * stride + tl.arange(0, E)[None, :])
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=row + rows < length)


@triton.jit
def _visit_keys(
    acc, total, top, q, k, v, k_stride, v_stride, scale, first, length, low, high,
    E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """The softmax of one tile of queries, carried on over keys low .. high."""
    rows = first + tl.arange(0, QUERIES)[:, None]
    for key in range(low, high, KEYS):
        k_tile = _load(k, key, length, k_stride, KEYS, E, DIAGONAL)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if DIAGONAL:
            s = tl.where(rows >= key + tl.arange(0, KEYS)[None, :], s, float("-inf"))
        # Finite even if this whole row of the tile is masked: earlier keys have been seen.
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _load(v, key, length, v_stride, KEYS, E, DIAGONAL)
        acc *= shrink[:, None]
        acc = tl.dot(p.to(v.dtype.element_ty), v_tile, acc, input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(**FOR_ANY_ROW)
def _forward_kernel(
    q, k, v, out, lse, cu_seqlens, n_segments, n_numbers, scale, q_stride, k_stride, v_stride,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """out[T,H,E] and lse[H,n_numbers] for one tile of queries and one head."""
    start, length, first, numbers, head, kv_head = find_queries(
        cu_seqlens, n_segments, H // K, QUERIES
    )
    if first >= length:
        return
    q = _at(q, start, q_stride, head, E)
    k = _at(k, start, k_stride, kv_head, E)
    v = _at(v, start, v_stride, kv_head, E)

    q_tile = _load(q, first, length, q_stride, QUERIES, E, True)
    acc = tl.zeros([QUERIES, E], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    # Keys before the tile are seen by all its queries: no mask. Those on the diagonal by some.
    acc, total, top = _visit_keys(
        acc, total, top, q_tile, k, v, k_stride, v_stride, scale, first, length,
        0, first, E, QUERIES, KEYS, False,
    )  # fmt: skip
    acc, total, top = _visit_keys(
        acc, total, top, q_tile, k, v, k_stride, v_stride, scale, first, length,
        first, tl.minimum(first + QUERIES, length), E, QUERIES, KEYS, True,
    )  # fmt: skip
    _store(_at(out, start, H * E, head, E), acc / total[:, None], first, length, H * E, QUERIES, E)
    rows = first + tl.arange(0, QUERIES)
    tl.store(_at(lse, numbers, 1, head, n_numbers) + rows, top + tl.log2(total), mask=rows < length)


# Backward. With S = q k^T / sqrt(E), P = softmax(S), o = P v and the incoming gradient do:
#
#   dv = P^T do
#   dP = do v^T
#   dS_ij = P_ij (dP_ij - delta_i),  delta_i = sum_j P_ij dP_ij = do_i . o_i
#   dq = dS k / sqrt(E)
#   dk = dS^T q / sqrt(E)
#
# The third line is the softmax's Jacobian, dP_ij/dS_ik = P_ij (1[j=k] - P_ik); delta is a sum over
# all keys, but equals a dot product of two rows at hand. P is rebuilt: P_ij = exp(S_ij - L_i).
# dq sums over keys and dk, dv over queries: each has its own kernel, which owns the rows it writes.


@triton.jit
def _gather_dq(
    dq, q, dout, lse, delta, k, v, k_stride, v_stride, scale, first, length, low, high,
    E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries (times sqrt(E)), carried on over keys low .. high."""
    rows = first + tl.arange(0, QUERIES)[:, None]
    for key in range(low, high, KEYS):
        k_tile = _load(k, key, length, k_stride, KEYS, E, DIAGONAL)
        v_tile = _load(v, key, length, v_stride, KEYS, E, DIAGONAL)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        if DIAGONAL:
            p = tl.where(rows >= key + tl.arange(0, KEYS)[None, :], p, 0.0)
        dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype.element_ty), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(**FOR_ANY_ROW)
def _dq_kernel(
    q, k, v, out, dout, lse, delta, dq, cu_seqlens, n_segments, n_numbers, scale,
    q_stride, k_stride, v_stride, dout_stride,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq[T,H,E] for one tile of queries and one head; and delta[H,n_numbers], which the next kernel
    reads."""
    start, length, first, numbers, head, kv_head = find_queries(
        cu_seqlens, n_segments, H // K, QUERIES
    )
    if first >= length:
        return
    q = _at(q, start, q_stride, head, E)
    k = _at(k, start, k_stride, kv_head, E)
    v = _at(v, start, v_stride, kv_head, E)
    out = _at(out, start, H * E, head, E)
    dout = _at(dout, start, dout_stride, head, E)

    q_tile = _load(q, first, length, q_stride, QUERIES, E, True)
    dout_tile = _load(dout, first, length, dout_stride, QUERIES, E, True)
    out_tile = _load(out, first, length, H * E, QUERIES, E, True)
    delta_rows = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    rows = first + tl.arange(0, QUERIES)
    tl.store(_at(delta, numbers, 1, head, n_numbers) + rows, delta_rows, mask=rows < length)
    lse = _at(lse, numbers, 1, head, n_numbers)
    lse_rows = tl.load(lse + rows, mask=rows < length, other=0.0)

    total = tl.zeros([QUERIES, E], tl.float32)
    total = _gather_dq(
        total, q_tile, dout_tile, lse_rows, delta_rows, k, v, k_stride, v_stride, scale,
        first, length, 0, first, E, QUERIES, KEYS, False,
    )  # fmt: skip
    total = _gather_dq(
        total, q_tile, dout_tile, lse_rows, delta_rows, k, v, k_stride, v_stride, scale,
        first, length, first, tl.minimum(first + QUERIES, length), E, QUERIES, KEYS, True,
    )  # fmt: skip
    total *= scale * LN_2
    _store(_at(dq, start, H * E, head, E), total, first, length, H * E, QUERIES, E)


@triton.jit
def _add_dk_dv(
    dk, dv, k, v, q, dout, lse, delta, scale, query, first,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """dk (times sqrt(E)) and dv of one tile of keys, with one tile of queries added. Tiles are
    transposed, P^T [KEYS, QUERIES]: it enters both sums from registers."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    p = tl.exp2(s * scale - lse[None, :])
    if DIAGONAL:
        keys = first + tl.arange(0, KEYS)[:, None]
        p = tl.where(query + tl.arange(0, QUERIES)[None, :] >= keys, p, 0.0)
    # Before dp: as float32, p and dp need not both be kept beside the two sums.
    dv = tl.dot(p.to(q.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _load_queries(
    q, dout, lse, delta, n_numbers, q_stride, dout_stride, start, numbers, head, query, length,
    E: tl.constexpr, QUERIES: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """What _add_dk_dv takes of one tile of queries."""
    q = _at(q, start, q_stride, head, E)
    dout = _at(dout, start, dout_stride, head, E)
    rows = query + tl.arange(0, QUERIES)
    lse = _at(lse, numbers, 1, head, n_numbers) + rows
    delta = _at(delta, numbers, 1, head, n_numbers) + rows
    return (
        _load(q, query, length, q_stride, QUERIES, E, BOUNDED),
        _load(dout, query, length, dout_stride, QUERIES, E, BOUNDED),
        tl.load(lse, mask=rows < length, other=0.0),
        tl.load(delta, mask=rows < length, other=0.0),
    )


@triton.jit(**FOR_ANY_ROW)
def _dk_dv_kernel(
    q_tiles, dout_tiles, lse_tiles, delta_tiles,
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens, n_segments, n_numbers, scale,
    q_stride, k_stride, v_stride, dout_stride,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk[T,K,E] and dv[T,K,E] for one tile of keys and one key/value head, summed over the query
    heads that read it. *_tiles are descriptors, or None. (Not a tuple: Triton 3.6 launches no
    kernel with one.)"""
    start, length, first, numbers = find_tile(cu_seqlens, n_segments, tl.program_id(0), KEYS)
    if first >= length:
        return
    kv_head = tl.program_id(1)
    k = _at(k, start, k_stride, kv_head, E)
    v = _at(v, start, v_stride, kv_head, E)
    k_tile = _load(k, first, length, k_stride, KEYS, E, True)
    v_tile = _load(v, first, length, v_stride, KEYS, E, True)
    dk_sum = tl.zeros([KEYS, E], tl.float32)
    dv_sum = tl.zeros([KEYS, E], tl.float32)
    # Queries behind this tile's keys see all of them. Their whole tiles are most of the work. The
    # copy engine fetches them by coordinates: so no thread keeps addresses in the registers that
    # four accumulators need.
    rest = tl.maximum(first + KEYS, length // QUERIES * QUERIES)
    for head in range(kv_head * (H // K), (kv_head + 1) * (H // K)):
        for query in range(first + KEYS, rest, QUERIES):
            if q_tiles is None:
                q_tile, dout_tile, lse_rows, delta_rows = _load_queries(
                    q, dout, lse, delta, n_numbers, q_stride, dout_stride, start, numbers, head,
                    query, length, E, QUERIES, False,
                )  # fmt: skip
            else:
                q_tile = q_tiles.load([start + query, head * E])
                dout_tile = dout_tiles.load([start + query, head * E])
                lse_rows = tl.reshape(lse_tiles.load([head, numbers + query]), [QUERIES])
                delta_rows = tl.reshape(delta_tiles.load([head, numbers + query]), [QUERIES])
            dk_sum, dv_sum = _add_dk_dv(
                dk_sum, dv_sum, k_tile, v_tile, q_tile, dout_tile, lse_rows, delta_rows, scale,
                query, first, QUERIES, KEYS, False,
            )  # fmt: skip
    # The tiles on the diagonal, and the segment's last one if it is not whole: queries past the
    # segment's end are zeros here, and add zero to both sums.
    for head in range(kv_head * (H // K), (kv_head + 1) * (H // K)):
        for i in tl.range(0, KEYS // QUERIES + 1, num_stages=1):
            query = tl.where(i < KEYS // QUERIES, first + i * QUERIES, rest)
            if query < length:
                q_tile, dout_tile, lse_rows, delta_rows = _load_queries(
                    q, dout, lse, delta, n_numbers, q_stride, dout_stride, start, numbers, head,
                    query, length, E, QUERIES, True,
                )  # fmt: skip
                dk_sum, dv_sum = _add_dk_dv(
                    dk_sum, dv_sum, k_tile, v_tile, q_tile, dout_tile, lse_rows, delta_rows, scale,
                    query, first, QUERIES, KEYS, True,
                )  # fmt: skip
    dk_sum *= scale * LN_2
    _store(_at(dk, start, K * E, kv_head, E), dk_sum, first, length, K * E, KEYS, E)
    _store(_at(dv, start, K * E, kv_head, E), dv_sum, first, length, K * E, KEYS, E)


def _launch(kernel, blocks: tuple[int, ...], tile: int, heads: int, rows: tuple, *strided: Tensor):
    """One program for each of `heads` query heads of a key head, key head and tile."""
    (T, H, E), K, n_segments = strided[0].shape, strided[1].shape[1], len(rows[-1]) - 1
    queries, keys, warps, stages = blocks
    kernel[(T // tile + n_segments) * heads, K](
        *rows, n_segments, n_numbers(T, n_segments), LOG2_E / E**0.5,
        *(x.stride(0) for x in strided),
        H=H, K=K, E=E, QUERIES=queries, KEYS=keys,
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = (readable(x) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        shape = q.shape[1], n_numbers(q.shape[0], len(cu_seqlens) - 1)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
        blocks, G = choose_blocks(q)[0], q.shape[1] // k.shape[1]
        _launch(_forward_kernel, blocks, blocks[0], G, (q, k, v, out, lse, cu_seqlens), q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        dout, delta, G = readable(dout), torch.empty_like(lse), q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _, for_dq, for_dk_dv = choose_blocks(q)
        rows = (q, k, v, out, dout, lse, delta, dq, cu_seqlens)
        _launch(_dq_kernel, for_dq, for_dq[0], G, rows, q, k, v, dout)  # first: it writes delta
        described = descriptors(q, dout, lse, delta, for_dk_dv[0])
        rows = (*described, q, k, v, dout, lse, delta, dk, dv, cu_seqlens)
        _launch(_dk_dv_kernel, for_dk_dv, for_dk_dv[1], 1, rows, q, k, v, dout)
        return dq, dk, dv, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:  # q[T,H,E], k[T,K,E], v[T,K,E], cu_seqlens[n+1] int32 -> [T,H,E]
    """Causal softmax attention within each segment: segment i is tokens cu_seqlens[i] up to
    cu_seqlens[i+1], and sees nothing else. Query head h reads key/value head h // (H/K).
    The segments cover all T tokens. max_seqlen is not needed: programs find their tiles.
    Raises ValueError for a head size outside HEAD_SIZES, or H that is no multiple of K."""
    if q.shape[2] not in HEAD_SIZES or q.shape[1] % k.shape[1]:
        raise ValueError(f"q{[*q.shape]}, k{[*k.shape]}: E must be in {HEAD_SIZES} and K divide H")
    return _Attention.apply(q, k, v, cu_seqlens)
