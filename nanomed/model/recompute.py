"""--recompute lean: what is cheap to compute is not kept for backward, but computed again.

A matmul keeps its input for its own backward. Two of those inputs cost a few operations per
element: a norm's output, and the product in SwiGLU. In AquilaMed-7B they are a third of what a
layer keeps. Here the matmul keeps, in place of such a tensor, the autograd node that made it; the
node keeps only its own inputs, which are kept anyway, and runs its function again when asked.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def rebuilt_for(
    block: Callable[[Tensor], Tensor], function: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """block(function(*inputs)), of which backward keeps neither function's output nor what lies
    inside function. `function` has no randomness; it runs once more in backward."""
    out = _Rebuilt.apply(function, *inputs)
    node = out.grad_fn
    if node is None:  # no gradient is wanted
        return block(out)

    known = id(out)  # autograd keeps these functions, and so would keep an `out` named in them

    def pack(tensor: Tensor) -> object:
        return node if id(tensor) == known else tensor

    def unpack(kept: object) -> Tensor:
        return _again(node)[1].detach() if kept is node else kept

    with saved_tensors_hooks(pack, unpack):
        return block(out)


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function, ctx.again = function, None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        inputs, out = _again(ctx)
        ctx.again = None  # its memory is free when this returns
        return None, *torch.autograd.grad(out, inputs, grad)


def _again(ctx) -> tuple[list[Tensor], Tensor]:
    """(inputs, output) of a second run, with a graph; one run serves all that ask for it."""
    if ctx.again is None:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            ctx.again = inputs, ctx.function(*inputs)
    return ctx.again
