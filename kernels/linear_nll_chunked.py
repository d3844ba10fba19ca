"""reference.linear_nll without a [T,V] tensor: the logits of one chunk of tokens exist at a time,
in forward and in backward. This is what runs where Triton does not.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunk import even

# Logits that exist at once on a CPU, half a GiB in float32: 883 tokens of V = 151,851, every token
# of a row for a small vocabulary. On a GPU tokens, 1.2 GB at this V: matmuls must be tall there.
LOGITS_CPU, CHUNK_CUDA = 2**27, 2048


def linear_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, scored: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # hidden[T,D], weight[V,D], labels[T] -> [T] each
    """The same as reference.linear_nll: (nll, lse, right). Raises ValueError if `scored` is wrong;
    on a GPU nobody would notice.

    Tokens without a label are skipped before the matmul. Backward begins with the last chunk, whose
    softmax is still there, and computes the logits of the others again.
    """
    if scored is None or not labels.is_cuda:
        found = (labels >= 0).nonzero()[:, 0]
        if scored is not None and not torch.equal(scored, found):
            raise ValueError("row.scored are not the places of row.labels; was one changed alone?")
        scored = found
    return _LinearNLL.apply(hidden, weight, labels, scored)


class _LinearNLL(torch.autograd.Function):
    """With p = softmax(z), z = W h: d lse / d z = p and d nll / d z = p - onehot(label), so
    dz = p (dlse + dnll) - onehot(label) dnll; then dh = W^T dz and dW = dz h^T."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, scored: Tensor):
        nll = hidden.new_zeros(labels.shape, dtype=torch.float32)
        lse, right = torch.zeros_like(nll), torch.zeros_like(labels, dtype=torch.bool)
        for part in scored.split(_chunk(len(scored), weight)):
            logits = (hidden[part] @ weight.T).float()
            target = logits.gather(1, labels[part, None])[:, 0]
            # In place: on a CPU, fresh memory of this size costs more than the arithmetic.
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            lse[part] = (total.log() + top)[:, 0]
            nll[part] = lse[part] - target
            right[part] = target == top[:, 0]
        ctx.save_for_backward(hidden, weight, labels, scored, lse)
        # At the peak of memory, the beginning of backward, a chunk has its place anyway.
        ctx.softmax = logits.div_(total) if len(scored) else None
        ctx.mark_non_differentiable(right)
        ctx.set_materialize_grads(False)  # what no loss used has None
        return nll, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll: Tensor | None, dlse: Tensor | None, _):
        hidden, weight, labels, scored, lse = ctx.saved_tensors
        dnll = torch.zeros_like(lse) if dnll is None else dnll
        dboth = dnll if dlse is None else dnll + dlse
        dhidden = torch.zeros_like(hidden)
        # float32 whatever the weight's dtype: bfloat16 sums over chunks lose small gradients.
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for part in reversed(scored.split(_chunk(len(scored), weight))):
            h = hidden[part]
            dlogits, ctx.softmax = ctx.softmax, None  # changed in place: it serves once
            if dlogits is None:
                dlogits = (h @ weight.T).float().sub_(lse[part, None]).exp_()  # softmax
            dlogits.mul_(dboth[part, None])
            dlogits[torch.arange(len(part), device=h.device), labels[part]] -= dnll[part]
            dlogits = dlogits.to(h.dtype)
            dhidden[part] = dlogits @ weight
            _add_matmul(dweight, dlogits.T, h)
        return dhidden, dweight.to(weight.dtype), None, None


def _chunk(n_tokens: int, weight: Tensor) -> int:
    return even(n_tokens, CHUNK_CUDA if weight.is_cuda else max(1, LOGITS_CPU // len(weight)))


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, with out in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b
