"""Seconds from the command to the first step, on data that are in the cache."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measure import ROOT, Results, shown, table
from nanomed import arguments, store
from nanomed.config import SFT
from nanomed.stages import stage

LAUNCHES = {
    "1 process": [sys.executable],
    "2 processes": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2"],
}  # fmt: skip


def measure(results: Results, times: int) -> None:
    """A demonstration run each time, ended after its first step."""
    fill_cache()
    imports = [_seconds([sys.executable, "-c", "import train_sft"]) for _ in range(times)]
    lines = [results.add("step", "start: imports of train_sft.py", imports)]
    with tempfile.TemporaryDirectory() as folder:
        for name, launch in LAUNCHES.items():
            runs = [first_step(launch, Path(folder) / f"{name}-{k}") for k in range(times)]
            total, validation = zip(*runs, strict=True)
            share = f"{sum(validation) / times:.1f} s"
            lines.append(
                results.add(
                    "step", f"start: to the first step, {name}", total, validation_in_it=share
                )
            )
    print("\nFrom the command to the end of the first step, data cached, a fresh tiny model:")
    print(table([shown(line) for line in lines]), flush=True)


def fill_cache() -> None:
    """Tokenises the demonstration's chats as train_sft.py does, so that no timed run has to."""
    c = arguments.parse(SFT, [])
    store.chats([*c.data, *c.val_data], stage.model_and_encoder(c)[1], c.seq_len, c.allow_drop)


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, env=_environment(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def first_step(launch: list[str], out: Path) -> tuple[float, float]:
    """Seconds until step 1 is on the screen, and those of the validation before it."""
    command = [*launch, "train_sft.py", "--steps", "1", "--log_every", "1", "--out", str(out)]
    started, marks = time.perf_counter(), {}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=_environment() | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        for name, pattern in (("plan", r"plan: "), ("val", r"after step 0"), ("step", r"step 1/")):
            if re.match(pattern, line):
                marks[name] = time.perf_counter()
        if "step" in marks:
            break
    process.terminate()
    process.wait()
    if "step" not in marks:
        raise SystemExit(f"no first step was seen of {' '.join(command)}")
    return marks["step"] - started, marks["val"] - marks["plan"]
