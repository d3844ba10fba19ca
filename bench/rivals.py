"""What a user could pick instead of each op of kernels/: a function of the same tensors for each.

Liger-Kernel and flash-attn are imported here alone, and only if they are installed.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ceilings import PAD
from bench.counts import every_logit, every_score
from kernels import reference
from kernels.attention_by_segment import causal_flag
from kernels.chunk import chunk_tokens

Works = dict[str, Callable]


def installed(module: str, name: str) -> Callable | None:
    """An attribute of a package that may be absent."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return None


def rmsnorm(compile: bool) -> Works:
    works = {"F.rms_norm": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5)}
    if compile:
        compiled = torch.compile(reference.rmsnorm, dynamic=False)
        works["torch.compile"] = lambda x, w: compiled(x, w, 1e-5)
    if liger := installed("liger_kernel.ops.rms_norm", "LigerRMSNormFunction"):
        works["Liger"] = lambda x, w: liger.apply(x, w, 1e-5)
    return works


def rope(
    positions: Tensor, theta: float, head_size: int, dtype: torch.dtype, compile: bool
) -> Works:
    half = torch.arange(head_size // 2, dtype=torch.float32, device=positions.device)
    angle = positions[:, None] / theta ** (2 * half / head_size)
    angle = torch.cat((angle, angle), -1)[:, None]  # [T,1,E]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def rotate_half(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """As transformers does it: tables once for all layers, then everything in q's dtype."""
        return turn(q), turn(k)

    works = {"rotate_half": rotate_half}
    if compile:
        compiled = torch.compile(reference.rope, dynamic=False)
        works["torch.compile"] = lambda q, k: compiled(q, k, positions, theta)
    return works


def swiglu(compile: bool) -> Works:
    works = {"sigmoid by hand": lambda gate, up: gate * torch.sigmoid(gate) * up}
    if compile:
        works["torch.compile"] = torch.compile(reference.swiglu, dynamic=False)
    if liger := installed("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"):
        works["Liger"] = liger.apply
    return works


def attention(cu_seqlens: Tensor, max_seqlen: int, dtype: torch.dtype, on_gpu: bool) -> Works:
    """SDPA knows no documents: it takes part where the row is one. The formula with all scores is
    for short rows."""
    works = {}
    if on_gpu and dtype in (torch.bfloat16, torch.float16):
        works |= _varlen_attn(cu_seqlens, max_seqlen)
    n = len(cu_seqlens) - 1
    if n == 1 and on_gpu:
        works["SDPA flash"] = lambda q, k, v: _sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)
        works["SDPA cuDNN"] = lambda q, k, v: _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
    if int(cu_seqlens[-1]) <= 4096:
        mask = document_mask(cu_seqlens)
        works["every score"] = lambda q, k, v: every_score(q, k, v, mask)
    if flash := installed("flash_attn", "flash_attn_varlen_func"):
        borders = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)
        longest = dict(max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
        works["flash-attn"] = lambda q, k, v: flash(q, k, v, **borders, **longest)
    return works


def _varlen_attn(cu_seqlens: Tensor, max_seqlen: int) -> Works:
    """With grouped keys and values as they are. The definition repeats them, which some torch that
    nanomed runs on needs; there the two are the same, and this one is left out."""
    varlen = installed("torch.nn.attention.varlen", "varlen_attn")
    flags = inspect.signature(varlen).parameters if varlen else {}
    if "enable_gqa" not in flags:
        return {}
    causal = causal_flag(flags)
    borders, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    return {
        "varlen_attn": lambda q, k, v: varlen(
            q, k, v, *borders, *longest, enable_gqa=True, **causal
        )
    }


def document_mask(cu_seqlens: Tensor) -> Tensor:  # [T,T] bool: who sees whom
    place = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    return (document[:, None] == document) & (place[:, None] >= place)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """Grouped keys and values as they are: repeating them would be work that is not attention's."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1,H or K,T,E]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def linear_nll(labels: Tensor, compile: bool) -> Works:
    works = {"every logit": lambda h, w: every_logit(h, w, labels)}
    if compile:
        compiled = torch.compile(every_logit, dynamic=False)
        works["torch.compile of every logit"] = lambda h, w: compiled(h, w, labels)
    path = "liger_kernel.ops.fused_linear_cross_entropy"
    if liger := installed(path, "LigerFusedLinearCrossEntropyFunction"):
        # The mean over tokens, not one value each; weight gradients summed in the weight's dtype.
        works["Liger (mean)"] = lambda h, w: liger.apply(h, w, labels)[0]
    works["its matmuls alone"] = HeadMatmuls.apply
    return works


class HeadMatmuls(torch.autograd.Function):
    """The three products of linear_nll, and nothing else: THIS COMPUTES NO LOSS, and its gradients
    are no gradients. It is the time below which no head goes that leaves its matmuls to torch:
    one in forward, three in forward and backward.

    Chunks, the workspace with padded rows and the float32 sum of dweight are those of
    kernels/linear_nll_triton.py. Its fourth product, the logits of all chunks but the last again,
    is not here: over several chunks, what that costs is in the difference."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:  # [T,D], [V,D] -> [T], zeros
        (t, d), v = hidden.shape, len(weight)
        ctx.logits = hidden.new_empty(chunk_tokens(t, d), -(-v // PAD) * PAD)[:, :v]
        for h in hidden.split(len(ctx.logits)):
            torch.mm(h, weight.T, out=ctx.logits[: len(h)])
        ctx.save_for_backward(hidden, weight)
        return hidden.new_zeros(t)

    @staticmethod
    @once_differentiable
    def backward(ctx, _) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        dhidden = torch.empty_like(hidden)
        dweight = torch.empty_like(weight, dtype=torch.float32)
        wide = {} if weight.dtype == dweight.dtype else {"out_dtype": dweight.dtype}  # CUDA only
        size = len(ctx.logits)
        for i, (h, dh) in enumerate(zip(hidden.split(size), dhidden.split(size), strict=True)):
            dz = ctx.logits[: len(h)]  # the last logits stand for every chunk's gradient
            torch.mm(dz, weight, out=dh)
            beta = float(i > 0)  # the first product overwrites, the others add
            torch.addmm(dweight, dz.T, h, beta=beta, out=dweight, **wide)
        # Not dweight, whose rounding to the weight's dtype is no matmul.
        return dhidden, torch.empty_like(weight)
