"""What this machine can do at most: copying, and matmuls of AquilaMed's shapes on random data.

    python -m bench.ceilings [--device cuda] [--results FILE]

The head comes three times: AquilaMed's vocabulary of 151,851 is odd, so rows of a [T, V] tensor do
not start at multiples of 16 bytes. With rows 151,936 elements apart (the next multiple of 128) they
do; but cuBLAS asks for sizes at multiples of 8, too, which the first 151,808 columns alone have.
"""

from collections.abc import Callable

import torch

from bench.measure import interleaved, quartiles, show
from bench.setting import Setting, arguments, flags

PAD = 128  # elements


def copy(s: Setting) -> float:
    """Bytes per second of a copy within the device, read plus written."""
    source = s.randn(2**30 if s.on_gpu else 2**24).bfloat16()
    target, n = torch.empty_like(source), 2 * source.nbytes
    works = {f"copy of {n / 2e9:.2f} GB": (lambda: target.copy_(source), n)}
    return _rates(s, works, "TB/s, read plus written", source.dtype)[0]


def matmul(s: Setting) -> float:
    """Operations per second of a large square product."""
    n = 8192 if s.on_gpu else 512
    a, b = (s.randn(n, n) for _ in range(2))
    return _rates(s, {f"matmul {n} x {n} x {n}": (lambda: a @ b, 2 * n**3)})[0]


def head(s: Setting, t: int) -> None:
    """The head's three matmuls: rows of the logits V elements apart, padded, and of those the
    columns up to a multiple of PAD."""
    v, d = s.config.vocab_size, s.config.d_model
    hidden, weight = (s.randn(n, d) for n in (t, v))
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
    padded, works = s.randn(t, -(-v // PAD) * PAD), {}
    for z in (s.randn(t, v), padded[:, :v], padded[:, : v // PAD * PAD]):
        n = z.shape[1]
        w, dw, count = weight[:n], weight_grad[:n], 2 * t * n * d
        about = f"{n:,} columns, rows {z.stride(0):,} apart"
        works |= {
            f"head, logits, {about}": (lambda z=z, w=w: torch.mm(hidden, w.T, out=z), count),
            f"head, dhidden, {about}": (lambda z=z, w=w: torch.mm(z, w, out=hidden_grad), count),
            f"head, dweight, {about}": (lambda z=z, dw=dw: torch.mm(z.T, hidden, out=dw), count),
        }
    _rates(s, works)


def _rates(
    s: Setting, works: dict[str, tuple[Callable, int]], unit: str = "TFLOP/s", dtype=None
) -> list[float]:
    """Bytes or operations per second of each work, given with their number."""
    samples = interleaved({n: work for n, (work, _) in works.items()}, s.rounds, device=s.device)
    rates = [works[name][1] / quartiles(seconds)[1] for name, seconds in samples.items()]
    for (name, seconds), rate in zip(samples.items(), rates, strict=True):
        said = f"{rate / 1e12:.3g} {unit}"
        s.results.add("ceiling", name, seconds, dtype=dtype or s.dtype, rate=said)
    return rates


def main() -> None:
    s, given = arguments(flags(__doc__))
    copy(s)
    matmul(s)
    head(s, given.tokens[0])
    show(s.results.lines)


if __name__ == "__main__":
    main()
