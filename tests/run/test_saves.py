"""Saves in the background: the very checkpoints and weights of blocking ones, whatever is slow,
fails or ends meanwhile."""

import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict

from nanomed import distributed
from nanomed.config import InputError
from nanomed.run import checkpoint, saves
from nanomed.run.log import RunFolder
from nanomed.training import trainer
from tests.forks import Group, server
from tests.killed import build, digest, loader_of, settings
from tests.run.test_checkpoint import trained


def train(world, out: str, hooks: tuple = (), **changes) -> dict:
    """A run of 8 steps with dropout that saves after each and validates after every third; what
    became of it. A hook (owner, name, function) makes of owner.name function(original, ...)."""
    fixed = {"epochs": 2, "save_every": 1, "eval_every": 3, "keep_last": 9, "save": "background"}
    c = settings(out, **{**fixed, **changes})
    run, model, optimizers, said = RunFolder(c, world), build(world), [], []
    run.print = said.append
    hooks = [*hooks, (trainer, "adamw", lambda f, *a: optimizers.append(f(*a)) or optimizers[-1])]
    before = [getattr(owner, name) for owner, name, _ in hooks]
    for original, (owner, name, function) in zip(before, hooks, strict=True):
        setattr(owner, name, lambda *a, f=function, o=original: f(o, *a))
    ending = None
    try:
        trainer.fit(c, model, loader_of(world, c), lambda scores, row: (scores.nll.sum(), {}), run)
    except (RuntimeError, InputError) as error:
        ending = str(error)
    finally:
        for original, (owner, name, _) in zip(before, hooks, strict=True):
            setattr(owner, name, original)
        run.close()
    warnings = [line for line in said if line.startswith("WARNING")]
    return {"end": digest(model, optimizers[0]), "warnings": warnings, "ending": ending}


@pytest.mark.parametrize(
    "every, steps", [((0, 3), [3, 6, 8]), ((2, 3), [2, 3, 4, 6, 8]), ((0, 0), [4, 8])]
)
def test_when_a_checkpoint_is_saved(world, tmp_path, monkeypatch, every, steps):
    """After every so many steps, at each validation and at the end, and at no other time; space is
    asked for as many."""
    seen = []
    monkeypatch.setattr(saves.Saver, "save", lambda self, step: seen.append(step))
    flags = dict(zip(("save_every", "eval_every"), every, strict=True))
    train(world, str(tmp_path / "x"), **flags)
    assert seen == steps
    c = settings("", epochs=2, keep_last=9, **flags)
    assert trainer._most_checkpoints(c, loader_of(world, c)) == len(steps)


