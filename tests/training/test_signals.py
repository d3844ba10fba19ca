"""A run that is asked to end, once or twice, and workers whose torchrun is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanomed.config import SFT
from nanomed.distributed import launch
from nanomed.processes import adopted_by, end_with
from nanomed.run import checkpoint, saves
from nanomed.run.log import RunFolder
from nanomed.training import faults, trainer
from nanomed.training.faults import Signals
from tests.conftest import ROOT
from tests.forks import Group, server
from tests.training.test_exactness import metrics_of
from tests.training.test_faults import train


def signalled(world, out: str) -> dict:
    """Its saves are in the background and slow: the end of the run waits for the last one."""

    def on_step(world, step):
        if step == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun repeats what the terminal sent

    def slow(*arguments):
        time.sleep(0.1)
        write(*arguments)

    write, saves._write = saves._write, slow
    try:
        return train(world, out, on_step=on_step, save="background")
    finally:
        saves._write = write


def test_a_signal_to_one_rank_saves_and_ends_all(pool, undisturbed, tmp_path):
    """The step that is running is finished and the next one is the last; a resume then ends with
    the bits of the run that nobody stopped. (Ctrl-C ends a validation below.)"""
    codes = [r["outcome"] for r in pool(2, signalled, str(tmp_path / "x"))]
    assert codes[1] == 128 + signal.SIGTERM and codes[0] > 128
    assert checkpoint.newest(tmp_path / "x/checkpoints").name in ("step-000005", "step-000006")
    assert pool(2, train, str(tmp_path / "x"))[0]["outcome"] is None
    assert metrics_of(tmp_path / "x") == metrics_of(undisturbed(2)[0])


def signalled_in_validation(world, out: str) -> str | int | None:
    """Rank 1 is asked to end when the validation after step 4 begins."""
    evaluate = trainer.evaluate

    def interrupted(model, loader, loss, run, step):
        if step == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(model, loader, loss, run, step)

    trainer.evaluate = interrupted
    try:
        return train(world, out)["outcome"]
    finally:
        trainer.evaluate = evaluate


def test_a_signal_in_a_validation_gives_it_up_and_a_resume_makes_it(pool, undisturbed, tmp_path):
    """Its checkpoint was saved before it began."""
    codes = pool(2, signalled_in_validation, str(tmp_path / "x"))
    assert codes[1] == 128 + signal.SIGINT and codes[0] > 128
    assert checkpoint.newest(tmp_path / "x/checkpoints").name == "step-000004"
    lines = metrics_of(tmp_path / "x")
    assert not [line for line in lines if line["step"] == 4 and "val_loss" in line]
    assert pool(2, train, str(tmp_path / "x"))[0]["outcome"] is None
    assert metrics_of(tmp_path / "x") == metrics_of(undisturbed(2)[0])


def stubborn(world, folder: str) -> None:
    """Waits for a save that does not end."""
    faults.ECHO, note = 0.1, Signals._note

    def noted(*arguments):
        note(*arguments)
        (Path(folder) / "received").touch()

    Signals._note = noted
    writer = saves.Writer(1, lambda: time.sleep(60), world.device)
    with Signals():
        writer.start()
        (Path(folder) / "ready").touch()
        writer.join()


def test_a_second_signal_ends_at_once(tmp_path):
    group = Group(server(), 1, stubborn, str(tmp_path))
    _until((tmp_path / "ready").exists)
    os.kill(group.ranks[0].pid, signal.SIGTERM)
    _until((tmp_path / "received").exists)
    time.sleep(0.2)  # a second one within ECHO is the first one's
    assert group.ranks[0].exitcode is None
    os.kill(group.ranks[0].pid, signal.SIGTERM)
    assert group.wait(30) == [128 + signal.SIGTERM]


def without_a_screen(world, out: str, number: int) -> None:
    """A script whose screen is a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    sys.stdout, sys.stderr = (open(write, "w", encoding="utf-8") for _ in range(2))

    def main() -> None:
        run = RunFolder(SFT(out=out), world)
        signal.signal(number, signal.SIG_DFL)
        with Signals() as signals:
            os.kill(os.getpid(), number)
            run.print("step 1")
        (Path(out) / "after").touch()
        raise SystemExit(128 + signals.received)

    launch(main)


@pytest.mark.parametrize("number", Signals.NUMBERS)
def test_a_screen_that_is_gone_ends_no_run(tmp_path, number):
    """Ctrl-C also ends the `tee` that a run is piped into, and a window that closes takes its
    terminal with it: the run still comes to its last step, its save and its exit code."""
    group = Group(server(), 1, without_a_screen, str(tmp_path / "x"), number)
    assert group.wait(60) == [128 + number]
    assert (tmp_path / "x/after").exists()


def test_what_nohup_ignores_is_heeded_under_torchrun_alone(monkeypatch):
    """torchrun ends a run at SIGHUP, nohup or not; the run is to save before that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for number, run_id in ((0, None), (signal.SIGHUP, "x")):
            if run_id:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
            with Signals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == number
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def parent_of_one(world, folder: str) -> None:
    if os.fork() == 0:
        end_with(os.getppid())
        (Path(folder) / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def test_a_worker_whose_parent_is_gone_ends(tmp_path):
    group = Group(server(), 1, parent_of_one, str(tmp_path))
    _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert _runs(pid)
    group.kill(0)
    group.wait(5)
    _until(lambda: not _runs(pid))


@pytest.mark.parametrize("is_orphan", [True, False])
def test_a_worker_whose_torchrun_is_gone_before_it_begins_ends(is_orphan):
    """torchrun gives each worker a session. An orphan's parent is whoever takes care of orphans,
    here a shell of another one; a wrapper (torchrun --no_python numactl ...) is of the same."""
    code = "import os; " + "os.setsid(); " * is_orphan
    code += 'from nanomed.distributed import launch; launch(lambda: print("begins"))'
    command = ["sh", "-c", f"{sys.executable} -c '{code}'; exit $?"]
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, start_new_session=True
    )
    said = "error: the torchrun that started this process is gone\n"
    assert (ended.returncode, ended.stderr) == ((1, said) if is_orphan else (0, ""))
    assert ended.stdout == "begins\n" * (not is_orphan)


def test_another_users_init_takes_care_of_orphans(monkeypatch):
    """Who is not root may not ask what it runs."""

    def refused(path):
        raise PermissionError(path)

    monkeypatch.setattr(os, "readlink", refused)
    monkeypatch.setattr(os, "getsid", lambda pid: pid)  # each process has a session of its own
    assert adopted_by(1) and not adopted_by(2)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _until(holds, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)
