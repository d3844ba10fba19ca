"""The five ops by their formulas in the dtype of their inputs, with nothing from kernels/.

What the parity gate takes for the truth, in float64 on a CPU and in float32 on a GPU against
bfloat16."""

import torch
from torch import Tensor
from torch.nn import functional as F


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def rope(q: Tensor, k: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Pairs (i, i + E/2) as complex numbers that are multiplied by exp(i angle), in float64."""
    half = q.shape[-1] // 2
    place = torch.arange(half, dtype=torch.float64, device=q.device)
    angle = positions.double()[:, None] * theta ** (-place / half)
    spin = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turn(x: Tensor) -> Tensor:
        z = torch.complex(x[..., :half].double(), x[..., half:].double()) * spin
        return torch.cat((z.real, z.imag), -1).to(x.dtype)

    return turn(q), turn(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One document after the other. PyTorch's kernels for float32 and float64 keep no scores."""
    lengths = cu_seqlens.diff().tolist()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = []
    for document in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = (x.transpose(0, 1)[None] for x in document)  # [1,H,n,E]
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def linear_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logp = (hidden @ weight.T).log_softmax(-1)
    return -logp.gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels >= 0)
