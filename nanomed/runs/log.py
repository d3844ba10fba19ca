"""The run folder and what a run says: one line per logged step, a progress bar, metrics.jsonl."""

import dataclasses
import fcntl
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from nanomed.batches.packing import Row
from nanomed.config import InputError, ModelConfig, Run
from nanomed.distributed import World, from_main, restart_count
from nanomed.runs import checkpoint

# Dense bf16 FLOP/s from the vendor's data sheets: what MFU is a share of. The first that is in the
# GPU's name counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


class RunFolder:
    """Where a run writes. Only rank 0 prints and writes here; shards are the exception.

    `identity` says what the run trains, by name; a checkpoint of another identity is refused. With
    resume_from None the run starts at step 0. Raises InputError before it has changed anything."""

    def __init__(
        self,
        config: Run,
        world: World,
        identity: dict[str, Any] | None = None,
        describe: Callable[[dict[str, float]], str] | None = None,
    ):
        self.world = world
        self.identity = json.loads(json.dumps(identity or {}))
        self.describe = describe  # an evaluation's values -> a sentence on them
        self.path, self.resume_from = from_main(_choose(config) if world.is_main else None)
        self.checkpoints = self.path / "checkpoints"
        if world.is_main:
            self._lock = _locked(self.path)
            if self.resume_from:
                self._compare()
            try:
                self._begin(config)
            except OSError as error:
                raise InputError(f"cannot write to {self.path}: {error.strerror}") from None

    def _compare(self) -> None:
        saved = checkpoint.read_state(self.resume_from).get("identity", {})
        differences = [
            f"{name} was {_short(value)}, is {_short(self.identity.get(name))}"
            for name, value in saved.items()
            if self.identity.get(name) != value
        ]
        if differences:
            raise InputError(
                f"--resume: {self.resume_from} is of another run: {'; '.join(differences)}. Give "
                "the settings and files that it was started with, or start a run of its own in "
                "another --out (--init takes this one's weights)"
            )

    def _begin(self, config: Run) -> None:
        self.write_json("config.json", {"stage": config.stage, **dataclasses.asdict(config)})
        (self.path / LAUNCH).write_text(os.environ.get("TORCHELASTIC_RUN_ID", ""))
        if self.path.parent == Path("runs"):
            checkpoint.point(Path("runs") / config.stage, self.path)
        step, validated = -1, True
        if self.resume_from:
            step = checkpoint.read_state(self.resume_from)["step"]
            validated = checkpoint.is_validated(self.resume_from)
            checkpoint.point_best(self.checkpoints)
        for name in ("metrics.jsonl", "spikes.jsonl"):
            _cut_back(self.path / name, step, validated)

    def close(self) -> None:
        """Lets another run have the folder."""
        if self.world.is_main:
            self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        if self.world.is_main:
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")

    def metrics(self, **values: float) -> None:
        self.append("metrics.jsonl", values)

    def append(self, name: str, values: dict[str, Any]) -> None:
        """One line more in a file. A full disk is said, and does not end the run."""
        if not self.world.is_main:
            return
        values = {k: checkpoint.number(v) if type(v) is float else v for k, v in values.items()}
        try:
            with open(self.path / name, "a") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            self.print(f"WARNING: {self.path / name} lacks {values}: {error.strerror}")

    def print(self, text: str = "") -> None:
        if self.world.is_main:
            # tqdm.write puts the line above a bar that is being drawn.
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


LAUNCH = ".torchrun"  # holds the id of the launch, by which its restarts find the folder
LOCK_PATIENCE = 3.0  # seconds: the workers of a torchrun that was killed end within one or two


def _locked(path: Path) -> IO[str]:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)  # data may be patients'
        lock = open(path / ".lock", "w")
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.monotonic() > until:
                raise InputError(f"another run is writing to {path}") from None
            time.sleep(0.1)


