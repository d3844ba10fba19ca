"""Two copies of a model, each sharded over two ranks, as two nodes of two GPUs have them; gradients
summed over the ranks once a step. tests/training/test_exactness.py and the loss oracle hold their
gradients to float64; here it is whole runs."""

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
import torch

from nanomed import hf
from nanomed.distributed import Sharing, local
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run import checkpoint
from tests.training.test_exactness import metrics_of, sharded, train

COPIES = Sharing(copies=2, once=True)
BRIEF = {"lr": 1e-3, "save_every": 3, "eval_every": 3}
N_STEPS = 6  # an epoch has four: half of them and the save end in its middle


def parts(world, config) -> list[int]:
    """Elements of each parameter that this rank holds."""
    return [local(p).numel() for p in sharded(world, config, sharing=COPIES).parameters()]


def test_each_node_holds_a_whole_model(pool, small):
    first, second, third, fourth = pool(4, parts, small)
    whole = [p.numel() for p in Aquila(small).parameters()]
    assert first == third and second == fourth
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.fixture(scope="module")
def copies(pool, shallow, tmp_path_factory) -> Path:
    """A run saved in the background."""
    folder = tmp_path_factory.mktemp("copies") / "x"
    pool(4, train, shallow, str(folder), BRIEF | {"save": "background"}, (), N_STEPS, COPIES)
    return folder


def test_copies_learn_as_one_process(pool, shallow, tmp_path, copies):
    pool(1, train, shallow, str(tmp_path / "x"), BRIEF, (), N_STEPS)
    for ours, theirs in zip(metrics_of(copies), metrics_of(tmp_path / "x"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def goes_on(pool, shallow, folder: Path, sharing: Sharing | None, **changes) -> tuple[list, list]:
    """The metrics of the run in the folder without its last save, gone on with from the one before;
    and as they were."""
    wanted = metrics_of(folder)
    checkpoint.delete(checkpoint.newest(folder / "checkpoints"))
    changes = BRIEF | {"resume": "latest", **changes}
    pool(4, train, shallow, str(folder), changes, (), N_STEPS, sharing)
    found = metrics_of(folder)
    assert len(found) == len(wanted) and found[-1]["step"] == N_STEPS
    return found, wanted


def test_one_copy_goes_on_with_a_save_of_copies(pool, shallow, tmp_path, copies):
    shutil.copytree(copies, tmp_path / "x", symlinks=True)
    for ours, theirs in zip(*goes_on(pool, shallow, tmp_path / "x", None), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("first, save", [(COPIES, "background"), (None, "blocking")])
def test_copies_go_on(pool, shallow, tmp_path, first, save):
    """With a save of one copy on four ranks the losses stay within 1e-5; of as many copies, they
    and the dropout are the same bit for bit."""
    changes = {"save": save, "dropout": 0.2 if first else 0.0}
    pool(4, train, shallow, str(tmp_path / "x"), BRIEF | changes, (), N_STEPS, first)
    found = goes_on(pool, shallow, tmp_path / "x", COPIES, **changes)
    for ours, theirs in zip(*found, strict=True):
        assert ours == (theirs if first else pytest.approx(theirs, rel=1e-5))


def export_of_copies(world, config, tokenizer, folder):
    """The other copy's ranks come late: by then the first could have written all by itself."""
    model = sharded(world, config, seed=3, sharing=COPIES)
    until = time.monotonic() + (1 if world.rank > 1 else 0)
    while time.monotonic() < until and not Path(folder).exists():
        time.sleep(0.01)
    hf.export(model, tokenizer, folder, torch.float32)
    torch.distributed.barrier()


def test_copies_export_one_model(pool, small, encoder, tmp_path):
    config = dataclasses.replace(small, vocab_size=encoder.tokenizer.vocab_size)
    pool(4, export_of_copies, config, encoder.tokenizer, str(tmp_path / "x"))
    loaded, wanted = pretrained.load(tmp_path / "x"), Aquila(config)
    init_weights(wanted, seed=3)
    for (name, a), b in zip(loaded.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b), name
