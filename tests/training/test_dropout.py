"""What a run with dropout says at its start, and that saying it changes nothing."""

import re

import pytest
import torch

from nanomed.distributed import full
from nanomed.run.log import RunFolder
from nanomed.training import dropout, trainer
from nanomed.training.dropout import dropout_cost
from tests.training.test_exactness import loader_of, next_token_loss, settings, sharded


def costs(world, config, dropout):
    """(with dropout, without), and (sum, tokens) of this rank's first row."""
    model = sharded(world, config, dropout=dropout)
    loader = loader_of(world, 61, settings(batch_size=16, micro_tokens=512))
    row = loader.step(0)[0]
    nll = model.eval()(row).nll
    return dropout_cost(model, loader), (nll.sum().item(), (row.labels >= 0).sum().item())


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_it_is_the_loss_of_the_first_row_of_every_rank(pool, small, n_ranks):
    results = pool(n_ranks, costs, small, 0.3)
    total, n = (sum(values) for values in zip(*(own for _, own in results), strict=True))
    for (dropped, whole), _ in results:
        assert whole == pytest.approx(total / n, rel=1e-6)
        assert dropped != whole and (dropped, whole) == results[0][0]


def run_of(world, config, dropout, out):
    """The screen of 3 steps, and the weights after them."""
    model = sharded(world, config, dropout=dropout)
    c = settings(batch_size=16, micro_tokens=512, dropout=dropout, out=str(out))
    run, lines = RunFolder(c, world), []
    run.print = lines.append
    trainer.fit(c, model, loader_of(world, 61, c, max_steps=3), next_token_loss, run)
    run.close()
    return "\n".join(lines), [full(p.detach()).clone() for p in model.parameters()]


def test_a_run_says_it_and_warns_of_much(world, small, tmp_path, monkeypatch):
    said, weights = run_of(world, small, 0.1, tmp_path / "measured")
    assert re.match(r"--dropout 0\.1 makes the loss of the first row 4\.\d+, without it 4\.", said)
    assert "dropout" not in run_of(world, small, 0.0, tmp_path / "without")[0]
    for dropped, warning in ((3.29, ""), (3.31, "WARNING: "), (float("nan"), "WARNING: ")):
        monkeypatch.setattr(dropout, "dropout_cost", lambda *_, x=dropped: (x, 3.0))
        said, others = run_of(world, small, 0.1, tmp_path / f"{dropped}")
        assert said.startswith(f"{warning}--dropout 0.1 makes") and ("--dropout 0 (" in said) == (
            warning != ""
        )
        assert all(map(torch.equal, weights, others))  # measuring changed nothing
