"""Which checkpoint is the best one, and that all ranks read the same."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from nanomed.model.decoder import init_weights
from nanomed.run import checkpoint, saves
from nanomed.run.log import RunFolder
from nanomed.stages import stage
from tests.killed import settings
from tests.run.test_checkpoint import parts, trained


@pytest.mark.parametrize(
    "losses, best",
    [
        ([2.0, 1.0, 1.5], "step-000002"),
        ([1.0, 1.0], "step-000001"),
        ([math.nan, 2.0, 1.0], "step-000003"),
        ([2.0, math.nan, -math.inf], "step-000001"),
        ([math.nan, math.inf], None),
    ],
)
def test_a_validation_loss_that_is_not_finite_is_never_the_best(tmp_path, losses, best):
    """min() keeps a NaN that comes first. What is written is JSON, which has no NaN."""
    (tmp_path / "best").symlink_to("step-000001")  # as an earlier version pointed it
    for step, loss in enumerate(losses, 1):
        saved = tmp_path / f"step-{step:06d}"
        saved.mkdir()
        checkpoint.mark_validated(saved, loss)
        json.loads((saved / "validation.json").read_text(), parse_constant=pytest.fail)
    assert (os.readlink(tmp_path / "best") if (tmp_path / "best").exists() else None) == best


def test_without_a_best_checkpoint_the_newest_is_taken_and_said(world, tmp_path, capsys):
    run = RunFolder(settings(str(tmp_path / "run")), world)
    model, optimizer = trained(world)
    saved = saves.save(run.checkpoints, model, optimizer, {"step": 3})
    wanted = parts(model)
    for noted in (False, True):
        init_weights(model, seed=1)
        stage.load_best(model, run)
        assert all(map(torch.equal, wanted, parts(model)))
        assert ("no validation loss was finite" in capsys.readouterr().out) == noted
        checkpoint.mark_validated(saved, math.nan)
    run.append("metrics.jsonl", {"step": 3, "val_loss": math.nan})
    line = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 3, "val_loss": "nan"}
    run.close()


def each_to_its_own(world, folder: str) -> list[torch.Tensor]:
    """Rank 1's machine still sees where `best` led before it moved."""
    folder, resolve = Path(folder), Path.resolve
    model, optimizer = trained(world)
    for step in (1, 2):
        init_weights(model, seed=step)
        saves.save(folder, model, optimizer, {"step": step})
    if world.is_main:
        checkpoint.point(folder / "best", folder / "step-000002")
    torch.distributed.barrier()
    wanted = parts(model)
    if world.rank == 1:
        stale = lambda path: resolve(path.with_name("step-000001"))  # noqa: E731
        Path.resolve = lambda path: stale(path) if path.name == "best" else resolve(path)
    init_weights(model, seed=3)
    checkpoint.load_weights(folder / "best", model)
    Path.resolve = resolve
    return [torch.equal(a, b) for a, b in zip(wanted, parts(model), strict=True)]


def test_where_best_leads_the_first_rank_alone_looks_up(pool, tmp_path):
    """A directory's names stay in NFS's cache for a minute: each rank by itself would mix the
    weights of two checkpoints, both of them complete."""
    assert all(all(equal) for equal in pool(2, each_to_its_own, str(tmp_path)))
