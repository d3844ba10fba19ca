"""What this machine can do at most: copying, and matmuls of AquilaMed's shapes on random data.

    python -m bench.ceilings [--device cuda] [--results FILE]

The head comes twice: AquilaMed's vocabulary of 151,851 is odd, so rows of a [T, V] tensor do not
start at multiples of 16 bytes, and cuBLAS may choose a slower matmul for them. With rows 151,936
elements apart (the next multiple of 128) they do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import interleaved, quartiles, show
from bench.setting import Setting, arguments, flags

PAD = 128  # elements


def copy(s: Setting) -> float:
    """Bytes per second of a copy within the device, read plus written."""
    source = s.randn(2**30 if s.on_gpu else 2**24).bfloat16()
    target = torch.empty_like(source)
    samples = interleaved({"": lambda: target.copy_(source)}, s.rounds, device=s.device)[""]
    rate = 2 * source.nbytes / quartiles(samples)[1]
    s.results.add(
        "ceiling", f"copy of {source.nbytes / 1e9:.2f} GB", samples, dtype=source.dtype,
        rate=f"{rate / 1e12:.3g} TB/s, read plus written",
    )  # fmt: skip
    return rate


def matmul(s: Setting) -> float:
    """Operations per second of a large square product."""
    n = 8192 if s.on_gpu else 512
    a, b = (s.randn(n, n) for _ in range(2))
    return _products(s, {f"matmul {n} x {n} x {n}": (lambda: a @ b, n**3)})[0]


def head(s: Setting, t: int) -> None:
    """The head's three matmuls, with rows of the logits V elements apart and padded."""
    v, d = s.config.vocab_size, s.config.d_model
    hidden, weight = (s.randn(n, d) for n in (t, v))
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
    works = {}
    for z in (s.randn(t, v), padded(t, v, s)):
        rows, count = f"rows {z.stride(0):,} apart", t * v * d
        works |= {
            f"head, logits, {rows}": (lambda z=z: torch.mm(hidden, weight.T, out=z), count),
            f"head, dhidden, {rows}": (lambda z=z: torch.mm(z, weight, out=hidden_grad), count),
            f"head, dweight, {rows}": (lambda z=z: torch.mm(z.T, hidden, out=weight_grad), count),
        }
    _products(s, works)


def padded(t: int, v: int, s: Setting) -> Tensor:
    """Random [t, v] whose rows start at multiples of PAD elements."""
    return s.randn(t, -(-v // PAD) * PAD)[:, :v]


def _products(s: Setting, works: dict[str, tuple[Callable, int]]) -> list[float]:
    """Operations per second of each work, given with its number of multiplications."""
    samples = interleaved({n: work for n, (work, _) in works.items()}, s.rounds, device=s.device)
    rates = []
    for name, seconds in samples.items():
        rates.append(2 * works[name][1] / quartiles(seconds)[1])
        rate = f"{rates[-1] / 1e12:.3g} TFLOP/s"
        s.results.add("ceiling", name, seconds, dtype=s.dtype, rate=rate)
    return rates


def main() -> None:
    s, given = arguments(flags(__doc__))
    copy(s)
    matmul(s)
    head(s, given.tokens[0])
    show(s.results.lines)


if __name__ == "__main__":
    main()
