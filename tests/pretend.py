"""A GPU that is not there: tensors that say they are on `cuda:0`, whose numbers are on the CPU.

    with pretended() as gpu:
        x = torch.ones(3, device="cuda")       # x.device is cuda:0, x.is_cuda
        x + torch.ones(3)                      # refused, as CUDA refuses it

Whatever mixes devices is refused by CUDA's rules, stricter than torch's fake tensors, which let
torch.stack pass a CPU scalar. Values are real, so code that looks at them runs, too. `gpu.waits`
lists what made the host wait for the device. A copy to page-locked memory that is not waited for is
full of NaN. What it does not have: streams that run beside one another, NCCL, FSDP, Triton.
"""

import contextlib
import os
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
_current: "Gpu | None" = None


class Gpu(TorchFunctionMode):
    """What the pretended device was asked for. The mode itself catches functions that name it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # where the host waited
        self.copies: list[tuple[Tensor, Tensor]] = []  # page-locked memory, what will be there
        self.pinned: dict[int, int] = {}  # where such memory begins and ends
        self.refuses_to_pin = 0  # the error that it gives, or 0
        self.streams: list[mock.Mock] = []  # those beside the first, in the order of use

    def pin(self, address: int, size: int, flags: int = 0) -> int:
        assert address not in self.pinned, "CUDA error 712: it is registered already"
        if not self.refuses_to_pin:
            self.pinned[address] = address + size
        return self.refuses_to_pin

    def stream(self) -> mock.Mock:
        return mock.Mock(synchronize=self.synchronize, device_type="cuda")

    def using(self, stream: mock.Mock) -> contextlib.AbstractContextManager:
        self.streams.append(stream)
        return contextlib.nullcontext()

    def is_pinned(self, x: Tensor) -> bool:
        return any(begin <= x.data_ptr() < end for begin, end in self.pinned.items())

    def synchronize(self) -> None:
        self.waits.append("synchronize")
        for target, values in self.copies:
            target.copy_(values)
        self.copies.clear()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return _moved(func, args, kwargs)
        if func is Tensor.backward:
            with self:  # or what runs in backward would not be seen
                one = (torch.ones_like(args[0]),)
                return _engine_run_backward(
                    (args[0],), one, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if kwargs.pop("pin_memory", False):
            out = self.__torch_function__(func, types, args, kwargs)
            self.pinned[out.data_ptr()] = out.data_ptr() + out.nbytes
            return out
        if func is Tensor.pin_memory:
            if isinstance(args[0], Pretended):
                raise RuntimeError("cannot pin a tensor of the GPU, only dense CPU tensors")
            self.pinned[args[0].data_ptr()] = args[0].data_ptr() + args[0].nbytes
            return args[0]
        if func is Tensor.is_pinned:
            return self.is_pinned(args[0])
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        device, _ = torch.device(device), kwargs.pop("device")
        if device.type not in ("cpu", "cuda"):
            return func(*args, device=device, **kwargs)
        out = func(*tree_map(_inside, args), device="cpu", **kwargs)
        return _on_gpu(out) if device.type == "cuda" else out


class Pretended(Tensor):
    """C++ takes it for a CPU tensor, so autograd needs no CUDA; Python sees a GPU's."""

    device, is_cuda, is_cpu = CUDA, True, False

    @staticmethod
    def __new__(cls, inside: Tensor):
        out = Tensor._make_wrapper_subclass(
            cls, inside.shape, inside.stride(), inside.storage_offset(), dtype=inside.dtype
        )
        out.inside = inside
        return out

    def __repr__(self):
        return f"{self.inside!r} on {CUDA}"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is Tensor.tolist:
            _current.waits.append("tolist")
            return args[0].inside.tolist()
        if func == Tensor.data.__set__:  # made anew by each look
            args[0].inside = args[1].inside
        if func is Tensor.new_tensor:
            return Pretended(func(args[0].inside, *args[1:], **kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.copy_.default, aten._to_copy.default):
            return _copied(func, args, kwargs)
        _refuse_mixtures(func, args, kwargs)
        if _waits(func, args, kwargs):
            _current.waits.append(str(func))
        inner = _FOR_GPUS_ALONE.get(str(func), func)
        out = inner(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if func is aten._local_scalar_dense.default:
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_on_gpu, out))


def _inside(x):
    return x.inside if isinstance(x, Pretended) else x


def _on_gpu(x):
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


