"""What a user could pick instead of each op of kernels/: functions that take what the op takes.

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
from bench.measure import installed
from bench.setting import Setting
from kernels import reference
from kernels.attention_by_segment import causal_flag
from kernels.chunk import chunk_tokens

Works = dict[str, Callable]


def compiled(s: Setting, function: Callable) -> Works:
    return {"torch.compile": torch.compile(function, dynamic=False)} if s.on_gpu else {}


def made_for_gpus(s: Setting, module: str, name: str) -> Callable | None:
    """A function of a package that takes no tensors of a CPU, and is perhaps not installed."""
    return installed(module, name) if s.on_gpu else None


def rmsnorm(s: Setting, eps: float) -> Works:
    works = {"F.rms_norm": lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps)}
    works |= compiled(s, reference.rmsnorm)
    if liger := made_for_gpus(s, "liger_kernel.ops.rms_norm", "LigerRMSNormFunction"):
        works["Liger"] = liger.apply
    return works


def rope(s: Setting, positions: Tensor, theta: float) -> Works:
    size = s.config.head_size
    half = torch.arange(size // 2, dtype=torch.float32, device=positions.device)
    angle = positions[:, None] / theta ** (2 * half / size)
    angle = torch.cat((angle, angle), -1)[:, None]  # [T,1,E]
    cos, sin = angle.cos().to(s.dtype), angle.sin().to(s.dtype)

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    # As transformers does it: tables once for all layers, then everything in q's dtype.
    works = {"rotate_half": lambda q, k, *_: (turn(q), turn(k))}
    return works | compiled(s, reference.rope)


def swiglu(s: Setting) -> Works:
    works = {"sigmoid by hand": lambda gate, up: gate * torch.sigmoid(gate) * up}
    works |= compiled(s, reference.swiglu)
    if liger := made_for_gpus(s, "liger_kernel.ops.swiglu", "LigerSiLUMulFunction"):
        works["Liger"] = liger.apply
    return works


def attention(s: Setting, cu_seqlens: Tensor, max_seqlen: int) -> Works:
    """SDPA knows no documents: it takes part where the row is one. The formula with all scores is
    for short rows."""
    works = {}
    varlen = installed("torch.nn.attention.varlen", "varlen_attn")
    flags = inspect.signature(varlen).parameters if varlen else {}
    # With grouped keys and values as they are. The definition repeats them, which some torch that
    # nanomed runs on needs; there the two are the same, and this one is left out.
    if s.on_gpu and s.dtype in (torch.bfloat16, torch.float16) and "enable_gqa" in flags:
        how = {"enable_gqa": True, **causal_flag(flags)}
        works["varlen_attn"] = lambda q, k, v, cu, n: varlen(q, k, v, cu, cu, n, n, **how)
    if len(cu_seqlens) == 2 and s.on_gpu:
        works["SDPA flash"] = lambda q, k, v, *_: _sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)
        works["SDPA cuDNN"] = lambda q, k, v, *_: _sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
    if int(cu_seqlens[-1]) <= 4096:
        mask = document_mask(cu_seqlens)
        works["every score"] = lambda q, k, v, *_: every_score(q, k, v, mask)
    if flash := made_for_gpus(s, "flash_attn", "flash_attn_varlen_func"):
        works["flash-attn"] = lambda q, k, v, cu, n: flash(q, k, v, cu, cu, n, n, causal=True)
    return works


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


def linear_nll(s: Setting, labels: Tensor) -> Works:
    works = {"every logit": every_logit}
    works |= {f"{name} of every logit": f for name, f in compiled(s, every_logit).items()}
    path = "liger_kernel.ops.fused_linear_cross_entropy"
    if liger := made_for_gpus(s, path, "LigerFusedLinearCrossEntropyFunction"):
        # The mean over tokens, not one value each; weight gradients summed in the weight's dtype.
        works["Liger (mean)"] = lambda h, w, labels: liger.apply(h, w, labels)[0]
    works["its matmuls alone"] = lambda h, w, labels: HeadMatmuls.apply(h, w)
    return works


class HeadMatmuls(torch.autograd.Function):
    """The three products of linear_nll, and nothing else: THIS COMPUTES NO LOSS, and its gradients
    are no gradients. It is the time below which no head goes that leaves its matmuls to torch:
    one in forward, three in forward and backward.

    Chunks, the workspace with padded rows and the float32 sum of dweight are those of
    kernels/linear_nll_triton.py; rows of the weight past a multiple of PAD are left out. Its fourth
    product, the logits of all chunks but the last again, is not here: over several chunks, what
    that costs is in the difference."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:  # [T,D], [V,D] -> [T], zeros
        (t, d), v = hidden.shape, len(weight) // PAD * PAD
        ctx.logits = hidden.new_empty(chunk_tokens(t, d), v + PAD)[:, :v]
        shape, weight = weight.shape, weight[:v]
        for h in hidden.split(len(ctx.logits)):
            torch.mm(h, weight.T, out=ctx.logits[: len(h)])
        ctx.save_for_backward(hidden, weight)
        ctx.shape = shape
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
        return dhidden, weight.new_empty(ctx.shape)
