"""Rotary position embedding in Triton; reference.rope is the definition.

T tokens, H query heads, K key/value heads, E head size. One program turns all heads of one token,
queries and keys: they share its angles.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.reference import wavelengths


@triton.jit
def _turn(
    x_ptr, y_ptr, head_stride, cos, sin, e,
    N_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """One token's heads: elements e and e + E/2 of each are a plane, turned by its angle."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    inside = (head < N_HEADS) & (e < HALF)
    a = tl.load(x_ptr + head * head_stride + e, mask=inside, other=0).to(tl.float32)
    b = tl.load(x_ptr + head * head_stride + e + HALF, mask=inside, other=0).to(tl.float32)
    y_ptr += head * 2 * HALF + e
    tl.store(y_ptr, a * cos - b * sin, mask=inside)
    tl.store(y_ptr + HALF, b * cos + a * sin, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _forward(
    q_ptr, k_ptr, positions_ptr, wavelengths_ptr, q_out_ptr, k_out_ptr,
    q_token, q_head, k_token, k_head, direction,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The angle is divided and its sine taken as exactly as float32 allows: at position 4,000 a
    fast approximation is off by more than bfloat16's rounding of the result."""
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)[None, :]
    position = tl.load(positions_ptr + token).to(tl.float32)
    wavelength = tl.load(wavelengths_ptr + e, mask=e < HALF, other=1)
    angle = tl.div_rn(position, wavelength)
    cos, sin = tl.cos(angle), tl.sin(angle) * direction
    q_ptr, q_out_ptr = q_ptr + token * q_token, q_out_ptr + token * H * 2 * HALF
    k_ptr, k_out_ptr = k_ptr + token * k_token, k_out_ptr + token * K * 2 * HALF
    _turn(q_ptr, q_out_ptr, q_head, cos, sin, e, H, HALF, BLOCK_H)
    _turn(k_ptr, k_out_ptr, k_head, cos, sin, e, K, HALF, BLOCK_K)


# Backward kernel: a rotation's transpose is the rotation back, so the gradients of q and k are the
# incoming ones turned the other way, by _forward with direction = -1.


def _launch(
    q: Tensor, k: Tensor, positions: Tensor, turning: tuple, direction: float
) -> tuple[Tensor, Tensor]:
    """q[T,H,E], k[T,K,E], positions[T], (theta, scaling) -> q and k turned (direction 1) or turned
    back (-1)."""
    q, k = _readable(q), _readable(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    wavelengths = _wavelengths(q.shape[2] // 2, *turning, q.device)
    strides = *q.stride()[:2], *k.stride()[:2]
    tile = _tile(q.shape[1], k.shape[1], q.shape[2])
    _forward[(len(q),)](
        q, k, positions.contiguous(), wavelengths, q_out, k_out, *strides, direction, **tile
    )
    return q_out, k_out


def _tile(h: int, k: int, e: int) -> dict[str, int]:
    planes = triton.next_power_of_2(e // 2)
    return {
        "H": h, "K": k, "HALF": e // 2,
        "BLOCK_H": triton.next_power_of_2(h),
        "BLOCK_K": triton.next_power_of_2(k),
        "BLOCK_E": planes,
        # One angle for each thread: with more threads several would compute the same exact sine.
        "num_warps": max(1, planes // 32),
        "enable_fp_fusion": True,
    }  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """Views of a projection are read where they lie, if a head's elements are adjacent and offsets
    within a token fit int32."""
    return x if x.stride(2) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


# The definition's own, so that both have the same angles. Every layer of a model wants the same few
# numbers.
_wavelengths = functools.cache(wavelengths)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, positions: Tensor, *turning):
        ctx.save_for_backward(positions)  # neither q nor k
        ctx.turning = turning
        return _launch(q, k, positions, turning, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        (positions,) = ctx.saved_tensors
        return *_launch(dq, dk, positions, ctx.turning, -1.0), None, None, None


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:  # q[T,H,E], k[T,K,E], positions[T]
    return _RoPE.apply(q, k, positions, theta, scaling)
