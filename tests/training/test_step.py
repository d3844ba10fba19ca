"""What a step and a validation cost beside their arithmetic: waits for the device, and memory."""

import sys
import weakref
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanomed.batches.packing import Row
from nanomed.run.log import Meter
from nanomed.training.optim import adamw
from nanomed.training.reference import answer_logps
from nanomed.training.step import evaluate, train_step
from tests.killed import SMALL, STAGES, build
from tests.training.test_exactness import Silent


def made(world, stage: str, n_rows: int):
    """(settings, model, optimizer, loader, loss) of a stage; its first step has about n_rows."""
    c, loader, loss = STAGES[stage](world, {"out": ""})
    tokens = int(loader.data.lengths_of(loader.examples(0)).sum())
    loader.micro_tokens = max(2 * c.seq_len, tokens // n_rows)
    model = build(world)
    return c, model, adamw(model, c.weight_decay), loader, loss


# ---------------------------------------------------------------- waits

SCALARS = ("item", "__int__", "__float__", "__bool__", "__index__")


def waits_of_a_step(world, stage: str, n_rows: int, monkeypatch) -> tuple[int, Counter]:
    """(number of rows, how often each file asks for a tensor's value): what a host can only answer
    once the device has computed it. "inside torch" are those that no Python line asks for.
    prompts.py is left out: its rows have not left the host, and a thread packs the next step's."""
    c, model, optimizer, loader, loss = made(world, stage, n_rows)
    found = Counter()

    def counted(name):
        original = getattr(torch.Tensor, name)

        def method(tensor, *arguments, **named):
            found[Path(sys._getframe(1).f_code.co_filename).name, name] += 1
            return original(tensor, *arguments, **named)

        return method

    n = len(loader.step(0))
    with monkeypatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as seen:
        for name in (*SCALARS, "tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, counted(name))
        train_step(c, model, optimizer, loader, loss, 0, 1e-3, Meter(SMALL, 1))
    events = Counter(event.name() for event in seen.profiler.kineto_results.events())
    asked = sum(n for (_, name), n in found.items() if name in SCALARS)
    for name in ("tolist", "numpy"):
        found.pop(("prompts.py", name), None)
    found["inside torch", "item"] = events["aten::_local_scalar_dense"] - asked
    found["inside torch", "nonzero"] = events["aten::nonzero"]  # also under x[mask]
    return n, found


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_waits_as_often_for_one_row_as_for_many(world, monkeypatch, stage):
    """But for what is known, on a CPU alone: linear_nll checks where the labels are (nonzero),
    attention reads the segments' lengths in each layer, and the log counts a row's tokens."""
    one, once = waits_of_a_step(world, stage, 1, monkeypatch)
    n, often = waits_of_a_step(world, stage, 8, monkeypatch)
    assert one == 1 and n >= 4
    known = Counter(
        {("inside torch", "nonzero"): 1, ("attention_by_segment.py", "tolist"): SMALL.n_layers}
    )
    known["log.py", "__int__"] = 2
    each_step = once - known
    assert each_step + Counter({wait: n * times for wait, times in known.items()}) == often
    in_our_files = {wait: times for wait, times in each_step.items() if wait[0] != "inside torch"}
    assert in_our_files == {("step.py", "tolist"): 1, ("step.py", "item"): 1}


# ---------------------------------------------------------------- memory


def peak_of(work) -> float:
    """MiB: the largest running sum of what torch's allocator gave and took back during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return np.cumsum(sizes).max() / 2**20


def copy_of(row: Row) -> Row:
    values = {f.name: getattr(row, f.name) for f in fields(row)}
    return Row(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@pytest.mark.parametrize("stage", STAGES)
def test_a_validation_takes_less_than_a_step_however_many_rows_it_has(world, stage):
    """In torch's allocator, above weights and moments, with the same row."""
    c, model, optimizer, loader, loss = made(world, stage, 1)
    meter = Meter(SMALL, 1)
    (row,) = loader.step(0)

    def step():
        train_step(c, model, optimizer, loader, loss, 0, 1e-6, meter)

    def validation(n_rows: int):
        loader.rows = lambda _: (copy_of(row) for _ in range(n_rows))
        evaluate(model, loader, loss, Silent(world), 0)

    step()  # makes the moments
    of_step = peak_of(step)
    # From the third row on: before, sums are not all there.
    few, many = (peak_of(lambda n=n: validation(n)) for n in (3, 12))
    assert few <= of_step and abs(many - few) <= 2**-10  # MiB: a number for each token is more
    assert len(row.tokens) > 2**8


def test_a_step_of_dpo_takes_the_memory_of_one_of_sft_and_its_reference_a_part(world):
    """On the same row. The reference pass keeps nothing for a backward pass."""
    c, model, optimizer, loader, dpo = made(world, "dpo", 1)
    sft = made(world, "sft", 1)[-1]

    def peak(loss) -> float:
        return peak_of(
            lambda: train_step(c, model, optimizer, loader, loss, 0, 1e-6, Meter(SMALL, 1))
        )

    peak(dpo)  # makes the moments
    assert peak(dpo) == pytest.approx(peak(sft), rel=0.01)
    assert peak_of(lambda: answer_logps(model, loader, world)) < peak(sft) / 3


@pytest.mark.parametrize("stage", STAGES)
def test_only_sums_leave_the_loop_and_one_row_is_in_it(world, stage):
    """A row goes once the next one is there, from the loader's packing on."""
    _, model, _, loader, loss = made(world, stage, 1)
    loader.val = np.tile(np.asarray(loader.val), 20)
    rows, there = [], []

    def noted(scores, row):
        rows.append(weakref.ref(row.tokens))
        there.append(sum(row() is not None for row in rows))
        total, metrics = loss(scores, row)
        for value in (total, *metrics.values()):
            assert all(x.ndim == 0 for x in (value if isinstance(value, tuple) else [value]))
        return total, metrics

    evaluate(model, loader, noted, Silent(world), 0)
    assert len(rows) >= 4 and max(there) == 1
