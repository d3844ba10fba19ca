"""An oracle for any loss: what a step must give, from the formula, one example after another.

    check_loss(pool, config, data, make_loss, formula)

`make_loss` is what a script would hand to fit(). `formula` is written by you, from the paper, for
one example: it gets the float64 logits of each of its segments and their labels, and returns the
example's loss and its metrics. The harness runs the step as fit() does, packed into rows of several
sizes, on 1, 2 and 4 ranks, with two copies of the model, with ranks that have only fillers, and
with an epoch's short last step.
Loss, gradients and metrics must be those of the formula in each of these layouts; a metric that the
formula leaves out must be the same in all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import DPO, SFT
from nanomed.distributed import Sharing, World
from nanomed.model.decoder import Aquila
from nanomed.run.log import Meter
from nanomed.training.step import Loss, reduced, train_step
from tests.training.test_exactness import Recorder, assert_same_gradients, sharded

# (ranks, tokens of a row at most, how the model is shared): one row; many rows; ranks that share;
# two copies on two ranks each. Of an epoch's short last step one row: other ranks, and the other
# copy, have fillers.
ONE_ROW, COPIES = (1, 4096, Sharing()), (4, 96, Sharing(copies=2))
LAYOUTS = [ONE_ROW, (1, 96, Sharing()), (2, 200, Sharing(once=True)), COPIES]
OF_THE_LAST = [ONE_ROW, (2, 4096, Sharing()), (4, 4096, Sharing(copies=2))]
BATCH = 8
CLOCK = ("tokens_per_s", "peak_memory_gb")  # what a step logs and depends on no loss


class Answer(NamedTuple):
    """One segment of an example, as the model sees it alone."""

    logits: Tensor  # [n,V] float64, of the places that have a label
    labels: Tensor  # [n]


# (the example's index, its segments) -> (its loss, {metric: value or (value, count)})
Formula = Callable[[int, list[Answer]], tuple[Tensor, dict]]


def loader_of(world: World, data, micro_tokens: int) -> Loader:
    cls = DPO if len(data[0]) == 2 else SFT  # pairs share their prompts
    c = cls(batch_size=BATCH, micro_tokens=micro_tokens, seq_len=2, epochs=1)
    return Loader(c, data, world.rank, world.size, (np.arange(len(data)), np.arange(0)))


def packed_step(world, config, data, make_loss, micro_tokens: int, sharing: Sharing, step: int):
    """(gradients, logged values) of one step as fit() takes it."""
    c = SFT(batch_size=BATCH, micro_tokens=micro_tokens, seq_len=64, grad_clip=0.0, dropout=0.0)
    model = sharded(world, config, sharing=sharing)
    loader = loader_of(world, data, micro_tokens)
    recorder, meter = Recorder(model), Meter(config, world.size)
    result = train_step(c, model, recorder, loader, make_loss(), step, 1e-3, meter)
    return recorder.gradients, reduced(result, loader.divisor(step), meter)


def by_formula(config, data, formula: Formula, step: int):
    """(gradients, values) of the same step in float64, one example at a time."""
    model = Aquila(config).double()
    loader = loader_of(World(0, 1, torch.device("cpu"), mesh=None), data, 4096)
    divisor, values, counts = loader.divisor(step), {"loss": 0.0}, {}
    for i in loader.examples(step).tolist():
        answers = []
        for segment in data[i]:
            row = row_from([segment.ids], [segment.trained])
            has_label = row.labels >= 0
            answers.append(Answer(model(row, logits=True)[has_label], row.labels[has_label]))
        loss, metrics = formula(i, answers)
        (loss / divisor).backward()
        values["loss"] += loss.item()
        for name, value in metrics.items():
            value, count = map(torch.as_tensor, value if isinstance(value, tuple) else (value, 0))
            values[name] = values.get(name, 0.0) + value.item()
            counts[name] = counts.get(name, 0.0) + count.item()
    means = {name: v / (counts.get(name) or divisor) for name, v in values.items()}
    return [p.grad for p in model.parameters()], means


def check_loss(pool, config, data, make_loss: Callable[[], Loss], formula: Formula) -> None:
    """Raises AssertionError unless the loss is the formula, however its step is laid out."""
    last = -(-len(data) // BATCH) - 1
    assert len(data) % BATCH, "the last step must be a short one"
    for step, layouts in ((0, LAYOUTS), (last, OF_THE_LAST)):
        gradients, values = by_formula(config, data, formula, step)
        for n_ranks, *layout in layouts:
            for ours, logged in pool(n_ranks, packed_step, config, data, make_loss, *layout, step):
                assert_same_gradients(ours, gradients)
                # What the formula says nothing of must at least be the same in every layout.
                values = {name: logged[name] for name in logged if name not in CLOCK} | values
                for name, value in values.items():
                    assert logged[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def check_learned(first: dict, last: dict) -> None:
    """Every pair is preferred, and the loss has fallen by a third of where it started: true of any
    preference loss that was learned, whatever value it starts from."""
    assert last["rewards/accuracies"] == 1 and last["loss"] < first["loss"] * 2 / 3
