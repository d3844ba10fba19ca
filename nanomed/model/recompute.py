"""--recompute: what a layer does not keep for backward, but computes again. The decoder knows
nothing of it: this file changes how layers are called, not what they compute.

full keeps each layer's input alone, and runs the layer again.

lean computes again what is cheap. A matmul keeps its input for its own backward. Two of those
inputs cost a few operations per element: a norm's output, and the product in SwiGLU. In AquilaMed
they are a third of what a layer keeps. With lean the matmul does not keep such a tensor, but the
autograd node that made it. The node keeps its own inputs, which something else keeps anyway, and
runs its module again when backward asks for the tensor.

full:12 is full for the first 12 layers and lean for the others. The first, because backward comes
to them last: what they compute again then finds the memory that the others have left.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from nanomed.config import InputError

POLICIES = ("none", "lean", "full")  # from what keeps most to what computes most again


def set_recompute(model: nn.Module, policy: str) -> None:
    """From here on the layers of the model (Aquila) keep what the policy says. Parameters keep
    their names, and FSDP gathers a layer once around all of its forward. Raises InputError."""
    for layer, its in zip(model.layers, by_layer(policy, len(model.layers)), strict=True):
        set_layer(layer, its)


def by_layer(policy: str, n_layers: int) -> list[str]:
    """Each layer's own policy, one of POLICIES. Raises InputError."""
    name, _, number = policy.partition(":")
    if not number:
        return [name] * n_layers
    if int(number) > n_layers:
        raise InputError(f"--recompute {policy}: the model has {n_layers} layers")
    return [name] * int(number) + ["lean"] * (n_layers - int(number))


def set_layer(layer: nn.Module, policy: str) -> None:
    norms = [module for name, module in layer.named_children() if "norm" in name]
    cheap = (*norms, layer.mlp.act)
    for module in (layer, *cheap):
        vars(module).pop("forward", None)  # an earlier policy's
    if policy == "full":
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    elif policy == "lean":
        for module in cheap:
            module.forward = _rebuilt_by_its_node(module)
        layer.forward = _keeping_nodes(layer.forward)


def _rebuilt_by_its_node(module: nn.Module) -> Callable:
    """module.forward, without randomness, as one node of the graph that can run it again."""
    forward, params = module.forward, module.parameters  # FSDP puts gathered ones in their place
    return lambda *inputs: _Rebuilt.apply(forward, params, len(inputs), *inputs, *params())


def _keeping_nodes(forward: Callable) -> Callable:
    """Whatever in forward would keep the output of a _Rebuilt node keeps the node."""

    def pack(tensor: Tensor) -> object:
        return tensor.grad_fn if _is_rebuilt(tensor.grad_fn) else tensor

    def unpack(kept: object) -> Tensor:
        return _again(kept)[1].detach() if _is_rebuilt(kept) else kept

    def keeping_nodes(*inputs) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return forward(*inputs)

    return keeping_nodes


class _Rebuilt(torch.autograd.Function):
    """forward(*inputs) of a module with parameters, both in `tensors`. Only the inputs are kept."""

    @staticmethod
    def forward(ctx, forward: Callable, params: Callable, n_inputs: int, *tensors: Tensor):
        ctx.run, ctx.params, ctx.again = forward, params, None
        ctx.save_for_backward(*tensors[:n_inputs])
        return forward(*tensors[:n_inputs])

    @staticmethod
    def backward(ctx, grad: Tensor):
        tensors, out = _again(ctx)
        ctx.again = None  # its memory is free when this returns
        grads = iter(torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad))
        its = [next(grads) if x.requires_grad else None for x in tensors]  # of frozen ones None
        return None, None, None, *its


def _is_rebuilt(x: object) -> bool:
    return isinstance(x, torch.autograd.function.BackwardCFunction) and hasattr(x, "again")


def _again(ctx) -> tuple[list[Tensor], Tensor]:
    """(inputs and parameters, output) of a second run, with a graph; one serves all that ask."""
    if ctx.again is None:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            ctx.again = [*inputs, *ctx.params()], ctx.run(*inputs)
    return ctx.again
