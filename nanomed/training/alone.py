"""One GPU without FSDP: the same AdamW with float32 masters, and no copies of the model around it.

FSDP on one GPU copies the whole model for each row: it casts every float32 weight to bfloat16,
twice, and moves every gradient three times. Here a weight is two tensors that together are float32:

    s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
    `--- bfloat16 ---' `--- int16 ----'
       the parameter      param.low

The upper half is rounded to the nearest (a tie away from zero), so it is what a cast would give,
and the model computes with it. `low` is what the rounding left: added as integers they are the
master, bit for bit. Gradients are summed in float32 where they lie: autograd casts each row's to
`grad_dtype` and adds it. A step joins the halves of some elements, updates them by torch's own
fused AdamW, and splits them again. Weight 4 bytes, gradient 4, moments 8: what FSDP takes, without
its copies.

With moments in bfloat16 (4 bytes) an update is far below half the distance of two neighbours, and
rounding to the nearest would lose it. So it is rounded up or down at random, up the more likely the
nearer the upper one is: right on average.

In a checkpoint weights are float32, as FSDP's are: either kind reads the other's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

CHUNK = 2**26  # elements of a parameter that are float32 at once in a step


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> (the nearest bfloat16, what is lacking from its bits as int16)."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(upper: Tensor, low: Tensor) -> Tensor:
    """The float32 that split() was given."""
    bits = upper.view(torch.int16).to(torch.int32) << 16
    return bits.add_(low).view(torch.float32)


def master(param: nn.Parameter) -> Tensor:
    """float32, if it is one of two halves; else as it is."""
    return join(param.detach(), param.low) if hasattr(param, "low") else param.detach()


def rounded_at_random(x: Tensor) -> Tensor:
    """float32 -> bfloat16, one of its two neighbours; its mean is x."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 2**16)) >> 16).to(torch.int16).view(torch.bfloat16)


def split_weights(model: nn.Module, moments: torch.dtype) -> None:
    """Turns the float32 weights of a model that is not sharded into halves, one parameter after
    another. `moments` is what its optimizer will keep them in."""
    model.moments = moments
    for param in model.parameters():
        param.data, param.low = split(param.data)
        param.grad_dtype = torch.float32
    model.register_state_dict_post_hook(_masters)
    model.register_load_state_dict_pre_hook(_from_masters)


def _masters(model: nn.Module, state: dict[str, Tensor], *_) -> None:
    """In a checkpoint: float32, in host memory, since the GPU may have no room for it."""
    for name, param in model.named_parameters():
        state[name] = master(param).cpu()


def _from_masters(model: nn.Module, state: dict[str, Tensor], *_) -> None:
    for name, param in model.named_parameters():
        state[name], low = split(state[name].to(param.device, torch.float32))
        param.low.copy_(low)


class SplitAdamW(torch.optim.Optimizer):
    """AdamW over split weights. `scale`, if a step clips, multiplies all its gradients; setting it
    saves a pass over them."""

    def __init__(
        self, groups: list[dict], betas: tuple[float, float], eps: float, moments: torch.dtype
    ):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.scale: Tensor | None = None
        for param in self._params():
            self.state[param] = {
                "step": torch.zeros((), dtype=torch.float32, device=param.device),
                "exp_avg": torch.zeros_like(param, dtype=moments),
                "exp_avg_sq": torch.zeros_like(param, dtype=moments),
            }

    def _params(self) -> Iterable[nn.Parameter]:
        return (param for group in self.param_groups for param in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self._update(param, group)
        self.scale = None

    def _update(self, param: nn.Parameter, group: dict) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        state["step"] += 1
        whole = param, param.low, param.grad, state["exp_avg"], state["exp_avg_sq"]
        for upper, low, grad, mean, square in zip(
            *(x.detach().view(-1).split(CHUNK) for x in whole), strict=True
        ):
            master, mean32, square32 = join(upper, low), mean.float(), square.float()
            torch._fused_adamw_(
                [master], [grad if self.scale is None else grad * self.scale],
                [mean32], [square32], [], [state["step"]],
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
            for target, value in zip((upper, low), split(master), strict=True):
                target.copy_(value)
            if mean.dtype == torch.bfloat16:
                mean.copy_(rounded_at_random(mean32))
                square.copy_(rounded_at_random(square32))

    def load_state_dict(self, state_dict: dict) -> None:
        """Moments and counts; torch's own would cast them to the dtype of the weights."""
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"][key].items():
                self.state[param][name].copy_(value)
