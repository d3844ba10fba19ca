"""Fused ops as plain functions of plain tensors. They know nothing of the model above them.

Each has a definition in reference.py, which says what it computes, and a Triton version in a file
of its own. use() chooses between them, once, at start.
"""

import functools

import torch
from torch import Tensor

from kernels import reference

__all__ = ["attention", "linear_nll", "rmsnorm", "rope", "swiglu"]

CHOICES = ("auto", "triton", "reference")

# Ops whose Triton version "auto" leaves alone, with the reason that the run's first lines give.
LEFT_ALONE = {"attention": "torch's varlen_attn, until the bench has shown a faster one"}

_chosen = "auto"


def use(name: str) -> None:
    """From here on every op runs as "triton", as "reference", or, with "auto", in Triton on CUDA
    tensors where Triton imports and by the definition elsewhere."""
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels.use({name!r}): it must be one of {CHOICES}")
    _chosen = name


def in_force(device: torch.device) -> str:
    """What runs on this device's tensors, in a few words: the same words, the same code."""
    versions = {op: _version(op, device) for op in __all__}
    usual = versions["rmsnorm"]
    others = [f", {op} {version}" for op, version in versions.items() if version != usual]
    return usual + "".join(others)


def reasons(device: torch.device) -> str:
    """Why, for the run's first lines; empty where --kernels said so."""
    if _chosen != "auto":
        return ""
    if device.type != "cuda":
        return "Triton is for CUDA tensors"
    if triton_error():
        return f"Triton does not import: {triton_error()}"
    return "; ".join(f"{op}: {reason}" for op, reason in LEFT_ALONE.items())


@functools.cache
def triton_error() -> str:
    """Why Triton cannot be used, or nothing. It is not installed everywhere: torch's CPU build
    comes without."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def triton_head_sizes() -> tuple[int, ...]:
    """Of Triton's attention; the definition takes any."""
    from kernels.attention_tiles import HEAD_SIZES

    return HEAD_SIZES


def _version(op: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    if _chosen != "auto":
        return _chosen
    # The kernels compute in float32, so float64 stays with the definition.
    on_gpu = device.type == "cuda" and dtype != torch.float64
    return "triton" if on_gpu and op not in LEFT_ALONE and not triton_error() else "reference"


def _run(op: str, x: Tensor, *arguments):
    if _version(op, x.device, x.dtype) == "reference":
        return getattr(reference, op)(x, *arguments)
    if x.dtype == torch.float64:
        raise TypeError(f"the Triton version of {op} computes in float32; float64 is the reference")
    return _triton_ops()[op](x, *arguments)


@functools.cache
def _triton_ops() -> dict:
    """Imported when the first is needed: `import kernels` works without Triton."""
    from kernels.attention_triton import attention
    from kernels.linear_nll_triton import linear_nll
    from kernels.rmsnorm_triton import rmsnorm
    from kernels.rope_triton import rope
    from kernels.swiglu_triton import swiglu

    return {f.__name__: f for f in (attention, linear_nll, rmsnorm, rope, swiglu)}


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x[..., D], weight[D]
    return _run("rmsnorm", x, weight, eps)


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:  # q[T,H,E], k[T,K,E], positions[T]
    return _run("rope", q, k, positions, theta, scaling)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # gate[..., F], up[..., F]
    return _run("swiglu", gate, up)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:  # q[T,H,E], k[T,K,E], v[T,K,E], cu_seqlens[n+1] -> [T,H,E]
    return _run("attention", q, k, v, cu_seqlens, max_seqlen)


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # hidden[T,D], weight[V,D], labels[T] -> [T] each
    """(nll, lse, right): float32, float32, bool; 0 and False where the label is -100."""
    return _run("linear_nll", hidden, weight, labels)
