"""What the head's loss would save if it made its gradient in forward.

    python -m bench.head [--tokens 8192 32768]

CPT and SFT sum the nll, so a chunk's gradient could be made while its logits are there: 3 matmuls.
linear_nll knows nothing of the loss, and computes the logits of all chunks but the last one again:
4 - 1/n matmuls in n chunks. On a GPU a chunk is as long as kernels/chunk.py says; on a CPU, where
half a GiB of logits is one chunk, the row is cut into 1, 2, 4 and 8.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from bench.kernels import distance
from bench.measure import against_first, shown, table
from bench.setting import Setting, arguments
from kernels import linear_nll_chunked
from kernels.chunk import chunk_tokens, even

OURS, OTHER = "linear_nll", "gradient in forward"
LIMIT = 2e-2  # norm-wise, in bfloat16; a chunk left out is off by more


class SumOfNLL(torch.autograd.Function):
    """hidden[T,D], weight[V,D], labels[T], all trained -> the sum of their nll."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        step = _triton_chunk(hidden, weight, labels, chunk) if hidden.is_cuda else _plain_chunk
        total = hidden.new_zeros((), dtype=torch.float32)
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for part in torch.arange(len(labels), device=hidden.device).split(chunk):
            h = hidden[part]
            nll, dlogits = step(h, weight, labels, part)
            total += nll
            dhidden[part] = dlogits @ weight
            _add_matmul(hidden)(dweight, dlogits.T, h)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dtotal, dweight.mul_(dtotal).to(ctx.dtype), None, None


def _plain_chunk(h: Tensor, weight: Tensor, labels: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = (h @ weight.T).float(), labels[part]
    target = logits.gather(1, labels[:, None])
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    nll = (total.log() + top - target).sum()
    logits.div_(total)[torch.arange(len(part), device=h.device), labels] -= 1
    return nll, logits.to(h.dtype)


def _triton_chunk(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Callable:
    from kernels import linear_nll_triton as triton

    workspace = triton._workspace(chunk, hidden, weight)
    ones = torch.ones(len(labels), device=hidden.device)

    def step(h: Tensor, weight: Tensor, labels: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.mm(h, weight.T, out=triton._logits(workspace, h, weight))
        nll, lse, right = (torch.zeros_like(x) for x in (ones, ones, labels.bool()))
        triton._launch_forward(logits, part, labels, nll, lse, right)
        triton._launch_backward(logits, part, labels, ones, ones, lse)
        return nll.sum(), logits

    return step


def _add_matmul(x: Tensor) -> Callable:
    if not x.is_cuda:
        return linear_nll_chunked._add_matmul
    from kernels.linear_nll_triton import _add_matmul

    return _add_matmul


def measure(s: Setting, t: int, chunk: int) -> None:
    """Forward and backward of both over t tokens."""
    v, d = s.model.vocab_size, s.model.d_model
    hidden = s.randn(t, d).requires_grad_()
    weight = (s.randn(v, d) * 2 * d**-0.5).requires_grad_()
    labels = torch.randint(v, (t,), device=s.device)
    works = {
        OURS: lambda: kernels.linear_nll(hidden, weight, labels)[0].sum(),
        OTHER: lambda: SumOfNLL.apply(hidden, weight, labels, chunk),
    }
    calls = {n: lambda f=f: torch.autograd.grad(f(), (hidden, weight)) for n, f in works.items()}
    for ours, theirs in zip(*(call() for call in calls.values()), strict=True):
        apart = distance(ours, theirs)[0]
        assert apart < LIMIT, f"gradients are {apart:.1e} apart: nothing is timed"
    samples, slower = against_first({OTHER: calls[OTHER], **calls}, s.rounds, 2, s.device)
    for name in calls:
        s.results.add(
            "head", name, samples[name], dtype=s.dtype, faster_by=slower[OURS] * (name == OTHER),
            shapes={"T": t, "D": d, "V": v, "chunks": -(-t // chunk)},
        )  # fmt: skip


def main() -> None:
    s, given = arguments(__doc__)
    for t in given.tokens:
        if s.on_gpu:
            kernels.use("triton")
            measure(s, t, chunk_tokens(t, s.model.d_model))
            continue
        for n in (1, 2, 4, 8):
            most = -(-t // n)
            linear_nll_chunked.LOGITS_CPU = most * s.model.vocab_size
            measure(s, t, even(t, most))
    print(table([shown(line) for line in s.results.lines]))


if __name__ == "__main__":
    main()
