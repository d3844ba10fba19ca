"""Linear layers for a model that is only run, on a CPU: the same sums in less time."""

import torch
from torch import Tensor, nn

OPS = ("_reorder_linear_weight", "_linear_pointwise")


class PackedLinear(nn.Module):
    """nn.Linear in float32 by oneDNN, over weights that are laid out for it once. torch's own calls
    MKL there, which took 1.9 to 2.4 times as long for rows of 16 to 4,000 tokens on an AMD EPYC.
    The products are added in another order, so the last bits differ. torch keeps these ops for its
    compiler and promises nothing about them: pack_linears asks whether they are there."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replaces the linear layers of a model on a CPU in float32, which from then on can only be
    run: not trained, saved or moved. Leaves any other model, and a torch without these ops, alone.
    """
    first = next(model.parameters())
    fits = first.device.type == "cpu" and first.dtype == torch.float32
    known = all(hasattr(torch.ops.mkldnn, name) for name in OPS)
    if not fits or not known or not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
