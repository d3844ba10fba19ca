"""The five ops by their formulas, in plain PyTorch: what an op means, and what tests hold it to.

rmsnorm, rope and swiglu run like this wherever Triton does not. Attention and the loss would need
a [T,T] and a [T,V] tensor like this: they run as attention_by_segment.py and linear_nll_chunked.py.

Shapes: T tokens of a packed row, D model width, F feed-forward width, H query heads,
K key/value heads (H is a multiple of K), E head size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., D] / rms(x) * weight[D], statistics in float32 (Zhang and Sennrich 2019, eq. 4).

    The normalised value is rounded to x's dtype before the weight, as Llama does.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, scaling: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:  # q[T,H,E], k[T,K,E], positions[T]
    """Rotary position embedding (Su et al. 2021, eq. 34), rotate-half layout: element i turns with
    element i + E/2 by the angle position * theta**(-2i/E). Angles are float32: bfloat16 has lost
    the phase after a few hundred positions."""
    half = q.shape[-1] // 2
    angle = positions.float()[:, None] / wavelengths(half, theta, scaling, q.device)  # [T, E/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [T, 1, E/2]

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().split(half, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return turn(q), turn(k)


def wavelengths(
    half: int, theta: float, scaling: tuple[float, ...], device: torch.device
) -> Tensor:
    """theta**(2i/E) for i < E/2 [E/2]: positions per radian, float32.

    `scaling`, Llama 3.1's (factor, low, high, original), makes a model of `original` positions one
    of `factor` times as many. An element that makes fewer than `low` whole turns in `original`
    positions is slowed down `factor` times; one that makes more than `high` stays as it is; between
    the two the speeds are mixed."""
    length = theta ** (torch.arange(half, dtype=torch.float32, device=device) / half)
    if scaling:
        factor, low, high, original = scaling
        turns = original / (2 * math.pi * length)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        length = length / (kept + (1 - kept) / factor)
    return length


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6)."""
    return F.silu(gate) * up


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:  # q[T,H,E], k[T,K,E], v[T,K,E], cu_seqlens[n+1] -> [T,H,E]
    """Causal softmax attention (Vaswani et al. 2017, eq. 1) within each segment: segment i is
    tokens cu_seqlens[i] up to cu_seqlens[i+1], and sees nothing else. Query head h reads key/value
    head h // (H/K)."""
    place = torch.arange(len(q), device=q.device)
    segment = torch.bucketize(place, cu_seqlens[1:], right=True)
    seen = (segment[:, None] == segment) & (place[:, None] >= place)  # [T,T]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [T,H,E]
    scores = torch.einsum("the,she->hts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hts,she->the", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # hidden[T,D], weight[V,D], labels[T] -> [T] each
    """Of each token's logits z: nll = -log softmax(z)[label], lse = log(sum(exp(z))), both float32,
    and right, whether no logit is larger than the label's; 0 and False where the label is -100."""
    learned = labels >= 0
    logits = (hidden @ weight.T).float()  # [T,V]
    label_logit = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    lse = logits.logsumexp(-1) * learned
    return lse - label_logit * learned, lse, (label_logit == logits.amax(-1)) & learned
