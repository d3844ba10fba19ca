"""AdamW on weights that are kept in two halves: a float32 as a bfloat16 and an int16.

    s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
    `--- bfloat16 ---' `--- int16 ----'
          upper              low

The upper half is rounded to the nearest (a tie away from zero), so it is what a cast would give.
`low` is what the rounding left: added as integers the two are the float32, bit for bit.

This is the definition, in PyTorch; split_adamw_triton.py does the same in one pass over memory.
"""

import torch
from torch import Tensor


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (the nearest bfloat16, what is lacking from its bits as int16)."""
    bits = x.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, low: Tensor) -> Tensor:
    """The float32 that split() was given."""
    bits = upper.view(torch.int16).to(torch.int32) << 16
    return bits.add_(low).view(torch.float32)


def rounded_at_random(x: Tensor) -> Tensor:
    """float32 -> bfloat16, one of its two neighbours; its mean is x."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 2**16)) >> 16).to(torch.int16).view(torch.bfloat16)


def adamw(
    upper: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None,
    n_steps: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step, the n_steps-th, of n weights: upper and low, mean and square (the moments, float32
    or bfloat16) are changed in place. grad[n] is float32, multiplied by `scale` if there is one."""
    master, mean32, square32 = join(upper, low), mean.float(), square.float()
    torch._fused_adamw_(
        [master], [grad if scale is None else grad * scale], [mean32], [square32], [],
        [torch.tensor(float(n_steps), device=upper.device)],
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for half, value in zip((upper, low), split(master), strict=True):
        half.copy_(value)
    if mean.dtype == torch.bfloat16:
        mean.copy_(rounded_at_random(mean32))
        square.copy_(rounded_at_random(square32))
