"""Fused ops as plain functions of plain tensors. They know nothing of the model above them.

Each has a definition in reference.py (AdamW's step is in split_adamw.py), which says what it
computes, and a Triton version in a file of its own, *_triton.py. use() chooses between them, once,
at start.
"""

import functools

import torch
from torch import Tensor

from kernels import attention_by_segment, linear_nll_chunked, reference, split_adamw

__all__ = ["attention", "linear_nll", "rmsnorm", "rope", "swiglu", "update_split"]

CHOICES = ("auto", "triton", "reference")

# Where Triton's attention is faster than torch's own: as measured on an H200 (docs/results.md).
FAST_ATTENTION = ((9, 0),)  # compute capability: H100 and H200, whose cores are the same
HALF = (torch.bfloat16, torch.float16)  # in float32 its matmuls use no tensor cores

_chosen = "auto"


def use(name: str) -> None:
    """From here on every op runs as "triton", as "reference" (plain PyTorch), or, with "auto", in
    Triton on CUDA tensors where Triton imports and in plain PyTorch elsewhere."""
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels.use({name!r}): it must be one of {CHOICES}")
    _chosen = name


def in_force(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """A label for the versions that run on this device's tensors of this dtype. Two equal labels of
    one dtype mean that the same code ran; DPO's reference compares both."""
    versions = {op: _version(op, device, dtype, head_size) for op in __all__}
    usual = versions["rmsnorm"]
    others = [f", {op} {version}" for op, version in versions.items() if version != usual]
    return usual + "".join(others)


def reasons(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why, for the run's first lines; empty where --kernels said so."""
    if _chosen != "auto":
        return ""
    if device.type != "cuda":
        return "Triton is for CUDA tensors"
    if triton_error():
        return f"Triton does not import: {triton_error()}"
    if dtype not in HALF:
        return "attention: torch's, since Triton's would use no tensor cores in float32"
    if head_size not in triton_head_sizes():
        return (
            f"attention: torch's varlen_attn, since Triton's takes heads of {triton_head_sizes()}"
        )
    if not _is_measured(device):
        return "attention: torch's varlen_attn, since Triton's was measured on an H200 alone"
    return ""


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


def _version(op: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    if _chosen != "auto":
        return _chosen
    # The kernels compute in float32, so float64 stays with the definition.
    if device.type != "cuda" or dtype == torch.float64 or triton_error():
        return "reference"
    takes = dtype in HALF and head_size in triton_head_sizes() and _is_measured(device)
    return "triton" if takes or op != "attention" else "reference"


def _is_measured(device: torch.device) -> bool:
    found = torch.cuda.is_available() and torch.cuda.get_device_capability(device)
    return found in FAST_ATTENTION


def _takes_triton(op: str, x: Tensor) -> bool:  # x[..., E] if the op is attention
    triton = _version(op, x.device, x.dtype, x.shape[-1]) == "triton"
    if triton and x.dtype == torch.float64:
        raise TypeError(f"the Triton version of {op} computes in float32; float64 is the reference")
    return triton


# Triton versions are imported where they are called: `import kernels` works without Triton.


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x[..., D], weight[D]
    if _takes_triton("rmsnorm", x):
        from kernels import rmsnorm_triton

        return rmsnorm_triton.rmsnorm(x, weight, eps)
    return reference.rmsnorm(x, weight, eps)


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:  # q[T,H,E], k[T,K,E], positions[T]
    if _takes_triton("rope", q):
        from kernels import rope_triton

        return rope_triton.rope(q, k, positions, theta, scaling)
    return reference.rope(q, k, positions, theta, scaling)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:  # gate[..., F], up[..., F]
    if _takes_triton("swiglu", gate):
        from kernels import swiglu_triton

        return swiglu_triton.swiglu(gate, up)
    return reference.swiglu(gate, up)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:  # q[T,H,E], k[T,K,E], v[T,K,E], cu_seqlens[n+1] -> [T,H,E]
    if _takes_triton("attention", q):
        from kernels import attention_triton

        return attention_triton.attention(q, k, v, cu_seqlens, max_seqlen)
    return attention_by_segment.attention(q, k, v, cu_seqlens, max_seqlen)


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, scored: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # hidden[T,D], weight[V,D], labels[T] -> [T] each
    """(nll, lse, right): float32, float32, bool; 0 and False where the label is -100. `scored[n]`
    are the places of all other labels, where the caller knows them; else the host waits for a GPU
    to find them."""
    if _takes_triton("linear_nll", hidden):
        from kernels import linear_nll_triton

        return linear_nll_triton.linear_nll(hidden, weight, labels, scored)
    return linear_nll_chunked.linear_nll(hidden, weight, labels, scored)


def update_split(
    upper: Tensor, low: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor | None,
    **constants: object,
) -> None:  # fmt: skip
    """A step of AdamW, in place, of weights in two halves; all [n]. split_adamw.adamw() says what
    the constants are."""
    if _takes_triton("update_split", upper):
        from kernels import split_adamw_triton

        split_adamw_triton.adamw(upper, low, grad, mean, square, scale, **constants)
    else:
        split_adamw.adamw(upper, low, grad, mean, square, scale, **constants)