class _Move(torch.autograd.Function):
    """There and back, with a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _inside(x).clone() if isinstance(x, Pretended) else Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _inside(grad) if isinstance(grad, Pretended) else Pretended(grad)


def _moved(func, args, kwargs):
    """x.to(...), x.cpu(), x.cuda()."""
    x, *rest = args
    device, others = None, []
    if func is not Tensor.to:
        device, rest = torch.device("cpu" if func is Tensor.cpu else "cuda"), []
    for value in rest:
        if isinstance(value, Tensor):  # x.to(other)
            device, value = value.device, value.dtype
        if isinstance(value, (str, torch.device)):
            device = torch.device(value)
        elif isinstance(value, torch.dtype):
            others.append(value)
    device = torch.device(kwargs.pop("device", device or x.device))
    kwargs.pop("non_blocking", None)
    if others or "dtype" in kwargs:
        x = Tensor.to(x, *others, **kwargs)
    if device.type == "cuda" and not isinstance(x, Pretended):
        if x.numel() and not _current.is_pinned(x):
            _current.waits.append("a copy from memory that is not page-locked")
        return _Move.apply(x)
    if device.type == "cpu" and isinstance(x, Pretended):
        _current.waits.append("to the CPU")
        return _Move.apply(x)
    return x if device.type in ("cpu", "cuda") else _inside(x).to(device)


def _copied(func, args, kwargs):
    """Copies between devices, the one thing that may have one on each side."""
    if func is aten._to_copy.default:
        return Pretended(func(_inside(args[0]), **kwargs))
    target, source, *rest = args
    to_host = isinstance(source, Pretended) and not isinstance(target, Pretended)
    if to_host and rest and rest[0] and _current.is_pinned(target):
        _current.copies.append((target, _inside(source).clone()))
        if target.is_floating_point():
            target.fill_(torch.nan)
        return target
    if to_host:
        _current.waits.append("copy_ to the CPU")
    func(_inside(target), _inside(source), *rest)
    return target


_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_INDEXING = (*_INDEXING, aten._index_put_impl_.default)
_TAKES_A_NUMBER = (*_INDEXING, aten.fill_.Tensor)


def _refuse_mixtures(func, args, kwargs) -> None:
    """A CPU tensor may be a number in an elementwise operation, or an index; nothing else."""
    if func in _INDEXING and isinstance(args[0], Pretended):
        args = (args[0], *args[2:3])
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    elementwise = torch.Tag.pointwise in func.tags or func in _TAKES_A_NUMBER
    for x in leaves:
        on_gpu = isinstance(x, Pretended)
        if not on_gpu and not (elementwise and x.dim() == 0):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} got the CPU")


def _waits(func, args, kwargs) -> bool:
    name = str(func)
    if "index" in name and isinstance(args[1], (list, tuple)):  # a mask becomes places
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
        filled = len(args) > 2 and args[2].dim() == 0
        return bool(masks) and not filled
    if "repeat_interleave" in name:
        return kwargs.get("output_size") is None
    if "segment_reduce" in name and "backward" not in name:  # it checks the lengths
        return not kwargs.get("unsafe", False)
    return any(n in name for n in ("_local_scalar_dense", "nonzero", "masked_select", "unique"))


# ---------------------------------------------------------------- what has no CPU kernel


def _segments(borders: Tensor, *tensors: Tensor):
    """Of each segment its part of every tensor, [H,S,E] in float32."""
    parts = (x.float().split(borders.diff().tolist()) for x in tensors)
    return zip(*([p.transpose(0, 1) for p in part] for part in parts), strict=True)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window=None, *_, **__):
    """As flash attention over packed segments; asks of its inputs what that asks."""
    assert is_causal or tuple(window) == (-1, 0), window
    assert cu_q.dtype == cu_k.dtype == torch.int32, (cu_q.dtype, cu_k.dtype)
    assert q.dtype in (torch.bfloat16, torch.float16), q.dtype
    assert int(cu_q.diff().max()) <= max_q and max_k == max_q, (cu_q, max_q, max_k)
    _heads.append((q.shape[1], k.shape[1]))
    k, v = _grouped(q, k), _grouped(q, v)
    out = torch.cat([(_weights(q, k) @ v).transpose(0, 1) for q, k, v in _segments(cu_q, q, k, v)])
    return out.to(q.dtype), torch.zeros(q.shape[1::-1]), torch.zeros(2, dtype=torch.uint64)


_heads: list[tuple[int, int]] = []  # of q and of k and v, as attention was called


def _grouped(q: Tensor, x: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _varlen_backward(dout, q, k, v, out, lse, cu_q, *_, **__):
    grads, n_kv = [], k.shape[1]
    k, v = _grouped(q, k), _grouped(q, v)
    for do, qs, ks, vs in _segments(cu_q, dout, q, k, v):
        p = _weights(qs, ks)
        dp = do @ vs.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        grads.append([x.transpose(0, 1).to(q.dtype) for x in (ds @ ks, ds.mT @ qs, p.mT @ do)])
    dq, dk, dv = (torch.cat(parts) for parts in zip(*grads, strict=True))
    return dq, *(x.unflatten(1, (n_kv, -1)).sum(2).to(q.dtype) for x in (dk, dv))


def _wide_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """A product in a wider format than its factors'."""
    return a.to(out_dtype) @ b.to(out_dtype)


def _wide_addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor):
    return torch.addmm(total, a.to(out_dtype), b.to(out_dtype), out=out)


_FOR_GPUS_ALONE = {
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
    "aten.mm.dtype": _wide_mm,
    "aten.addmm.dtype_out": _wide_addmm,
}


# ---------------------------------------------------------------- torch.cuda


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextlib.contextmanager
def pretended():
    """torch has a GPU inside it. Generators asked for on it are the CPU's."""
    global _current
    gpu = _current = Gpu()
    stream = gpu.stream()
    cudart = mock.Mock(cudaHostRegister=gpu.pin, cudaHostUnregister=gpu.pinned.pop)
    known = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 8,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "Stream": gpu.stream,
        "stream": gpu.using,
        "cudart": lambda: cudart,
        "max_memory_allocated": lambda *_: 2**30,
        "get_device_properties": lambda *_: mock.Mock(total_memory=140 * 2**30),
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_device_capability": lambda *_: (9, 0),
        "is_current_stream_capturing": lambda: False,
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, function in known.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7"))
        stack.enter_context(gpu)
        yield gpu
    _current = None
