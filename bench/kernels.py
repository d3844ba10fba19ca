"""The five ops against what a user could pick instead: correct first, then time.

    python -m bench.kernels [--quick] [--ops rmsnorm attention] [--tokens 8192 32768]
    python -m bench.kernels --ops layer                                a layer of the model
    TRITON_INTERPRET=1 python -m bench.kernels --parity --tokens 64    the Triton kernels, on a CPU

On a GPU `triton` stands against `definition` (--kernels reference), torch.compile of it, PyTorch's
own fused ops and, where installed, Liger-Kernel and flash-attn, at AquilaMed's shapes in bfloat16;
of a layer also `auto`, which is what a run picks. On a CPU the definition stands against PyTorch at
tiny shapes.

An op whose error is more than twice PyTorch's in the same dtype is not timed. Rates are those of
the bytes and operations that bench/counts.py counts, as shares of a copy's and a matmul's rate in
this run.
"""

import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._functorch import config

from bench import ceilings, counts
from bench.cases import Case, build, documents
from bench.measure import against_first, quartiles, show
from bench.setting import Setting, arguments, flags

PLAUSIBLE = 0.03  # relative error beyond which even bfloat16 is no excuse
PASSES = ("forward", "backward", "forward+backward")


# ---------------------------------------------------------------- correct first