def contents(folder: Path) -> dict:
    """All that is in a run's checkpoints: shards by their hash, notes, links. `.metadata`, and so
    the manifest, has a random number of DCP's."""
    found = {}
    for path in sorted((folder / "checkpoints").rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.resolve().name
        elif path.name == "manifest.json":
            checkpoint.verify(path.parent)
        elif path.is_file() and path.name != ".metadata":
            found[name] = checkpoint.described(path)["sha256"]
    return found


def blocking(world, out: str) -> dict:
    return train(world, out, save="blocking")


@pytest.fixture(scope="module")
def wanted(pool, tmp_path_factory):
    """(folder, results) of the run with blocking saves, by number of ranks."""
    found = {}

    def of(n_ranks: int) -> tuple[Path, list[dict]]:
        if n_ranks not in found:
            folder = tmp_path_factory.mktemp("blocking") / f"on{n_ranks}"
            found[n_ranks] = folder, pool(n_ranks, blocking, str(folder))
        return found[n_ranks]

    return of


# ---------------------------------------------------------------- the same checkpoints


def as_late_as_can_be(world, out: str, copies: bool = True) -> dict:
    """Each writer begins only when somebody waits for it: a step and perhaps a validation later."""
    awaited, threads, unfinished = threading.Event(), set(), set()

    def start(original, writer):
        awaited.clear()
        original(writer)

    def write(original, *arguments):
        threads.add(threading.current_thread().name)
        unfinished.add(len(list(arguments[1].parent.glob("*.unfinished"))))
        awaited.wait()
        original(*arguments)

    def wait(original, saver):
        awaited.set()
        original(saver)

    def take(original, host, tensors):
        original(host, tensors) if copies else setattr(host, "tensors", tensors)

    hooks = (
        *((saves.Writer, "start", start), (saves, "_write", write)),
        *((saves.Saver, "wait", wait), (saves.HostCopy, "take", take)),
    )
    return {**train(world, out, hooks), "threads": threads, "unfinished": unfinished}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_late_writer_saves_what_the_model_was(pool, wanted, tmp_path, n_ranks):
    """Bit for bit, though the model has been trained since; validations are noted on complete
    checkpoints, `best` points to one, and the end of the run waits."""
    results = pool(n_ranks, as_late_as_can_be, str(tmp_path / "x"))
    folder, straight = wanted(n_ranks)
    assert [r["end"] for r in results] == [r["end"] for r in straight]
    assert all(len(r["threads"]) == 8 and r["warnings"] == [] for r in results)
    assert all(r["unfinished"] == {1} for r in results)  # never two at once
    assert contents(tmp_path / "x") == contents(folder)
    assert len(contents(folder)) == 8 * (n_ranks + 1) + 3 + 2  # shards and state, notes, links


def test_without_a_copy_it_would_not(pool, wanted, tmp_path):
    """The comparison above can fail."""
    pool(1, as_late_as_can_be, str(tmp_path / "x"), False)
    got, straight = contents(tmp_path / "x"), contents(wanted(1)[0])
    same = [name for name in straight if got[name] == straight[name] and name.endswith("distcp")]
    assert same == ["checkpoints/step-000008/__0_0.distcp"]  # nothing was trained after it


def copied_twice(world) -> tuple[int, int, int, bool]:
    model, optimizer = trained(world)
    host, tensors = saves.HostCopy(), {"all": get_state_dict(model, optimizer)[1]["state"]}
    tensors["model"] = dict(model.named_parameters())
    host.take(tensors)
    before = {place: buffer.data_ptr() for place, buffer in host._buffers.items()}
    host.take(tensors)
    again = before == {place: buffer.data_ptr() for place, buffer in host._buffers.items()}
    mine = sum(buffer.nbytes for buffer in host._buffers.values())
    counts = 4 * len(list(model.parameters()))  # Adam's number of steps, for each
    return mine, counts, checkpoint.size_of(model), again


def test_what_the_copy_takes(pool):
    """12 bytes per parameter, shared among the ranks, allocated once."""
    found = pool(2, copied_twice)
    assert sum(mine - counts for mine, counts, _, _ in found) == found[0][2]
    assert all(again for *_, again in found)
    assert max(mine for mine, *_ in found) < 0.51 * sum(mine for mine, *_ in found)


# ---------------------------------------------------------------- what fails


def with_failing_writers(world, out: str) -> dict:
    """Four saves fail on one rank alone, each in another place, and the others succeed."""
    last, steps = world.rank == world.size - 1, {"now": 0}

    def begin(original, *arguments):
        steps["now"] = arguments[3]["step"]
        return original(*arguments)

    def fails(at: int, rank_fails: bool, error: Exception):
        def hook(original, *arguments):
            if steps["now"] == at and rank_fails:
                raise error
            return original(*arguments)

        return hook

    def late(original, *arguments):  # when rank 0 has long deleted what was unfinished
        if last and not world.is_main:
            time.sleep(0.1)
        return original(*arguments)

    hooks = (
        (shutil, "disk_usage", late),
        (saves, "begin", begin),
        (saves.HostCopy, "take", fails(2, last, RuntimeError("can't allocate memory"))),
        (FileSystemWriter, "write_data", fails(3, last, OSError(28, "No space left on device"))),
        (checkpoint, "described", fails(5, last, OSError(5, "Input/output error"))),
        (saves, "_complete", fails(6, world.is_main, ValueError("a mistake"))),
    )
    return train(world, out, hooks)


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2), pytest.param(4, marks=pytest.mark.slow)])
def test_a_failing_writer_on_one_rank_is_said_and_the_run_goes_on(pool, wanted, tmp_path, n_ranks):
    results = pool(n_ranks, with_failing_writers, str(tmp_path / "x"))
    assert [r["end"] for r in results] == [r["end"] for r in wanted(n_ranks)[1]]
    causes = {
        2: f"rank {n_ranks - 1}: RuntimeError: can't allocate memory",
        3: f"rank {n_ranks - 1}: OSError: [Errno 28] No space left on device",
        5: f"rank {n_ranks - 1}: OSError: [Errno 5] Input/output error",
        6: "rank 0: ValueError: a mistake",
    }
    for rank in results:
        assert rank["ending"] is None and len(rank["warnings"]) == 4
        for line, (step, cause) in zip(rank["warnings"], causes.items(), strict=True):
            assert line.startswith(f"WARNING: step {step} IS NOT SAVED: {cause} (")
    there = [path.name for path in (tmp_path / "x/checkpoints").iterdir()]
    assert sorted(there) == ["best", "latest", *(f"step-00000{n}" for n in (1, 4, 7, 8))]


def with_a_failing_evaluation(world, out: str) -> dict:
    def evaluate(original, *arguments):
        if arguments[-1] == 6:
            raise RuntimeError("sampling broke")
        return original(*arguments)

    def write(original, *arguments):
        time.sleep(0.2)
        original(*arguments)

    return train(world, out, ((trainer, "evaluate", evaluate), (saves, "_write", write)))


def test_an_exception_waits_for_the_writer(pool, tmp_path):
    (result,) = pool(1, with_a_failing_evaluation, str(tmp_path / "x"))
    assert result["ending"] == "sampling broke" and result["warnings"] == []
    assert checkpoint.newest(tmp_path / "x/checkpoints").name == "step-000006"


def launched(world, out: str) -> None:
    def write(original, *arguments):
        time.sleep(0.3)
        original(*arguments)

    distributed.launch(lambda: train(world, out, ((saves, "_write", write),), save_every=0))


def test_a_script_does_not_end_before_its_writers(tmp_path):
    """launch() ends by os._exit, which waits for no thread."""
    assert Group(server(), 2, launched, str(tmp_path / "x")).wait(60) == [0, 0]
    assert checkpoint.newest(tmp_path / "x/checkpoints").name == "step-000008"


# ---------------------------------------------------------------- at the same time


def restless(world, out: str, seed: int) -> dict:
    """Writers that begin and hash at random times, so that their exchanges meet the training's."""
    rng = random.Random(seed * 100 + world.rank)

    def delayed(original, *arguments):
        time.sleep(rng.choice([0, rng.uniform(0, 0.04)]))
        return original(*arguments)

    names = (saves, "_write"), (checkpoint, "described"), (saves, "_complete")
    return train(world, out, tuple((owner, name, delayed) for owner, name in names))


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_training_and_writing_at_the_same_time(pool, wanted, tmp_path, n_ranks):
    """20 runs, 160 saves: no deadlock, the same bits."""
    folder, straight = wanted(n_ranks)
    for seed in range(20):
        out = tmp_path / f"x{seed}"
        results = pool(n_ranks, restless, str(out), seed)
        assert [(r["end"], r["warnings"]) for r in results] == [(r["end"], []) for r in straight]
        assert contents(out) == contents(folder)
