"""reference.attention without a [T,T] tensor, by torch's own fused attention: one call for each
segment on a CPU, one for the whole row on a GPU."""

import inspect
from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens up to which torch's attention on a CPU takes less time in float32 than in bfloat16: half as
# much at 128 tokens (8 heads of 64, with its backward), a quarter more at 1,024.
SHORT = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:  # q[T,H,E], k[T,K,E], v[T,K,E], cu_seqlens[n+1] -> [T,H,E]
    """The same as reference.attention."""
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

    parameters = inspect.signature(varlen_attn).parameters
    flags = causal_flag(parameters)
    if "enable_gqa" in parameters:
        flags["enable_gqa"] = True
    else:  # an older torch takes as many key/value heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **flags)


def causal_flag(flags: Container[str]) -> dict[str, object]:
    """Of varlen_attn, given the names of its parameters: it has changed its own. (-1, 0) is all of
    the past, nothing of the future."""
    return {"window_size": (-1, 0)} if "window_size" in flags else {"is_causal": True}
