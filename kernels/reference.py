"""The plain PyTorch definition of every op: CPU path, test oracle, first page of the lesson.

Shapes: T tokens of a packed row, D model width, F feed-forward width, H query heads,
K key/value heads (H is a multiple of K), E head size, V vocabulary.
"""

import inspect
import math
from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunk import even

# Logits that exist at once on a CPU, half a GiB in float32: 883 tokens of V = 151,851, every token
# of a row for a small vocabulary. On a GPU tokens, 1.2 GB at this V: matmuls must be tall there.
LOGITS_CPU, CHUNK_CUDA = 2**27, 2048
# Tokens up to which torch's attention on a CPU takes less time in float32 than in bfloat16: half as
# much at 128 tokens (8 heads of 64, with its backward), a quarter more at 1,024.
SHORT = 256


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
    of `factor` times as many: what made fewer than `low` whole turns over these turns `factor`
    times slower, what made more than `high` turns as before, between the two speeds are mixed."""
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
    """Causal softmax attention within each segment: segment i is tokens cu_seqlens[i] up to
    cu_seqlens[i+1], and sees nothing else. Query head h reads key/value head h // (H/K)."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q, k, v, cu_seqlens, max_seqlen)
    # One call per segment: measured faster on CPU than any mask over the whole row.
    lengths = cu_seqlens.diff().tolist()
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_causal(*part) for part in parts])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dtype = q.dtype
    if len(q) <= SHORT and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or K, T, E]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1).to(dtype)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """torch's own FlashAttention over packed segments; no host sync, no mask."""
    from torch.nn.attention.varlen import varlen_attn

    # Not every torch that nanomed runs on takes fewer key/value heads than query heads here.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    causal = causal_flag(inspect.signature(varlen_attn).parameters)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal)


def causal_flag(flags: Container[str]) -> dict[str, object]:
    """Of varlen_attn, given the names of its parameters: it has changed its own. (-1, 0) is all of
    the past, nothing of the future."""
    return {"window_size": (-1, 0)} if "window_size" in flags else {"is_causal": True}


def linear_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token's logits z = weight @ hidden: (nll, lse, right), from hidden[T,D], weight[V,D],
    labels[T]. nll[T] float32 is -log softmax(z)[label], lse[T] float32 log(sum(exp(z))), right[T]
    bool whether no logit is larger than the label's; 0 and False where the label is -100.

    nll and lse have gradients. Tokens without a label are skipped before the matmul, and logits
    exist one chunk at a time. Backward begins with the last chunk, whose softmax is still there,
    and computes the logits of the others again.
    """
    return _LinearNLL.apply(hidden, weight, labels)


class _LinearNLL(torch.autograd.Function):
    """With p = softmax(z), z = W h: d lse / d z = p and d nll / d z = p - onehot(label), so
    dz = p (dlse + dnll) - onehot(label) dnll; then dh = W^T dz and dW = dz h^T."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor):
        trained = (labels >= 0).nonzero()[:, 0]  # the tokens that have a label
        nll = hidden.new_zeros(labels.shape, dtype=torch.float32)
        lse, right = torch.zeros_like(nll), torch.zeros_like(labels, dtype=torch.bool)
        for part in trained.split(_chunk(len(trained), weight)):
            logits = (hidden[part] @ weight.T).float()
            target = logits.gather(1, labels[part, None])[:, 0]
            # In place: on a CPU, fresh memory of this size costs more than the arithmetic.
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            lse[part] = (total.log() + top)[:, 0]
            nll[part] = lse[part] - target
            right[part] = target == top[:, 0]
        ctx.save_for_backward(hidden, weight, labels, trained, lse)
        # At the peak of memory, the beginning of backward, a chunk has its place anyway.
        ctx.softmax = logits.div_(total) if len(trained) else None
        ctx.mark_non_differentiable(right)
        ctx.set_materialize_grads(False)  # what no loss used has None
        return nll, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll: Tensor | None, dlse: Tensor | None, _):
        hidden, weight, labels, trained, lse = ctx.saved_tensors
        dnll = torch.zeros_like(lse) if dnll is None else dnll
        dboth = dnll if dlse is None else dnll + dlse
        dhidden = torch.zeros_like(hidden)
        # float32 whatever the weight's dtype: bfloat16 sums over chunks lose small gradients.
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part in reversed(trained.split(_chunk(len(trained), weight))):
            h = hidden[part]
            dlogits, ctx.softmax = ctx.softmax, None  # changed in place: it serves once
            if dlogits is None:
                dlogits = (h @ weight.T).float().sub_(lse[part, None]).exp_()  # softmax
            dlogits.mul_(dboth[part, None])
            dlogits[torch.arange(len(part), device=h.device), labels[part]] -= dnll[part]
            dlogits = dlogits.to(h.dtype)
            dhidden[part] = dlogits @ weight
            _add_matmul(dweight, dlogits.T, h)
        return dhidden, dweight.to(weight.dtype), None


def _chunk(n_tokens: int, weight: Tensor) -> int:
    return even(n_tokens, CHUNK_CUDA if weight.is_cuda else max(1, LOGITS_CPU // len(weight)))


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, with out in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b
