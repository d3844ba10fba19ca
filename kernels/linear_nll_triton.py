"""The head's matmul and its negative log-likelihood; reference.linear_nll is the definition.

T tokens, n of them with a label, D model width, V vocabulary, C tokens of a chunk.

Matmuls are torch's own. Between them a kernel reads a chunk of logits once in forward, and in
backward overwrites it by its gradient; the definition makes several float32 copies of it instead.

AquilaMed's V, 151,851, is odd, and fast matmul kernels ask for sizes and rows at multiples of 16
bytes: on an H200 the three matmuls reached 90 to 150 of 800 TFLOP/s. So the weight takes part in
two blocks: its first 151,808 rows as they lie, and the 43 others padded with zeros to 128.

Backward needs the logits again. It begins with the last chunk, which forward leaves in the
workspace: a row of one chunk takes three matmuls. For other chunks the logits are computed a second
time, because all of them would take too much memory. Forward could compute each chunk's gradient at
once if it knew dnll; but in DPO dnll depends on both answers of a pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunk import chunk_tokens

BLOCK = 4096  # logits that a program holds at once
PAD = 128  # rows of the weight, and elements of a row of logits, come in multiples of it


# A chunk's tokens begin anywhere in their list: whether that is aligned must not compile a kernel
# again. The same of labels and gradients, which come from outside.
@triton.jit(do_not_specialize_on_alignment=["tokens_ptr", "labels_ptr"])
def _forward(
    logits_ptr, tokens_ptr, labels_ptr, nll_ptr, lse_ptr, right_ptr,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: lse = log(sum(exp(z))), nll = lse - z[label], right = (z[label] is the largest).
    The sum is relative to the largest logit m so far; when a larger one comes, what was summed
    shrinks by exp(m_old - m)."""
    i = tl.program_id(0).to(tl.int64)  # i * STRIDE passes 2^31 from 14 thousand tokens
    logits_ptr += i * STRIDE
    m, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        # A row's padding is read with it: only a border at a multiple of 16 allows wide loads.
        z = tl.load(logits_ptr + v, mask=v < STRIDE, other=0).to(tl.float32)
        z = tl.where(v < V, z, -float("inf"))
        m_old, m = m, tl.maximum(m, tl.max(z))
        total = total * tl.exp(m_old - m) + tl.sum(tl.exp(z - m))
    lse = m + tl.log(total)
    token = tl.load(tokens_ptr + i)
    label = tl.load(labels_ptr + token)
    # A label outside the vocabulary, -100 too, becomes nan, which stops a run; it reads nobody's
    # memory.
    is_token = (label >= 0) & (label < V)
    z = tl.load(logits_ptr + label, mask=is_token, other=float("nan")).to(tl.float32)
    tl.store(nll_ptr + token, lse - z)
    tl.store(lse_ptr + token, lse)
    tl.store(right_ptr + token, z == m)


