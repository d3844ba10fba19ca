"""One GPU without FSDP: the same AdamW with float32 masters, and no copies of the model around it.

FSDP on one GPU copies the whole model for each row: it casts every float32 weight to bfloat16,
twice, and moves every gradient three times. Here a weight is two tensors that together are float32:
the parameter, in bfloat16, with which the model computes, and param.low, the bits that it lacks
(kernels/split_adamw.py draws them). A step of AdamW changes both in place. Weight 4 bytes, gradient
4, moments 8: what FSDP takes, without its copies.

Gradients are summed in float32 where they lie. On a GPU the matmul itself adds a row's gradient of
a linear layer to the sum; elsewhere autograd casts it to `grad_dtype` and adds it.

With moments in bfloat16 (4 bytes) an update is far below half the distance of two neighbours, and
rounding to the nearest would lose it. So it is rounded up or down at random, up the more likely the
nearer the upper one is: right on average.

Or moments and lower halves, 10 of these 16 bytes, lie in the host's memory and pass over the GPU
in a step, chunk by chunk. It moves 10 bytes for each parameter there and back, however many tokens
the step has.

In a checkpoint weights are float32, as FSDP's are: either kind reads the other's.
"""

import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.split_adamw import join, split
from nanomed.config import InputError

CHUNK = 2**24  # elements of a parameter that one call updates


def master(param: nn.Parameter) -> Tensor:
    """float32, if it is one of two halves; else as it is."""
    if not hasattr(param, "low"):
        return param.detach()
    return join(param.detach().to(param.low.device), param.low)


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
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.is_cuda:
            module.forward = functools.partial(_linear, module)
    model.register_state_dict_post_hook(_masters)
    model.register_load_state_dict_pre_hook(_from_masters)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return _SummingLinear.apply(x, module.weight, module.bias)


class _SummingLinear(torch.autograd.Function):
    """F.linear whose backward adds to weight.grad by the matmul that computes what is added. Of a
    row autograd would move 20 bytes for each weight: write the product in bfloat16, cast it, add
    it. This moves 8, and rounds nothing to bfloat16."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.has_bias = weight, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            add_product(ctx.weight, dy.flatten(0, -2).T, x.flatten(0, -2))
        dbias = dy.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.has_bias else None
        return dx, None, dbias


def add_product(param: nn.Parameter, a: Tensor, b: Tensor) -> None:
    """param.grad += a @ b, in float32."""
    if param.grad is None:
        param.grad = torch.mm(a, b, out_dtype=torch.float32)
    else:
        torch.addmm(param.grad, a, b, out_dtype=torch.float32, out=param.grad)


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
            state = {"step": torch.zeros(())}  # in the host's memory: the host asks for it
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
        state["step"] += 1
        whole = param, param.low, param.grad, state["exp_avg"], state["exp_avg_sq"]
        chunks = zip(*(x.detach().view(-1).split(CHUNK) for x in whole), strict=True)
        constants = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
        for chunk, turn in zip(chunks, turns, strict=False):  # of turns there is no end
            with turn:
                self._update_chunk(*chunk, n_steps=int(state["step"]), **constants)

    def _update_chunk(
        self, upper: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor, **constants
    ) -> None:
        kept = low, mean, square
        here = [x.to(upper.device, non_blocking=True) for x in kept]
        low, mean, square = here
        kernels.update_split(upper, low, grad, mean, square, self.scale, **constants)
        for there, value in zip(kept, here, strict=True):
            if there is not value:
                there.copy_(value, non_blocking=True)

    def load_state_dict(self, state_dict: dict) -> None:
        """Moments and counts; torch's own would cast them to the dtype of the weights."""
        saved = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, param in zip(saved, self._params(), strict=True):
            for name, value in state_dict["state"][key].items():
                self.state[param][name].copy_(value)
