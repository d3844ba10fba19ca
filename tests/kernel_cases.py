"""What every Triton op is held to, in the interpreter (float32) and on a GPU (bfloat16, too).

A case has an op's inputs in float64 and the op in PyTorch's own words, not ours. check() rounds
the inputs to the dtype asked for; the truth is the float64 result on the rounded inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS, THETA = 1e-5, 1e6


@dataclass
class Case:
    op: str
    inputs: tuple[Tensor, ...]  # float64; gradients of each are compared
    others: tuple  # what the op takes beside them
    truth: Callable[..., Tensor | tuple[Tensor, ...]]  # in float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rmsnorm(n: int, d: int = 100) -> Case:
    """A view of every row's middle: rows begin 8 elements further apart than they are long."""
    x, weight = 3 * randn(n, d + 8)[:, 5 : 5 + d], 1 + 0.3 * randn(d)

    def truth(x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    return Case("rmsnorm", (x, weight), (EPS,), truth)


def rope(n: int, h: int = 3, k: int = 1, e: int = 12, scaling: tuple = ()) -> Case:
    """Queries and keys are views of one packed projection; positions restart and go far."""
    q, k, _ = randn(n, h + 2 * k, e).split((h, k, k), 1)
    positions = torch.cat((torch.arange(n // 2), torch.arange(n - n // 2) * 37))

    def truth(q, k, positions, theta, scaling):
        half = q.shape[-1] // 2
        # Angles are float32 by definition; what is done with them is exact here.
        wavelengths = reference.wavelengths(half, theta, scaling, q.device)
        angle = (positions.float()[:, None] / wavelengths).double()
        spin = torch.polar(torch.ones_like(angle), angle)[:, None]
        turned = [torch.complex(x[..., :half], x[..., half:]) * spin for x in (q, k)]
        return tuple(torch.cat((z.real, z.imag), -1) for z in turned)

    return Case("rope", (q, k), (positions, THETA, scaling), truth)


def swiglu(n: int, f: int = 70) -> Case:
    """Halves of one packed gate|up matrix."""
    gate, up = (4 * randn(n, 2 * f)).chunk(2, 1)
    return Case("swiglu", (gate, up), (), lambda gate, up: F.silu(gate) * up)


def linear_nll(n: int, d: int = 20, v: int = 97, trained: float = 0.7) -> Case:
    """A share of the labels is -100, so is the last. Every fourth token points where its label's
    row of the weight does, so that this label is right."""
    generator = torch.Generator().manual_seed(n + v)
    hidden, weight = randn(n, d), randn(v, d)
    labels = torch.randint(v, (n,), generator=generator)
    hidden[1::4] = weight[labels[1::4]]
    labels[torch.rand(n, generator=generator) >= trained] = -100
    labels[-1] = -100

    def truth(hidden, weight, labels):
        logits, learned = hidden @ weight.T, labels >= 0
        nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
        return nll, logits.logsumexp(-1) * learned, logits.argmax(-1) == labels

    return Case("linear_nll", (hidden, weight), (labels,), truth)


CASES = {"rmsnorm": rmsnorm, "rope": rope, "swiglu": swiglu, "linear_nll": linear_nll}


def poison(monkeypatch) -> None:
    """Uninitialised memory holds nan: what a kernel does not write, or reads unwritten, is seen."""
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args, **kwargs) -> Tensor:
        out = make(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    return made


def run(op: Callable, inputs: tuple, others: tuple, douts: tuple | None = None):
    """(outputs, gradients of the inputs, incoming gradients); these are random, drawn once, and
    there is none for an output of booleans."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # with the strides of the views
    outputs = op(*leaves, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    numbers = [y for y in outputs if y.dtype != torch.bool]
    if douts is None:
        douts = tuple(randn(*y.shape, seed=i + 1).to(y) for i, y in enumerate(numbers))
    given = tuple(d.to(y) for d, y in zip(douts, numbers, strict=True))
    return [y.detach() for y in outputs], torch.autograd.grad(numbers, leaves, given), given


def error(ours: Tensor, truth: Tensor) -> float:
    """Relative, of the whole tensor; a single nan makes it nan."""
    truth = truth.double()
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def check(op: Callable, case: Case, dtype: torch.dtype = torch.float32, tolerance: float = 1e-6):
    """`op`, a Triton version, against the truth: outputs and gradients within `tolerance`; in
    bfloat16 within twice the error of the definition, made of PyTorch's own bfloat16 operations.
    Nothing that was given is changed."""
    inputs = tuple(like(x, dtype) for x in case.inputs)
    others = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in case.others)
    before = [x.clone() for x in inputs]
    outputs, gradients, douts = run(op, inputs, others)
    douts_before = [d.clone() for d in douts]
    ours = [*outputs, *gradients]
    assert all(map(torch.equal, inputs, before)) and all(map(torch.equal, douts, douts_before))

    exact = tuple(x.double() for x in inputs)
    truth = run(case.truth, exact, others, tuple(d.double() for d in douts))
    plain = run(getattr(reference, case.op), inputs, others, douts)
    for mine, true, usual in zip(ours, [*truth[0], *truth[1]], [*plain[0], *plain[1]], strict=True):
        assert mine.dtype == usual.dtype and mine.shape == usual.shape
        limit = tolerance if dtype == torch.float32 else 2 * error(usual, true) + 1e-6
        assert error(mine, true) <= limit, (case.op, error(mine, true), limit)


def check_same_bits(op: Callable, case: Case, dtype: torch.dtype = torch.float32) -> None:
    inputs = tuple(like(x, dtype) for x in case.inputs)
    others = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in case.others)
    outputs, gradients, douts = run(op, inputs, others)
    for _ in range(3):
        again = run(op, inputs, others, douts)
        assert all(map(torch.equal, [*outputs, *gradients], [*again[0], *again[1]]))


class Matmuls(TorchDispatchMode):
    """Counts them; `rows` is the most that one's left factor had."""

    n, rows = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_")
        if name in ("mm", "addmm"):
            self.n += 1
            self.rows = max(self.rows, len(args[name == "addmm"]))
        return function(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.nbytes)
        return out


def check_untrained_tokens_meet_no_matmul(op: Callable) -> None:
    """3 of 30 tokens are trained: linear_nll computes the logits of 3."""
    case = linear_nll(30)
    hidden, weight = (like(x, torch.float32) for x in case.inputs)
    labels = torch.full((30,), -100, device=DEVICE)
    labels[[4, 5, 28]] = 7
    with Matmuls() as seen:
        nll, lse, right = op(hidden, weight, labels)
    assert (seen.n, seen.rows) == (1, 3)
    for scores in (nll, lse):
        assert scores[[4, 5, 28]].all() and scores.count_nonzero() == 3
    assert not right[labels < 0].any()


def check_the_last_chunk_serves_once(op: Callable, n_chunks: int) -> None:
    """linear_nll's backward computes again the logits of all chunks but the last one, and in a
    second backward pass through the same graph those, too."""
    case = linear_nll(30, trained=1.0)
    hidden, weight = (like(x, torch.float32).requires_grad_() for x in case.inputs)
    labels = case.others[0].to(DEVICE)
    with Matmuls() as forward:
        nll = op(hidden, weight, labels)[0]
    with Matmuls() as first:
        wanted = torch.autograd.grad(nll.sum(), (hidden, weight), retain_graph=True)
    with Matmuls() as second:
        again = torch.autograd.grad(nll.sum(), (hidden, weight))
    assert (forward.n, first.n, second.n) == (n_chunks, 3 * n_chunks - 1, 3 * n_chunks)
    for ours, other in zip(again, wanted, strict=True):
        assert error(ours, other.double()) < 1e-6


def like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype on the device, its elements as far apart as they were (.to() would make a
    view dense)."""
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    out = torch.zeros(size, dtype=dtype, device=DEVICE).as_strided(x.shape, x.stride())
    return out.copy_(x)
