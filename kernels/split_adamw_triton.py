"""AdamW on weights in two halves, in Triton; split_adamw.py is the definition and has a drawing.

A step reads and writes every number once: 28 bytes for each weight with moments in float32. The
definition moves about four times as many. Arithmetic is float32, as torch's own fused AdamW has it
but for single roundings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # weights of a program; 8 for each thread: 16 bytes of each half


@triton.jit
def _rounded_at_random(x, random):
    """float32 -> the bits of one of its two neighbours in bfloat16; `random` is 16 bits."""
    return ((x.to(tl.int32, bitcast=True) + random) >> 16).to(tl.int16)


# Not "n": where 16 divides it, no thread's 8 weights lie across the end, and they move at once.
@triton.jit(do_not_specialize=["seed"])
def _step(
    upper_ptr, low_ptr, grad_ptr, mean_ptr, square_ptr, scale_ptr, n, seed,
    lr, decay, beta1, beta2, rest1, rest2, unbias1, unbias2, eps,
    SCALED: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter 2019). Halves, and narrow moments, come as int16."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    upper = tl.load(upper_ptr + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(low_ptr + i, mask=inside, other=0).to(tl.int32)
    w = ((upper << 16) + low).to(tl.float32, bitcast=True)
    g = tl.load(grad_ptr + i, mask=inside, other=0)
    m = tl.load(mean_ptr + i, mask=inside, other=0)
    v = tl.load(square_ptr + i, mask=inside, other=0)
    if SCALED:
        g *= tl.load(scale_ptr)
    if NARROW:
        m = (m.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        v = (v.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    w -= decay * w
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w -= lr / unbias1 * m / (tl.sqrt_rn(v) / unbias2 + eps)
    bits = w.to(tl.int32, bitcast=True)
    upper = (bits + 0x8000) >> 16
    tl.store(upper_ptr + i, upper.to(tl.int16), mask=inside)
    tl.store(low_ptr + i, (bits - (upper << 16)).to(tl.int16), mask=inside)
    if NARROW:
        random = tl.randint(seed, i)
        m = _rounded_at_random(m, random & 0xFFFF)
        v = _rounded_at_random(v, (random >> 16) & 0xFFFF)
    tl.store(mean_ptr + i, m, mask=inside)
    tl.store(square_ptr + i, v, mask=inside)


def adamw(
    upper: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None,
    n_steps: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """What split_adamw.adamw() does; every tensor is contiguous."""
    narrow = mean.dtype == torch.bfloat16
    numbers = [upper.view(torch.int16), low, grad, mean, square]
    if narrow:
        numbers[3:] = mean.view(torch.int16), square.view(torch.int16)
    seed = int(torch.randint(2**31 - 1, ())) if narrow else 0  # from the CPU's generator: no wait
    unbias = 1 - betas[0] ** n_steps, (1 - betas[1] ** n_steps) ** 0.5
    _step[(triton.cdiv(upper.numel(), BLOCK),)](
        *numbers, numbers[2] if scale is None else scale, upper.numel(), seed,
        lr, lr * weight_decay, *betas, 1 - betas[0], 1 - betas[1], *unbias, eps,
        SCALED=scale is not None, NARROW=narrow, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
