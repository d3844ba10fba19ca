"""RMSNorm in Triton; reference.rmsnorm is the definition. D is the model width, N the rows.

A row is read once and written once. Statistics are float32 whatever the dtype of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Programs of the backward kernel, each of which goes through many rows: enough that one computes
# while another waits for memory, few enough that their float32 rows of dweight stay small.
PROGRAMS_PER_SM = 2
ROWS_AHEAD_BYTES = 48 * 1024  # of shared memory, of each program


@triton.jit
def _forward(x_ptr, w_ptr, y_ptr, rstd_ptr, x_stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """One row: y = w n with n = x r and r = (mean(x^2) + eps)^(-1/2)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0).to(tl.float32)
    w = tl.load(w_ptr + d, mask=d < D, other=0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / D + eps)
    n = (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)  # rounded before the weight
    tl.store(y_ptr + row * D + d, w * n, mask=d < D)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["n_rows"])
def _backward(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_ptr, dy_stride, x_stride, n_rows,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every n_programs-th row. r depends on all of x: dr/dx = -r^3 x / D, so with g = w dy

        dx = r (g - n mean(g n))        dw = sum over the rows of dy n

    The sum stays in registers until the program's last row."""
    program, n_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    d = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + d, mask=d < D, other=0).to(tl.float32)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for row in tl.range(program, n_rows, n_programs, num_stages=STAGES):
        x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + d, mask=d < D, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        n, g = x * rstd, w * dy
        dx = rstd * (g - n * (tl.sum(g * n) / D))
        tl.store(dx_ptr + row * D + d, dx, mask=d < D)
        dw += dy * n.to(x_ptr.dtype.element_ty).to(tl.float32)  # what forward multiplied by w
    tl.store(dw_ptr + program * D + d, dw, mask=d < D)


def _launch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x[..., D] -> y[..., D], rstd[N]."""
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    x = _rows(x)
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _forward[(len(x),)](x, weight, y, rstd, x.stride(0), eps, **_tile(x.shape[1]))
    return y, rstd


def _launch_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """dy[..., D], x[..., D] -> dx[..., D], dweight[D]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dy, x = _rows(dy), _rows(x)
    n_rows, d = x.shape
    n_programs = min(n_rows, PROGRAMS_PER_SM * _n_processors(x.device))
    dw = torch.empty(n_programs, d, dtype=torch.float32, device=x.device)
    strides = dy.stride(0), x.stride(0)
    tile = _tile(d)
    # Two more rows are on their way from memory while one is computed, where they fit a small GPU.
    fit = 2 * tile["BLOCK"] * (dy.element_size() + x.element_size()) <= ROWS_AHEAD_BYTES
    tile["STAGES"] = 3 if fit else 1
    _backward[(n_programs,)](dy, x, weight, rstd, dx, dw, *strides, n_rows, **tile)
    return dx, dw.sum(0).to(weight.dtype)  # in this order every time: no atomics


def _tile(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    warps = min(8, max(1, block // 256))
    return {"D": d, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def _n_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter has none


def _rows(x: Tensor) -> Tensor:
    """x[..., D] as [N,D], elements of a row adjacent; a copy only where there is no view."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _launch_forward(x, weight.contiguous(), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        return *_launch_backward(dy, x, weight.contiguous(), rstd), None


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x[..., D], weight[D]
    return _RMSNorm.apply(x, weight, eps)
