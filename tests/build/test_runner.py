"""Who does the work does not show in the result, nor does a kill at any moment."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from nanomed.build.files import whole, write_json
from nanomed.build.runner import Runner, mark, script
from nanomed.config import InputError
from tests.build.corpora import ROOT, build, command, corpus, digests, exam, kept
from tests.build.tasks import dies_once, fails, square

# ---------------------------------------------------------------- tasks of their own


def test_marks_are_in_order_and_what_has_one_is_not_done_again(tmp_path):
    with Runner("local", workers=2) as runner:
        said = runner.run(tmp_path, partial(square, folder=tmp_path), 7)
        assert [s["square"] for s in said] == [0, 1, 4, 9, 16, 25, 36]
        times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.txt")}
        mark(tmp_path, 3).unlink()
        runner.run(tmp_path, partial(square, folder=tmp_path), 7)
    changed = [p.name for p, t in times.items() if p.stat().st_mtime_ns != t]
    assert changed == ["3.txt"] and not list(tmp_path.glob("*.unfinished"))


def test_a_worker_that_is_killed_ends_the_run_and_the_next_one_goes_on(tmp_path):
    task = partial(dies_once, folder=tmp_path)
    with (
        Runner("local", workers=2) as runner,
        pytest.raises(InputError, match="a worker was killed"),
    ):
        runner.run(tmp_path, task, 6)
    assert not mark(tmp_path, 2).exists()
    with Runner("local", workers=2) as runner:
        assert [s["square"] for s in runner.run(tmp_path, task, 6)] == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_stops_the_run(tmp_path, workers):
    with Runner("local", workers) as runner, pytest.raises(InputError, match="record 7"):
        runner.run(tmp_path, partial(fails, folder=tmp_path), 400)
    assert 1 <= len(list(tmp_path.glob("*.done.json"))) < 400


def test_a_full_disk_leaves_the_json_that_was_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    write_json(tmp_path / "x.json", {"n": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "x.json", {"n": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"n": 1}


def test_an_unfinished_file_never_has_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "x") as file:
        file.write(b"half")
        file.flush()
        raise KeyboardInterrupt
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(number):
    def main():
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit, match=rf"error: {os.strerror(number)}.*same command goes on"):
        script(main)


def test_a_launcher_says_which_rank_this_is(monkeypatch):
    assert (Runner().engine, Runner().is_main) == ("local", True)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (Runner().engine, Runner().rank, Runner().n_ranks) == ("ranks", 2, 4)
    assert not Runner().is_main
    for name, value in {"ID": 14, "MIN": 10, "COUNT": 5, "STEP": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert (Runner().rank, Runner().n_ranks) == (2, 5)


def test_ray_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with Runner("ray") as runner, pytest.raises(InputError, match="pip install"):
        runner.run(tmp_path, partial(square, folder=tmp_path), 3)


# ---------------------------------------------------------------- a whole build


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> list[str]:
    files = corpus(tmp_path_factory.mktemp("raw"))
    exam(Path(files[0]).parent)
    return files


@pytest.fixture(scope="module")
def undisturbed(raw, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build(raw, out)
    assert len(list((out / "2-rules").glob("*.jsonl.gz"))) >= 4  # several shards
    assert 50 < len(kept(out)) < 200
    return digests(out)


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
every = int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
from nanomed.build import duplicates, labels, pipeline, report, runner, shards
n, rename = 0, runner.Path.rename
def dying(path, target):
    global n
    n += 1
    if n == every:
        os.kill(os.getpid(), 9)
    return rename(path, target)
runner.Path.rename = dying
import build_corpus
build_corpus.main()
"""


def test_killed_before_every_60th_file_it_leaves_the_same_bytes(raw, undisturbed, tmp_path):
    arguments = command(raw, tmp_path / "out", "--workers", "1")[2:]
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        # 59 files more each time: what was finished stays finished
        start = [sys.executable, "-c", KILLED, str(ROOT), "60", *arguments]
        codes.append(subprocess.run(start, capture_output=True, cwd=ROOT).returncode)
        assert len(codes) < 30
    assert codes[-1] == 0 and len(codes) > 3
    assert digests(tmp_path / "out") == undisturbed


def launched(raw: list[str], out: Path, engine: str) -> list[subprocess.Popen]:
    """The processes of a build under an engine."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if engine != "ranks":
        return [subprocess.Popen(command(raw, out, "--engine", engine, "--workers", "2"), **quiet)]
    places = [dict(os.environ, RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    return [subprocess.Popen(command(raw, out), env=place, **quiet) for place in places]


@pytest.mark.parametrize("engine", ["local", "ranks"])
def test_every_engine_leaves_the_same_bytes(raw, undisturbed, tmp_path, engine):
    processes = launched(raw, tmp_path / "out", engine)
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ranks", "ray"])
def test_killed_at_20_random_moments(raw, undisturbed, tmp_path, engine):
    """A worker, a rank or all of it, by kill -9; then the same command again, until it is done."""
    if engine == "ray":
        pytest.importorskip("ray")
    rng, kills, out = random.Random(engine), 0, tmp_path / "out"
    while True:
        processes = launched(raw, out, engine)
        until = time.monotonic() + rng.uniform(0.5, 6.0 if engine != "ray" else 30.0)
        while None in (codes := [p.poll() for p in processes]) and not any(codes):
            if kills < 20 and time.monotonic() >= until:  # after 20 kills it comes to its end
                break
            time.sleep(0.01)
        alive = [p for p in processes if p.poll() is None]
        if any(codes):  # a killed one's lock may last for seconds; anything else is a fault
            for process in alive:
                process.kill()
            said = [process.communicate()[1] for process in processes]
            assert not any(b"Traceback" in errors for errors in said), said
            continue
        if kills >= 20:
            break
        if not alive:  # it came to its end before its kill: begin again with some of its stages
            stages = sorted(out.glob("[0-9]-*"))
            for stage in stages[rng.randrange(len(stages)) :]:
                shutil.rmtree(stage)
            continue
        victims = children(alive[0].pid) if engine == "local" and rng.random() < 0.5 else []
        os.kill(rng.choice(victims) if victims else rng.choice(alive).pid, signal.SIGKILL)
        kills += 1
        if engine == "ranks":  # as torchrun and Slurm do
            for process in alive:
                process.kill()
        for process in processes:
            process.communicate()
    assert digests(out) == undisturbed


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def test_another_setting_asks_for_another_folder(raw, tmp_path):
    out = tmp_path / "out"
    build(raw[:1], out, "--stop_after", "rules")
    before = digests(out)
    with pytest.raises(InputError, match="min_tokens was 20, is 9"):
        build(raw[:1], out, "--min_tokens", "9")
    assert digests(out) == before
    assert json.loads((out / "report.json").read_text())["stages"][-1]["name"] == "rules"
