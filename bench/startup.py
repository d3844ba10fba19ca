"""Seconds from the command to the first step, on data that are in the cache."""

import os
import subprocess
import sys
import tempfile
import time

from bench.measure import ROOT, show
from nanomed import arguments, store
from nanomed.config import SFT
from nanomed.stages import stage

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
WORKS = {
    "imports of train_sft.py": ["-c", "import train_sft; print('step 1/')"],
    "to the first step, 1 process": ["train_sft.py"],
    "to the first step, 2 processes": [*TORCHRUN, "train_sft.py"],
}


def measure(b) -> None:
    """A demonstration run each time, ended after its first step."""
    c = arguments.parse(SFT, [])  # tokenised here, as the script does, so that no timed run has to
    store.chats([*c.data, *c.val_data], stage.model_and_encoder(c)[1], c.seq_len, c.allow_drop)
    with tempfile.TemporaryDirectory() as folder:
        for name, command in WORKS.items():
            times = range(1 if b.given.quick else 3)
            seconds = [first_step(command, f"{folder}/{name}-{k}") for k in times]
            b.results.add("step", f"start: {name}", seconds)
    title = "\nFrom the command to the end of the first step, data cached, a fresh tiny model:"
    show(b.results.lines[-len(WORKS) :], title)


def first_step(command: list[str], out: str) -> float:
    """Seconds until step 1 is on the screen."""
    started, seen = time.perf_counter(), ""
    with subprocess.Popen(
        [sys.executable, *command, "--steps", "1", "--log_every", "1", "--out", out],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        for line in process.stdout:
            seen += line
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - started
                process.terminate()
                return seconds
    raise SystemExit(f"no first step was seen of {' '.join(command)}: {seen}")
