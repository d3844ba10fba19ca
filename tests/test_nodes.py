"""Several torchruns on one machine, as several nodes have one each: they start, go on after a kill,
end when one is lost, and say who hangs. Each launch takes a minute: `pytest -m slow -s` shows how
long each fault took from the kill to the end, as docs/reliability.md has it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_meeting import free_port
from tests.training.test_exactness import metrics_of
from tests.training.test_signals import _runs, _until

FLAGS = "--data few.jsonl --val_fraction 0 --batch_size 8 --seq_len 256 --micro_tokens 512"
FLAGS += " --steps 12 --save_every 3 --log_every 1 --out x"
# The scripts as they are, but for how soon a hang is one.
WORKER = """
import runpy, sys
from nanomed import watchdog
watchdog.EVERY, watchdog.LIMIT, watchdog.TIMES = 0.5, {limit}, 1
sys.argv = ["train_sft.py", *sys.argv[1:]]
runpy.run_path("{script}", run_name="__main__")
"""


class Nodes:
    """`n` torchruns of as many nodes, or of `of` if the others never come."""

    def __init__(
        self, folder: Path, n: int, flags="", per_node=1, of=0, torchrun="", limit=300, wait=600
    ):
        self.folder, self.out = folder, folder / "x"
        lines = (ROOT / "samples/sft.jsonl").read_text("utf-8").splitlines(True)[:96]
        (folder / "few.jsonl").write_text("".join(lines), "utf-8")
        worker = folder / "worker.py"
        worker.write_text(WORKER.format(limit=limit, script=ROOT / "train_sft.py"))
        meeting = f"--rdzv_backend c10d --rdzv_endpoint localhost:{free_port()} --rdzv_id job"
        command = [sys.executable, "-m", "torch.distributed.run", *meeting.split()]
        command += ["--nnodes", str(of or n), "--nproc_per_node", str(per_node), *torchrun.split()]
        command += [str(worker), *FLAGS.split(), *flags.split()]
        self.command, self.wait, self.agents = command, wait, []
        for node in range(n):
            self.start(node)

    def start(self, node: int, suffix: str = "") -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        # All have the address of the endpoint here; on a cluster it is the first one's.
        where = f"--rdzv_conf=is_host={int(node == 0)},join_timeout={self.wait}"
        command = [*self.command[:3], where, *self.command[3:]]
        with open(self.folder / f"screen{node}{suffix}", "w") as screen:
            agent = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=screen, stderr=screen
            )
        self.agents[node:] = [agent, *self.agents[node + 1 :]]

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_) -> None:
        for agent in self.agents:
            agent.kill()  # its workers then end by themselves
            agent.wait()

    def screens(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("screen*"))]

    def workers(self, node: int) -> list[int]:
        pid = self.agents[node].pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(pid) for pid in found]

    def wait_for_step(self, step: int) -> None:
        path = self.out / "metrics.jsonl"

        def there() -> bool:
            lines = path.read_text().splitlines() if path.exists() else []
            return any(json.loads(line)["step"] >= step for line in lines if line.endswith("}"))

        _until(lambda: there() or self.agents[0].poll() is not None, 400)
        assert there(), self.screens()

    def end(self, *nodes: int) -> list[int]:
        """The exit codes, of all if none is named."""
        for node in nodes or range(len(self.agents)):
            self.agents[node].wait(400)
        return [self.agents[node].returncode for node in nodes or range(len(self.agents))]


def took(what: str, since: float) -> None:
    print(f"{what}: {time.monotonic() - since:.1f} s")


@pytest.mark.slow
def test_two_nodes_of_two_and_then_one_node(tmp_path):
    """Each node holds a whole model. On one node alone the run then goes on from their checkpoint;
    all losses are those of one process."""
    places = {"nodes": (2, 2), "alone": (1, 1)}
    for name, (n, per_node) in places.items():
        (tmp_path / name).mkdir()
        flags = "--nodes_share replicate --sum_gradients step" if n > 1 else ""
        with Nodes(tmp_path / name, n, flags, per_node) as nodes:
            assert nodes.end() == [0] * n, nodes.screens()
            said = "sharing: one model on each of 2 nodes, over 2 processes; gradients are summed"
            assert (said in nodes.screens()[0]) == (n > 1)
    wanted = metrics_of(tmp_path / "alone/x")
    last = tmp_path / "nodes/x/checkpoints/step-000012"
    found = metrics_of(tmp_path / "nodes/x")
    last.rename(tmp_path / "aside")
    with Nodes(tmp_path / "nodes", 1, "--resume") as node:
        assert node.end() == [0], node.screens()
    moved = metrics_of(tmp_path / "nodes/x")
    for lines in (found, moved):
        assert [m["loss"] for m in lines] == pytest.approx([m["loss"] for m in wanted], rel=1e-5)


@pytest.mark.slow
def test_three_nodes_go_on_after_a_killed_worker_and_a_killed_torchrun(tmp_path):
    with Nodes(tmp_path, 3, "--steps 40", torchrun="--max_restarts 3") as nodes:
        nodes.wait_for_step(4)
        os.kill(nodes.workers(1)[0], signal.SIGKILL)
        killed, before = time.monotonic(), len(metrics_of(nodes.out))
        _until(lambda: "resumed from" in "".join(nodes.screens()), 300)
        nodes.wait_for_step(before + 1)
        took("a killed worker of three nodes, --max_restarts: until the step after", killed)
        workers = [pid for node in range(3) for pid in nodes.workers(node)]
        nodes.agents[2].kill()
        killed = time.monotonic()
        _until(lambda: not _runs(workers[2]), 30)
        took("a killed torchrun: until its worker is gone", killed)
    before = len(metrics_of(nodes.out))
    with Nodes(tmp_path, 3, "--steps 40 --resume auto") as nodes:  # all, by the same command
        nodes.wait_for_step(before + 1)
        took("a killed torchrun, all started again: until the step after", killed)
    steps = [m["step"] for m in metrics_of(tmp_path / "x")]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > before  # none twice, none left out


@pytest.mark.slow
def test_without_restarts_one_lost_node_ends_all(tmp_path):
    with Nodes(tmp_path, 3, "--steps 40") as nodes:
        nodes.wait_for_step(2)
        workers = [pid for node in range(3) for pid in nodes.workers(node)]
        nodes.agents[2].kill()
        killed = time.monotonic()
        assert 0 not in nodes.end(0, 1)
        took("a killed torchrun of three, no restarts: until the others have ended", killed)
        _until(lambda: not any(map(_runs, workers)), 30)


@pytest.mark.slow
def test_a_node_that_never_comes(tmp_path):
    started = time.monotonic()
    with Nodes(tmp_path, 2, of=3, wait=20) as nodes:
        assert 0 not in nodes.end()
        took("a node that never comes, join_timeout=20: until the others have ended", started)
        assert "RendezvousTimeoutError" in "".join(nodes.screens())


@pytest.mark.slow
def test_a_hung_node_is_named(tmp_path):
    """SIGSTOP is what a GPU that hangs looks like from the others."""
    with Nodes(tmp_path, 2, "--steps 400 --save_every 100", limit=15) as nodes:
        nodes.wait_for_step(80)  # by then the watchdogs have looked at some steps
        stopped = nodes.workers(1)[0]
        os.kill(stopped, signal.SIGSTOP)
        since = time.monotonic()
        try:
            nodes.end(0)
        finally:
            os.kill(stopped, signal.SIGKILL)  # what stands still does not end by itself
        took("a worker that hangs, LIMIT 15 s: until the other node has ended", since)
        first = nodes.screens()[0]
        assert "Where all are:" in first and "its process stands still" in first
        assert "sum_over_ranks" in first or "train_step" in first
