"""SwiGLU in Triton; reference.swiglu is the definition. F is the feed-forward width, N the rows.

Only gate and up are kept for the backward pass: it builds silu(gate) again, which costs arithmetic
that a kernel waiting for memory has to spare.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # elements of a row that one program computes


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    """y = g s u with s = sigmoid(g)."""
    row = tl.program_id(0).to(tl.int64)  # row * F passes 2^31 from 75 thousand tokens of a 7B model
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + row * gate_stride + f, mask=f < F, other=0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + f, mask=f < F, other=0).to(tl.float32)
    tl.store(y_ptr + row * F + f, g * tl.sigmoid(g) * u, mask=f < F)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, dy_stride, gate_stride, up_stride,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ds/dg = s (1 - s), so with silu(g) = g s

    du = dy g s        dg = dy u (s + g s (1 - s)) = dy u s (1 + g (1 - s))"""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + f, mask=f < F, other=0).to(tl.float32)
    g = tl.load(gate_ptr + row * gate_stride + f, mask=f < F, other=0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + f, mask=f < F, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup_ptr + row * F + f, dy * g * s, mask=f < F)
    tl.store(dgate_ptr + row * F + f, dy * u * s * (1 + g * (1 - s)), mask=f < F)


def _launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    """gate[..., F], up[..., F] -> y[..., F]."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, up = _rows(gate), _rows(up)
    tile = _tile(gate.shape[1])
    _forward[_grid(gate, tile)](gate, up, y, gate.stride(0), up.stride(0), **tile)
    return y


def _launch_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dy[..., F], gate[..., F], up[..., F] -> dgate[..., F], dup[..., F]."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    dy, gate, up = _rows(dy), _rows(gate), _rows(up)
    tile = _tile(gate.shape[1])
    strides = dy.stride(0), gate.stride(0), up.stride(0)
    _backward[_grid(gate, tile)](dy, gate, up, dgate, dup, *strides, **tile)
    return dgate, dup


def _tile(f: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(f))
    return {"F": f, "BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}


def _grid(x: Tensor, tile: dict[str, int]) -> tuple[int, int]:
    """Rows first: only a grid's first side may be longer than 65,535."""
    return x.shape[0], triton.cdiv(x.shape[1], tile["BLOCK"])


def _rows(x: Tensor) -> Tensor:
    """x[..., F] as [N,F], elements of a row adjacent; a copy only where there is no view: halves of
    one packed gate|up matrix are read as they lie."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _launch_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return _launch_backward(dy, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # gate[..., F], up[..., F]
    return _SwiGLU.apply(gate, up)
