"""Bars, and Ctrl-C outside of fit(): one line that says how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanomed.run import progress as module
from nanomed.run.log import RunFolder
from nanomed.run.progress import progress
from tests.conftest import ROOT
from tests.killed import settings
from tests.training.test_signals import _until


@pytest.mark.parametrize(
    "tty, term, rank, shown",
    [(1, "xterm", 0, True), (0, "xterm", 0, False), (1, "dumb", 0, False), (1, "xterm", 1, False)],
)
def test_a_bar_is_where_somebody_looks(monkeypatch, tty, term, rank, shown):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: bool(tty), raising=False)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("RANK", str(rank))
    with progress(3, "row", "work") as bar:
        assert bar.disable != shown


def test_a_run_folder_says_how_its_run_goes_on(world, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = RunFolder(settings(str(tmp_path / "x")), world)
    try:
        with pytest.raises(KeyboardInterrupt, match=f"--out {run.path} --resume auto"):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
        run.close()


SCRIPT = """
import sys, time
from functools import partial
from pathlib import Path

def task(i, out):
    (out / f"begun-{i}").touch()
    time.sleep(0.5)
    (out / f"ended-{i}").touch()
    return {}

if __name__ == "__main__":
    from nanomed.build.runner import Runner
    if sys.argv[2] == "script":
        from nanomed.build.runner import script as begin
    else:
        from nanomed.distributed import launch as begin
    out = Path(sys.argv[1])

    def main():
        with Runner("local", 2) as runner:
            runner.run(out, partial(task, out=out), 40)

    begin(main)
"""


@pytest.mark.parametrize("how", ["script", "launch"])
def test_ctrl_c_ends_a_build_with_one_line(tmp_path, how):
    """As a terminal sends it: to the process and its workers. Tasks that are running are finished
    and have their marks."""
    (tmp_path / "build.py").write_text(SCRIPT)
    listen = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "build.py"), str(tmp_path), how], text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=listen,
    )  # fmt: skip
    _until(lambda: len(list(tmp_path.glob("begun-*"))) >= 2, 120)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert said == "\nended by Ctrl-C; what is finished is kept; the same command goes on\n"
    begun, ended, marks = (_numbers(tmp_path, p) for p in ("begun-*", "ended-*", "*.done.json"))
    assert begun == ended == marks and 2 <= len(begun) < 40


def _numbers(folder: Path, pattern: str) -> set[int]:
    return {int(path.name.split(".")[0].split("-")[-1]) for path in folder.glob(pattern)}
