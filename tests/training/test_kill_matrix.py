"""Kill -9 at any moment, go on, and end with the very same bits: weights, optimizer, losses,
learning rates, examples, best checkpoint.

Most kills come from outside at a random time; the named points are those that chance would rarely
hit. All is compared with the run whose saves are blocking, whatever the killed one's are. The suite
takes a sample; `pytest -m slow tests/training/test_kill_matrix.py` the whole matrix.
"""

import json
import random
import time
from pathlib import Path

import pytest

from nanomed.run import checkpoint
from tests.forks import Group, server
from tests.killed import BESIDE_A_WRITER, N_STEPS, POINTS, STAGES, train

PATIENCE = 240  # seconds for a run of about one; the machine may be very busy
ENDS_WITH_THE_OTHERS = 60  # seconds in which a rank must end whose neighbour was killed
CLOCK = ("tokens_per_s", "peak_memory_gb")


@pytest.fixture(scope="module")
def forks():
    return server()


@pytest.fixture(scope="module")
def straight(forks, tmp_path_factory):
    """The folder of the run that nobody stops, by number of ranks and stage."""
    found = {}

    def of(n_ranks: int, stage: str) -> Path:
        if (n_ranks, stage) not in found:
            folder = tmp_path_factory.mktemp("straight") / f"{stage}-on{n_ranks}"
            group = Group(forks, n_ranks, train, str(folder), "", stage, "blocking")
            assert group.wait(PATIENCE) == [0] * n_ranks
            found[n_ranks, stage] = folder
        return found[n_ranks, stage]

    return of


def left_behind(folder: Path, n_ranks: int) -> dict:
    """All that two equal runs must agree on."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    examples = (folder / "examples-0.jsonl").read_text().splitlines()
    return {
        "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in lines],
        "weights and optimizer": [(folder / f"end-{r}").read_text() for r in range(n_ranks)],
        "examples": dict(json.loads(line) for line in examples),
        "best": (folder / "checkpoints/best").resolve().name,
        "latest": (folder / "checkpoints/latest").resolve().name,
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def saved_before(folder: Path) -> int:
    """The last step whose save had returned."""
    path = folder / "saved.txt"
    return int(path.read_text().split()[-1][5:]) if path.exists() else 0


def goes_on_as_if_nothing_had_been(forks, straight, folder: Path, n_ranks: int, stage: str, save):
    newest = checkpoint.newest(folder / "checkpoints")
    assert int(newest.name[5:] if newest else 0) >= saved_before(folder)  # steps lost: none
    again = Group(forks, n_ranks, train, str(folder), "", stage, save)
    assert again.wait(PATIENCE) == [0] * n_ranks
    wanted, got = left_behind(straight(n_ranks, stage), n_ranks), left_behind(folder, n_ranks)
    for name in wanted:
        assert got[name] == wanted[name], name
    assert wanted["latest"] == f"step-{N_STEPS:06d}"


def kill_at_a_random_time(
    forks, straight, folder: Path, n_ranks: int, seed: int, stage="sft", save="background"
):
    """Some milliseconds after some line of metrics.jsonl, however busy the machine is."""
    rng = random.Random(seed)
    held = rng.choice([0.0, 0.05])  # a step takes less
    group = Group(forks, n_ranks, train, str(folder), "", stage, save, held)
    n_lines, metrics = rng.randrange(N_STEPS + 3), folder / "metrics.jsonl"
    while n_lines and (not metrics.exists() or len(metrics.read_text().split("\n")) <= n_lines):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.06))
    victims = rng.choice([range(n_ranks), [rng.randrange(n_ranks)]])  # all, or one
    if not n_lines:  # a rank that waits for a group to form ends by torchrun's hand only
        victims = range(n_ranks)
    group.kill(*victims)
    codes = group.wait(ENDS_WITH_THE_OTHERS)
    assert None not in codes  # no rank waits for a dead one
    assert -9 in codes or codes == [0] * n_ranks  # or a fast run had ended before
    goes_on_as_if_nothing_had_been(forks, straight, folder, n_ranks, stage, save)


def kill_at_a_point(
    forks, straight, folder: Path, n_ranks: int, name: str, stage="sft", save="background"
):
    held = PATIENCE if name in BESIDE_A_WRITER else 0.0
    codes = Group(forks, n_ranks, train, str(folder), name, stage, save, held).wait(PATIENCE)
    assert -9 in codes and None not in codes and 0 not in codes
    goes_on_as_if_nothing_had_been(forks, straight, folder, n_ranks, stage, save)


SAVES = ["blocking", "background"]
OTHERS = sorted(set(STAGES) - {"sft"})


@pytest.mark.parametrize("seed", [5, 6])  # two ranks and one
def test_killed_at_a_random_time(forks, straight, tmp_path, seed):
    kill_at_a_random_time(forks, straight, tmp_path / "run", 1 + seed % 2, seed)


# point -> (ranks, saves)
IN_THE_SUITE = {
    "between shards and manifest": (2, "background"),
    "between manifest and rename": (1, "blocking"),
    "between rename and latest": (1, "background"),
    "in the middle of validation": (1, "blocking"),
    "between the note and best": (1, "background"),
    "while an old checkpoint is deleted": (1, "background"),
    "in the middle of accumulation": (1, "background"),
    "a step, while shards are written": (2, "background"),
    "a validation is over, its save is not": (1, "background"),
}


@pytest.mark.parametrize("name", IN_THE_SUITE)
def test_killed_at_a_named_point(forks, straight, tmp_path, name):
    n_ranks, save = IN_THE_SUITE[name]
    kill_at_a_point(forks, straight, tmp_path / "run", n_ranks, name, save=save)


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("seed", range(100, 120))
def test_the_whole_matrix_random_times(forks, straight, tmp_path, n_ranks, seed, save):
    kill_at_a_random_time(forks, straight, tmp_path / "run", n_ranks, seed, save=save)


@pytest.mark.slow
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", POINTS)
def test_the_whole_matrix_named_points(forks, straight, tmp_path, n_ranks, name, save):
    kill_at_a_point(forks, straight, tmp_path / "run", n_ranks, name, save=save)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("name", BESIDE_A_WRITER)
def test_the_whole_matrix_beside_a_writer(forks, straight, tmp_path, n_ranks, name):
    kill_at_a_point(forks, straight, tmp_path / "run", n_ranks, name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHERS)
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("seed", range(200, 206))
def test_the_whole_matrix_other_stages(forks, straight, tmp_path, n_ranks, seed, stage):
    kill_at_a_random_time(forks, straight, tmp_path / "run", n_ranks, seed, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHERS)
@pytest.mark.parametrize("name", ["between shards and manifest", "in the middle of accumulation"])
def test_the_whole_matrix_other_stages_named_points(forks, straight, tmp_path, name, stage):
    kill_at_a_point(forks, straight, tmp_path / "run", 2, name, stage)
