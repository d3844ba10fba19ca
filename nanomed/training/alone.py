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

Or moments and lower halves, 10 of these 16 bytes, lie in the host's memory and pass over the GPU
in a step, chunk by chunk. It moves 10 bytes for each parameter there and back, however many tokens
the step has.

In a checkpoint weights are float32, as FSDP's are: either kind reads the other's.
"""

import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from nanomed.config import InputError

CHUNK = 2**24  # elements of a parameter that are float32 at once in a step


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
    if not hasattr(param, "low"):
        return param.detach()
    return join(param.detach().to(param.low.device), param.low)


def rounded_at_random(x: Tensor) -> Tensor:
    """float32 -> bfloat16, one of its two neighbours; its mean is x."""
    bits = x.view(torch.int32)
    return ((bits + torch.randint_like(bits, 2**16)) >> 16).to(torch.int16).view(torch.bfloat16)


def split_weights(model: nn.Module, optimizer: str) -> None:
    """Turns the float32 weights of a model that is not sharded into halves, one parameter after
    another, as --optimizer split, split_bf16 or split_host says."""
    model.split_as = optimizer
    for param in model.parameters():
        param.data, low = split(param.data)
        param.low = low.cpu() if optimizer == "split_host" else low
        if param.low.device != param.device:
            page_lock(param.low)
        param.grad_dtype = torch.float32
    model.register_state_dict_post_hook(_masters)
    model.register_load_state_dict_pre_hook(_from_masters)


def page_lock(x: Tensor) -> None:
    """Makes x, which lies in the host's memory, one that a GPU reads and writes by itself while it
    computes. (Of torch's own page-locked memory it would take the next power of two of bytes.)
    Raises InputError where the system refuses."""
    cudart = torch.cuda.cudart()
    if error := int(cudart.cudaHostRegister(x.data_ptr(), x.nbytes, 0)):
        raise InputError(
            f"--optimizer split_host: this system page-locks no {x.nbytes / 2**30:.2f} GiB of "
            f"memory (CUDA error {error}); is there a limit (ulimit -l)? else use --optimizer fsdp"
        )
    # A finalizer runs before the memory is given back; at the process's end the driver does it.
    weakref.finalize(x, cudart.cudaHostUnregister, x.data_ptr()).atexit = False


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

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, optimizer: str):
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.scale: Tensor | None = None
        dtype = torch.bfloat16 if optimizer == "split_bf16" else torch.float32
        for param in self._params():
            state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=dtype, device=param.low.device)
                if param.low.device != param.device:
                    page_lock(state[name])
            self.state[param] = state
        moves = param.low.device != param.device
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()] if moves else []

    def _params(self) -> Iterable[nn.Parameter]:
        return (param for group in self.param_groups for param in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self._params():
            self.state[param]["step"] += 1
        with self._turns() as turns:
            for group in self.param_groups:
                for param in group["params"]:
                    self._update(param, group, turns)
        self.scale = None

    @contextmanager
    def _turns(self) -> Iterator[Iterator]:
        """The stream of each chunk. There are two: while one chunk's numbers return to the host,
        the next one's arrive."""
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
        turns = [torch.cuda.stream(stream) for stream in self.streams] or [nullcontext()]
        yield itertools.cycle(turns)
        for stream in self.streams:
            stream.synchronize()  # the host may read its memory now

    def _update(self, param: nn.Parameter, group: dict, turns: Iterator) -> None:
        state = self.state[param]
        whole = param, param.low, param.grad, state["exp_avg"], state["exp_avg_sq"]
        chunks = zip(*(x.detach().view(-1).split(CHUNK) for x in whole), strict=True)
        for chunk, turn in zip(chunks, turns, strict=False):  # of turns there is no end
            with turn:
                self._update_chunk(*chunk, state["step"], group)

    def _update_chunk(
        self, upper: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor,
        step: Tensor, group: dict,
    ) -> None:  # fmt: skip
        here = {"device": upper.device, "non_blocking": True}
        master = join(upper, low.to(**here))
        mean32, square32 = (x.to(dtype=torch.float32, **here) for x in (mean, square))
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [master], [grad if self.scale is None else grad * self.scale],
            [mean32], [square32], [], [step],
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        for half, value in zip((upper, low), split(master), strict=True):
            half.copy_(value, non_blocking=True)
        for moment, value in ((mean, mean32), (square, square32)):
            if moment is not value:  # it lies elsewhere, or in bfloat16
                narrow = moment.dtype == torch.bfloat16
                moment.copy_(rounded_at_random(value) if narrow else value, non_blocking=True)

    def load_state_dict(self, state_dict: dict) -> None:
        """Moments and counts; torch's own would cast them to the dtype of the weights."""
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"][key].items():
                self.state[param][name].copy_(value)
