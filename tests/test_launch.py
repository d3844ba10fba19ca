"""torchrun, from outside: a worker or the whole launch killed, a restart, a message."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanomed import distributed
from nanomed.distributed import keep_freed_memory, pick_device
from tests.conftest import ROOT
from tests.training.test_exactness import metrics_of
from tests.training.test_signals import _runs, _until

FLAGS = "--steps 12 --save_every 2 --eval_every 6 --batch_size 8 --seq_len 256 --log_every 1"


class Launch:
    def __init__(self, out: Path, flags: str = "", torchrun: str = ""):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", *torchrun.split(), str(ROOT / "train_sft.py")]
        command += [*FLAGS.split(), "--out", str(out), *flags.split()]
        self.out = out
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def wait_for_checkpoint(self, step: int) -> None:
        path = self.out / f"checkpoints/step-{step:06d}"
        _until(lambda: path.exists() or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.process.stdout.read()

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=200)
        return self.process.returncode, output


@pytest.mark.slow
def test_torchrun_restarts_a_group_and_it_goes_on(tmp_path):
    """A worker is killed by -9; --max_restarts starts both again, in the same folder without
    --resume. Then the agent itself is killed: its workers end within seconds, and --resume auto
    ends the run like one that nobody disturbed."""
    straight = Launch(tmp_path / "straight")
    assert straight.end()[0] == 0

    launch = Launch(tmp_path / "x", torchrun="--max_restarts 1")
    launch.wait_for_checkpoint(4)
    os.kill(launch.workers()[1], signal.SIGKILL)
    launch.wait_for_checkpoint(8)
    workers = launch.workers()
    launch.process.kill()
    assert len(workers) == 2
    _until(lambda: not any(map(_runs, workers)), 10)
    output = launch.process.stdout.read()
    assert "resumed from" in output

    code, output = Launch(tmp_path / "x", "--resume auto").end()
    assert code == 0, output
    assert metrics_of(tmp_path / "x") == metrics_of(tmp_path / "straight")
    names = [f"{name}/export/model.safetensors" for name in ("x", "straight")]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(tmp_path):
    """And another learning rate is refused, with the difference in torchrun's closing table too."""
    launch = Launch(tmp_path / "x", "--save_every 6")
    path = tmp_path / "x/metrics.jsonl"
    _until(lambda: path.exists() and len(path.read_text().splitlines()) > 3, 120)
    launch.process.send_signal(signal.SIGTERM)
    code, output = launch.end()
    assert code != 0 and "ended by a signal after step" in output
    (saved,) = (tmp_path / "x/checkpoints").glob("step-*")
    step = int(saved.name[5:])
    assert step % 6 and step == json.loads(path.read_text().splitlines()[-1])["step"]

    code, output = Launch(tmp_path / "x", "--resume --lr 0.5").end()
    was = json.loads((tmp_path / "x/config.json").read_text())["lr"]
    assert code != 0 and output.count(f"lr was {was}, is 0.5") >= 2


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves(tmp_path):
    """A terminal sends it to torchrun and to its workers; torchrun sends them another one."""
    launch = Launch(tmp_path / "x", "--save_every 6")
    path = tmp_path / "x/metrics.jsonl"
    _until(lambda: path.exists() and len(path.read_text().splitlines()) > 3, 120)
    for pid in (*launch.workers(), launch.process.pid):
        os.kill(pid, signal.SIGINT)
    code, output = launch.end()
    assert code != 0 and output.count("ended by a signal after step") == 1
    assert f"--out {tmp_path / 'x'} --resume" in output
    (saved,) = (tmp_path / "x/checkpoints").glob("step-*")
    assert int(saved.name[5:]) % 6
    code, output = Launch(tmp_path / "x", "--resume").end()
    assert code == 0 and f"resumed from {saved}" in output


@pytest.mark.slow
def test_a_killed_worker_takes_the_launch_down(tmp_path):
    launch = Launch(tmp_path / "x")
    launch.wait_for_checkpoint(2)
    workers = launch.workers()
    os.kill(workers[1], signal.SIGKILL)
    code, output = launch.end()  # soon enough: it does not wait for what may take hours
    assert code != 0 and "Signal 9 (SIGKILL)" in output
    assert not any(map(_runs, workers))


@pytest.mark.parametrize(
    "visible, wanted", [("", "cpu"), ("-1", "cpu"), ("0", "cuda:0"), (None, "cuda:0")]
)
def test_a_gpu_that_is_hidden_is_not_taken(monkeypatch, visible, wanted):
    """By the variable by which CUDA itself has it hidden."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert str(pick_device("auto")) == wanted


def test_tests_meet_no_gpu():
    """But those of tests/conftest.py; nor do the processes that they start."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    assert pick_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    "ranks, omp, threads",
    # torchrun sets 1 for several ranks; what a user set for one holds up to the cores.
    [(1, None, 8), (2, "1", 4), (3, "1", 2), (9, "1", 1), (1, "3", 3), (1, "64", 8)],
)
def test_threads_times_ranks_are_never_more_than_the_cores(monkeypatch, ranks, omp, threads):
    """Of 8 cores that this process may use; 9 ranks on them have one thread each."""
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(omp or 64))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(distributed, "_join", lambda *_: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: None)
    with distributed.start(torch.device("cpu")):
        assert asked == [threads]


def test_memory_that_tensors_free_is_used_again():
    """Without it each of the 12,288 pages of a fresh 48 MiB is a fault, every time."""
    if not keep_freed_memory():
        pytest.skip("this C library keeps nothing")
    faults = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(3 * 2**22)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[20:]) < 12_288, faults  # the first fill the gaps of the heap


def test_a_screen_that_lacks_a_character_ends_no_run():
    """Where a locale's encoding has no Chinese, a question mark stands for each character."""
    code = r"from nanomed.distributed import launch; launch(lambda: print('\u27e6\u836f', 1))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | plain, capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, b"?? 1\n", b"")
