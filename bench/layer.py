"""One AquilaMed layer, forward and backward.

The Triton kernels, what a run picks (`auto`), the plain definitions and torch.compile of the plain
layer.

    python -m bench.layer [--quick] [--tokens 8192]

The row is packed medical chats. Thirty-two times the layer is most of a step.
"""

import copy
import math
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from bench import ceilings, counts
from bench.ceilings import randn
from bench.kernels import AGAIN, PLAUSIBLE, distance, documents, peak_gib, said
from bench.measure import interleaved, quartiles, ratio, shown, table
from bench.setting import Setting, arguments
from nanomed.batches.packing import Row, row_from
from nanomed.model.decoder import Layer

OURS = ("triton", "auto")  # auto: what a run has unless told otherwise, with torch's attention


def build(s: Setting, t: int) -> tuple[Layer, Row, Tensor]:
    """A layer with random weights, a row of t tokens, its input x[t, D]."""
    with torch.device("meta"):
        layer = Layer(s.model, recompute="none")
    layer = layer.to_empty(device=s.device).to(s.dtype)
    for name, param in layer.named_parameters():
        torch.nn.init.normal_(param, mean=float("norm" in name), std=0.02)
    row = row_from([[0] * n for n in documents(t, "chats")])
    return layer, row.to(s.device), randn(t, s.model.d_model, device=s.device, dtype=s.dtype)


def flops(s: Setting, lengths: list[int]) -> float:
    """Forward and backward: 6 operations a weight of a matmul and token, and attention's."""
    c = s.model
    weights = c.d_model * (2 * c.d_model + 2 * c.n_kv_heads * c.head_size + 3 * c.d_ff)
    forward, backward = counts.attention(c, lengths)
    return 6 * weights * sum(lengths) + forward.flops + backward.flops


def train(layer: Callable, x: Tensor, row: Row, dout: Tensor, params: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of x and of every weight."""
    x = x.detach().requires_grad_()
    out = layer(x, row)
    return [out.detach(), *torch.autograd.grad(out, [x, *params], dout)]


def truth_of(s: Setting, layer: Layer, x: Tensor, row: Row, dout: Tensor) -> list[Tensor]:
    """The plain layer with the same weights, in float32 on a GPU and float64 on a CPU."""
    high = torch.float32 if s.on_gpu else torch.float64
    copied = copy.deepcopy(layer).to(high)
    kernels.use("reference")
    return train(copied, x.to(high), row, dout.to(high), list(copied.parameters()))


def check(s: Setting, t: int, found: dict[str, list[Tensor]], truth: list[Tensor]) -> None:
    """Each of ours may be twice as far from the truth as the plain layer in the same dtype."""
    errors = {
        name: max(distance(a, b)[0] for a, b in zip(mine, truth, strict=True))
        for name, mine in found.items()
    }
    theirs = errors["definition"]
    wrong = []
    for ours in [name for name in errors if name in OURS] or ["definition"]:
        times = errors[ours] / max(theirs, torch.finfo(s.dtype).eps / 4)
        if not theirs < PLAUSIBLE:
            times = math.inf
        s.results.add(
            "parity", f"layer: {ours}", [times], "times their error", shapes={"T": t},
            dtype=s.dtype, held_against="definition", our_error=f"{errors[ours]:.1e}",
            their_error=f"{theirs:.1e}", gate="passed" if times <= 2 else "FAILED",
        )  # fmt: skip
        if not times <= 2:
            wrong.append(f"the layer with {ours} kernels is {times:.1f} times as wrong")
    if wrong:
        sys.exit(f"{'; '.join(wrong)}: not timed")


def versions(s: Setting, layer: Layer) -> dict[str, tuple[str, Callable]]:
    """(the kernels' backend, the layer) of each, ours first."""
    plain = {"definition": ("reference", layer)}
    if not s.on_gpu:
        return plain
    compiled = torch.compile(layer, dynamic=False)
    ours = {backend: (backend, layer) for backend in OURS}
    return {**ours, **plain, "torch.compile": ("reference", compiled)}


def main() -> None:
    s, given = arguments(__doc__)
    rate, t = ceilings.matmul(s), given.tokens[0]
    layer, row, x = build(s, t)
    dout, params = torch.randn_like(x), list(layer.parameters())
    calls, memory, found = {}, {}, {}
    for name, (backend, module) in versions(s, layer).items():

        def run(backend: str = backend, module: Callable = module) -> list[Tensor]:
            kernels.use(backend)
            return train(module, x, row, dout, params)

        try:
            found[name], memory[name], calls[name] = run(), peak_gib(s, run), run
        except Exception as error:
            if name == "definition":
                raise
            traceback.print_exc()
            s.results.add("layer", name, [], shapes={"T": t}, dtype=s.dtype, note=said(error))
    check(s, t, found, truth_of(s, layer, x, row, dout))
    ours = next(iter(calls))
    samples = interleaved({ours: calls[ours], AGAIN: calls[ours], **calls}, s.rounds, 3, s.device)
    count = flops(s, documents(t, "chats"))
    for name in calls:
        speed = count / quartiles(samples[name])[1]
        faster = ratio(samples[name], samples[ours], samples[AGAIN])
        s.results.add(
            "layer", name, samples[name], shapes={"T": t}, dtype=s.dtype,
            rate=f"{speed / 1e12:.3g} TFLOP/s", of_ceiling=f"{speed / rate:.0%}",
            **{f"{ours} is faster by": "" if name == ours else str(faster)},
            GiB=memory[name],
        )  # fmt: skip
    print(table([shown(line) for line in s.results.lines if line["kind"] == "layer"]))
    if s.on_gpu and "triton" not in calls:
        sys.exit("the layer with triton kernels does not run")


if __name__ == "__main__":
    main()