def results_of(work: Callable, inputs: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    """Every output, then the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = _tuple(work(*leaves))
    douts = [d.to(out.dtype) for d, out in zip(douts, outs, strict=True)]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def distance(a: Tensor, truth: Tensor) -> tuple[float, float]:
    """||a - truth|| / ||truth||, and the largest difference over the largest value. Both are
    infinite if anything in `a` is not finite."""
    if not a.isfinite().all():
        return math.inf, math.inf
    off = a.to(truth.dtype) - truth
    return (off.norm() / truth.norm()).item(), (off.abs().max() / truth.abs().max()).item()


def gate(s: Setting, case: Case) -> bool:
    """Whether ours are right. Of each output and gradient the error may be twice that of the
    version they are held against, and the error of a single element four times, since one wrong
    element of millions hides in a norm. Errors below the dtype's own rounding count as that. A
    version that is itself wrong proves nothing: above PLAUSIBLE both fail."""
    shapes = [x.shape for x in _tuple(case.works["definition"](*case.inputs))]
    douts = [s.randn(*shape) for shape in shapes]
    high = torch.float32 if s.on_gpu else torch.float64
    truth = results_of(case.oracle, [x.to(high) for x in case.inputs], [d.to(high) for d in douts])
    theirs, found = case.held_against, {}
    for name in {*case.ours, theirs}:
        # The memory that the next outputs get holds NaN, so that an unwritten element shows.
        held = [torch.full_like(x, torch.nan, dtype=s.dtype) for x in truth for _ in range(2)]
        del held
        mine = results_of(case.works[name], case.inputs, douts)
        found[name] = [distance(a, b) for a, b in zip(mine, truth, strict=True)]
    least = torch.finfo(s.dtype).eps / 4
    largest = {name: max(norm for norm, _ in errors) for name, errors in found.items()}
    passed = True
    for ours in case.ours:
        worst = max(
            max(a[0] / max(b[0], least), a[1] / max(b[1], least) / 2)
            for a, b in zip(found[ours], found[theirs], strict=True)
        )
        if not largest[theirs] < PLAUSIBLE:
            worst = math.inf
        s.results.add(
            "parity", f"{case.op}: {ours}", [worst], "times their error",
            shapes=case.shapes, dtype=s.dtype, held_against=theirs,
            our_error=f"{largest[ours]:.1e}", their_error=f"{largest[theirs]:.1e}",
            gate="passed" if worst <= 2 else "FAILED",
        )  # fmt: skip
        passed &= worst <= 2
    return passed


# ---------------------------------------------------------------- then fast


def passes(op: str) -> tuple[str, ...]:
    """What is timed of it. linear_nll has no backward alone, which would run many times over one
    graph: the logits that its forward keeps serve one backward."""
    return PASSES[::2] if op == "linear_nll" else PASSES


def measure(s: Setting, case: Case, rates: dict[str, float]) -> None:
    """Times every version, forward alone and with backward. One that cannot run this row (a rival
    of another torch, or out of memory) is a line that says so."""
    for what in passes(case.op):
        calls, memory = {}, {}
        for version, work in case.works.items():
            try:
                calls[version] = call(work, case.inputs, what)
                memory[version] = peak_gib(s, calls[version])
            except Exception as error:
                if version in (*case.ours, "definition"):
                    raise
                calls.pop(version, None)
                s.results.add("kernel", f"{case.op} {what}: {version}", [],
                              shapes=case.shapes, dtype=s.dtype, note=said(error))  # fmt: skip
        add_times(s, case, what, calls, memory, rates)


def said(error: Exception) -> str:
    """Its kind and the start of its first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"


def call(work: Callable, inputs: list[Tensor], what: str) -> Callable[[], object]:
    """A pass of the work as a call without arguments. Its forward is run once: what compiles,
    compiles now. `backward` keeps the graph of that one forward. Inputs are copied, since some
    rivals' backward overwrites them (Liger's SwiGLU)."""
    train, kept = what != "forward", {}
    if what == "backward":
        # torch.compile's backward writes into what its forward saved, and refuses a kept graph.
        # Here it compiles again without that.
        torch.compiler.reset()
        kept = {"donated_buffer": False}
    leaves = [x.detach().clone().requires_grad_(train) for x in inputs]
    with torch.set_grad_enabled(train), config.patch(kept):
        outs = _tuple(work(*leaves))
    douts = [torch.randn_like(x) for x in outs]
    if what == "forward":
        return torch.no_grad()(lambda: work(*leaves))
    if what == "backward":
        return partial(torch.autograd.grad, outs, leaves, douts, retain_graph=True)
    return lambda: torch.autograd.grad(_tuple(work(*leaves)), leaves, douts)


def peak_gib(s: Setting, run: Callable[[], object]) -> float | None:
    """What a run takes beyond its inputs, and backward beyond the graph."""
    if not s.on_gpu:
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def add_times(s: Setting, case: Case, what: str, calls: dict, memory: dict, rates: dict) -> None:
    """Of one pass, by version: calls, the GiB of each, and what the machine does at most."""
    element = torch.finfo(s.dtype).bits // 8
    forward, backward = getattr(counts, case.op)(s.config, case.lengths, element)
    count = {"forward": forward, "backward": backward}.get(what, forward + backward)
    first = next(iter(calls))
    samples, faster = against_first(calls, s.rounds, 3, s.device)
    done, unit, most = count.bytes, "TB/s", rates["copy"]
    if count.flops:
        done, unit, most = count.flops, "TFLOP/s", rates["matmul"]
    for version in calls:
        rate = done / quartiles(samples[version])[1]
        s.results.add(
            "kernel", f"{case.op} {what}: {version}", samples[version],
            shapes=case.shapes, dtype=s.dtype,
            rate=f"{rate / 1e12:.3g} {unit}", of_ceiling=f"{rate / most:.0%}",
            **{f"{first} is faster by": faster[version]}, GiB=memory[version],
        )  # fmt: skip


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--ops", nargs="*", default=counts.OPS, choices=(*counts.OPS, "layer"))
    parser.add_argument("--parity", action="store_true", help="the gate alone")
    s, given = arguments(parser)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and not given.parity:
        parser.error("TRITON_INTERPRET=1 is for --parity: times of the interpreter mean nothing")
    rates = {} if given.parity else {"copy": ceilings.copy(s), "matmul": ceilings.matmul(s)}
    if rates:
        show(s.results.lines)
    failed = []
    for t, op in itertools.product(given.tokens, given.ops):
        for kind in ("chats", "one") if op == "attention" else ("chats",):
            known = len(s.results.lines)
            try:
                case = build(s, op, documents(t, kind), s.on_gpu or interpreted)
                if not gate(s, case):
                    failed.append(f"{op} over {t} tokens, {kind} (wrong)")
                elif not given.parity:
                    measure(s, case, rates)
            except Exception as error:  # the other ops' times are worth having
                traceback.print_exc()
                failed.append(f"{op} over {t} tokens, {kind} ({said(error)})")
            for _, lines in itertools.groupby(s.results.lines[known:], lambda line: line["kind"]):
                show([*lines])
    if failed:
        sys.exit("not timed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