@triton.jit(do_not_specialize_on_alignment=["tokens_ptr", "labels_ptr", "dnll_ptr", "dboth_ptr"])
def _backward(
    logits_ptr, tokens_ptr, labels_ptr, dnll_ptr, dboth_ptr, lse_ptr,
    V: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token's logits z becomes their gradient, in place:

    dz = p dboth - onehot(label) dnll with p = softmax(z) = exp(z - lse), dboth = dlse + dnll"""
    i = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + i)
    label = tl.load(labels_ptr + token)
    dnll = tl.load(dnll_ptr + token)
    dboth = tl.load(dboth_ptr + token)
    lse = tl.load(lse_ptr + token)
    logits_ptr += i * STRIDE
    z = tl.load(logits_ptr + v, mask=v < STRIDE, other=0).to(tl.float32)
    z = tl.where(v < V, z, -float("inf"))
    dz = tl.exp(z - lse) * dboth - tl.where(v == label, dnll, 0.0)
    tl.store(logits_ptr + v, dz, mask=v < STRIDE)  # zeros into the padding


def _workspace(n_tokens: int, hidden: Tensor, weight: Tensor) -> Tensor:
    """Room for a chunk of logits, [C, V rounded up to PAD]."""
    chunk = chunk_tokens(n_tokens, weight.shape[1])
    return torch.empty(chunk, _stride(len(weight)), dtype=hidden.dtype, device=hidden.device)


def _stride(v: int) -> int:
    return -(-v // PAD) * PAD


def _blocks(weight: Tensor) -> list[tuple[slice, Tensor]]:
    """weight[V,D] in blocks of a multiple of PAD rows, each with its columns of the logits."""
    v = len(weight)
    whole = v // PAD * PAD
    blocks = [(slice(0, whole), weight[:whole])] if whole else []
    if whole < v:
        last = weight.new_zeros(PAD, weight.shape[1])
        last[: v - whole] = weight[whole:]
        blocks.append((slice(whole, whole + PAD), last))
    return blocks


def _compute_logits(logits: Tensor, h: Tensor, blocks: list) -> None:
    for columns, w in blocks:
        torch.mm(h, w.T, out=logits[:, columns])


def _launch_forward(v: int, logits: Tensor, tokens: Tensor, *of_tokens: Tensor) -> None:
    """logits[C, stride of V] of the tokens[C]; labels, nll, lse, right, each [T]: writes the
    tokens' places of the last three."""
    _forward[(len(tokens),)](logits, tokens, *of_tokens, **_tile(v))


def _launch_backward(v: int, logits: Tensor, tokens: Tensor, *of_tokens: Tensor) -> None:
    """logits[C, stride of V] of the tokens[C] become their gradient; labels, dnll, dboth, lse, each
    [T]."""
    tile = _tile(v)
    grid = len(tokens), triton.cdiv(tile["STRIDE"], tile["BLOCK"])
    _backward[grid](logits, tokens, *of_tokens, **tile)


def _tile(v: int) -> dict[str, int]:
    block = min(BLOCK, triton.next_power_of_2(v))
    tile = {"V": v, "STRIDE": _stride(v), "BLOCK": block}
    return {**tile, "num_warps": 8, "enable_fp_fusion": True}


def _matmul(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or out += a @ b, with out in float32: the product is never rounded to a and b's
    dtype."""
    dtype = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **dtype)
    else:
        torch.mm(a, b, out=out, **dtype)


def _backward_matmuls(
    dweight: Tensor, dlogits: Tensor, h: Tensor, blocks: list, add: bool
) -> Tensor:
    """dweight[V,D] = dlogits[C, stride of V]^T h[C,D], or += that; returns dh[C,D] float32."""
    dh = torch.empty(h.shape, dtype=torch.float32, device=h.device)
    for i, (columns, w) in enumerate(blocks):
        dz, dw = dlogits[:, columns], dweight[columns]
        _matmul(dh, dz, w, add=i > 0)
        if len(dw) == len(w):
            _matmul(dw, dz.T, h, add)
        else:  # the padded block
            padded = torch.empty(w.shape, dtype=dw.dtype, device=dw.device)
            _matmul(padded, dz.T, h, add=False)
            dw.copy_(dw + padded[: len(dw)] if add else padded[: len(dw)])
    return dh


class _LinearNLL(torch.autograd.Function):
    """With dz from _backward: dh = W^T dz and dW = dz h^T."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, scored: Tensor):
        labels = labels.contiguous()
        nll = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        lse, right = torch.zeros_like(nll), torch.zeros_like(labels, dtype=torch.bool)
        workspace, blocks = _workspace(len(scored), hidden, weight), _blocks(weight)
        for part in _chunks(scored, workspace):
            logits = workspace[: len(part)]
            _compute_logits(logits, hidden[part], blocks)
            _launch_forward(len(weight), logits, part, labels, nll, lse, right)
        ctx.save_for_backward(hidden, weight, labels, scored, lse)
        # At the peak of memory, the beginning of backward, it has its place anyway.
        ctx.workspace = workspace
        ctx.mark_non_differentiable(right)
        ctx.set_materialize_grads(False)  # what no loss used has None
        return nll, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll: Tensor | None, dlse: Tensor | None, _):
        hidden, weight, labels, scored, lse = ctx.saved_tensors
        dnll = torch.zeros_like(lse) if dnll is None else dnll.contiguous()
        dboth = dnll if dlse is None else dnll + dlse
        # The kernel overwrites the logits, so they serve one backward pass.
        workspace, ctx.workspace = ctx.workspace, None
        has_logits = workspace is not None
        if not has_logits:
            workspace = _workspace(len(scored), hidden, weight)
        blocks, dhidden = _blocks(weight), torch.zeros_like(hidden)
        dweight, add = _place_of_gradient(weight)
        parts = _chunks(scored, workspace)
        for n, part in enumerate(reversed(parts)):
            h, dlogits = hidden[part], workspace[: len(part)]
            if n or not has_logits:
                _compute_logits(dlogits, h, blocks)
            _launch_backward(len(weight), dlogits, part, labels, dnll, dboth, lse)
            dh = _backward_matmuls(dweight, dlogits, h, blocks, add or n > 0)
            dhidden[part] = dh.to(h.dtype)
        if not (parts or add):
            dweight.zero_()
        workspace = dlogits = h = dh = None  # before the cast takes memory
        if _sums_where_they_lie(weight):
            weight.grad = dweight
            return dhidden, None, None, None
        return dhidden, dweight.to(weight.dtype), None, None


def _sums_where_they_lie(weight: Tensor) -> bool:
    """Whether gradients of this bfloat16 weight are summed in float32 (training/alone.py). Then a
    row's own is never whole: at the peak of memory that saves 4 V D bytes. A frozen weight has no
    such sum."""
    is_summed = weight.is_leaf and weight.requires_grad and weight.dtype != torch.float32
    return is_summed and weight.grad_dtype == torch.float32


def _place_of_gradient(weight: Tensor) -> tuple[Tensor, bool]:
    """(float32 [V,D], whether something is there to be added to). float32 whatever the weight's
    dtype: bfloat16 sums over chunks lose small gradients."""
    if _sums_where_they_lie(weight) and weight.grad is not None:
        return weight.grad, True
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device), False


def _chunks(tokens: Tensor, workspace: Tensor) -> list[Tensor]:
    """The tokens in parts that fit the workspace; none if there are none."""
    return list(tokens.split(len(workspace))) if len(tokens) else []


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, scored: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden[T,D], weight[V,D], labels[T] -> nll[T], lse[T] float32, right[T] bool; 0 and False
    where the label is -100. `scored[n]` are all other places."""
    if scored is None:
        scored = (labels >= 0).nonzero()[:, 0]
    return _LinearNLL.apply(hidden, weight, labels, scored)
