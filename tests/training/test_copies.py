"""Two copies of a model, each sharded over two ranks, as two nodes of two GPUs have them; gradients
summed over the ranks once a step. tests/training/test_exactness.py and the loss oracle hold their
gradients to float64; here it is whole runs."""

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from nanomed import hf
from nanomed.distributed import Sharing, local
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run import checkpoint
from tests.training.test_exactness import metrics_of, sharded, train

COPIES = Sharing(copies=2, once=True)


def parts(world, config) -> list[int]:
    """Elements of each parameter that this rank holds."""
    return [local(p).numel() for p in sharded(world, config, sharing=COPIES).parameters()]


def test_each_node_holds_a_whole_model(pool, small):
    first, second, third, fourth = pool(4, parts, small)
    whole = [p.numel() for p in Aquila(small).parameters()]
    assert first == third and second == fourth
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


@pytest.mark.parametrize(
    "first, second, save",
    [
        (COPIES, COPIES, "background"),
        (COPIES, None, "background"),
        (None, COPIES, "blocking"),
    ],
)
def test_a_run_of_copies_goes_on_as_any_other(pool, small, tmp_path, save, first, second):
    """A save of copies is read by one copy on four ranks, and that one's by copies: the losses stay
    within 1e-5. By as many copies: bit for bit."""
    changes = {"lr": 1e-3, "save": save, "dropout": 0.2 if first is second else 0.0}
    out = str(tmp_path / "x")
    pool(4, train, small, out, changes, (), 20, first)
    wanted = metrics_of(tmp_path / "x")
    checkpoint.delete(tmp_path / "x/checkpoints/step-000020")
    pool(4, train, small, out, changes | {"resume": "latest"}, (), 20, second)
    found = metrics_of(tmp_path / "x")
    assert len(found) == len(wanted) and found[-1]["step"] == 20
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == (theirs if first is second else pytest.approx(theirs, rel=1e-5))


def test_copies_learn_as_one_process(pool, small, tmp_path):
    for n_ranks, sharing in ((1, None), (4, COPIES)):
        pool(n_ranks, train, small, str(tmp_path / f"on{n_ranks}"), {"lr": 1e-3}, (), 20, sharing)
    alone, copies = (metrics_of(tmp_path / f"on{n}") for n in (1, 4))
    for ours, theirs in zip(copies, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


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
    loaded, wanted = hf.load(tmp_path / "x"), Aquila(config)
    init_weights(wanted, seed=3)
    for (name, a), b in zip(loaded.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b), name