def _choose(config: Run) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint it goes on from or None)."""
    named = config.out if config.resume in ("", "latest", "auto") else config.resume
    if restart_count() and (path := Path(named) if named else _of_this_launch(config.stage)):
        return path, checkpoint.newest(path / "checkpoints")
    if config.resume:
        path = Path(named) if named else (Path("runs") / config.stage).resolve()
        if found := checkpoint.newest(path / "checkpoints"):
            return path, found
        if config.resume != "auto":
            raise InputError(f"--resume: {path} holds no checkpoint; start without --resume")
    if config.out:
        if (Path(config.out) / "config.json").exists() and config.resume != "auto":
            raise InputError(
                f"{config.out} already holds a run; go on with it by --resume, or choose another "
                "--out"
            )
        return Path(config.out), None
    pattern = re.compile(rf"{config.stage}-(\d+)$")
    taken = [int(m[1]) for p in Path("runs").glob("*") if (m := pattern.match(p.name))]
    return Path("runs") / f"{config.stage}-{max(taken, default=0) + 1:03d}", None


def _of_this_launch(stage: str) -> Path | None:
    """The folder that this torchrun's first attempt chose for itself, if it came so far."""
    marks = sorted(Path("runs").glob(f"{stage}-*/{LAUNCH}"), key=lambda p: p.stat().st_mtime)
    mine = [p.parent for p in marks if p.read_text() == os.environ.get("TORCHELASTIC_RUN_ID")]
    return mine[-1] if mine else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:12] + "..."


def _cut_back(path: Path, step: int, validated: bool) -> None:
    """Keeps the lines up to `step`; what came after it is about to be done again, and so is the
    validation of `step` itself if it was not finished. A line that a full disk cut off goes too."""

    def kept(line: str) -> bool:
        try:
            values = json.loads(line)
        except ValueError:
            return False
        return values["step"] < step or (
            values["step"] == step and (validated or "val_loss" not in values)
        )

    if path.exists():
        lines = [line + "\n" for line in path.read_text().splitlines() if kept(line)]
        unfinished = path.with_suffix(".new")
        unfinished.write_text("".join(lines))
        unfinished.rename(path)


class Meter:
    """Tokens per second and what else a logged step shows."""

    def __init__(self, model: ModelConfig, world_size: int):
        self.model, self.world_size = model, world_size
        self.restart()

    def restart(self) -> None:
        """Call it after anything that is not training, so that its time does not count."""
        self.started, self.tokens, self.squares = time.perf_counter(), 0, 0

    def count(self, row: Row) -> torch.Tensor:
        """Adds one row of this rank, still on the CPU, and returns its tokens; a filler has 0."""
        lengths = row.cu_seqlens.diff().long() * (row.examples >= 0)
        self.tokens += int(lengths.sum())
        self.squares += int((lengths**2).sum())
        return lengths.sum()

    def read(self, tokens: float, squares: float) -> dict[str, float]:
        """Rates since the last call, from both counts summed over all ranks."""
        seconds = time.perf_counter() - self.started
        values = {"tokens_per_s": tokens / seconds, "peak_memory_gb": peak_memory() / 2**30}
        if (peak := _peak_flops()) is not None:
            flops = flops_of(self.model, tokens, squares)
            values["mfu_causal"] = flops / seconds / (peak * self.world_size)
        self.restart()
        return values


def flops_of(model: ModelConfig, tokens: float, squares: float) -> float:
    """FLOPs of forward and backward, causal count: 6 per matmul weight and token (the embedding is
    a lookup, the head a matmul), and 6 L H E S per token of a segment of S tokens for attention;
    `squares` is the sum of S**2 over segments."""
    matmul = model.n_params() - model.vocab_size * model.d_model
    return 6 * matmul * tokens + 6 * model.n_layers * model.q_size * squares


def _peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if _peak_on_gpu() else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


def peak_memory() -> int:
    """Bytes: allocated on the GPU, else resident in this process."""
    return _peak_on_gpu() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_on_gpu() -> int:
    """0 in a run on the CPU, be there a GPU or not."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def step_line(step: int, n_steps: int, values: dict[str, float]) -> str:
    parts = [
        f"step {step}/{n_steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.2e}",
        f"grad {values['grad_norm']:.3f}",
        f"{values['tokens_per_s']:,.0f} tok/s",
        f"trained {values['trained_share']:.0%}",
        f"mem {values['peak_memory_gb']:.2f} GiB",
    ]
    if "mfu_causal" in values:
        parts.append(f"MFU {values['mfu_causal']:.1%} (causal count, of the data sheet's bf16)")
    return "  ".join(parts)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
