"""The run folder and what a run says: one line per logged step, a progress bar, metrics.jsonl."""

import dataclasses
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanomed import locks
from nanomed.batches.packing import Row
from nanomed.config import InputError, ModelConfig, Run
from nanomed.distributed import World, from_all, from_main, sum_over_ranks
from nanomed.run import checkpoint
from nanomed.run.tensorboard import Board

# Dense bf16 FLOP/s from the vendor's data sheets: what MFU is a share of. The first that is in the
# GPU's name counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H800 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12}
PEAK_FLOPS |= {"H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12}
PEAK_FLOPS |= {"A100": 312e12, "A800": 312e12, "4090": 165e12}


class RunFolder:
    """Where a run writes. Only rank 0 prints and writes here; shards are the exception.

    `identity` says what the run trains, by name; a checkpoint of another identity is refused. With
    resume_from None the run starts at step 0. Raises InputError before it has changed anything."""

    def __init__(
        self,
        c: Run,
        world: World,
        identity: dict[str, Any] | None = None,
        describe: Callable[[dict[str, float]], str] | None = None,
    ):
        self.world = world
        self.identity = json.loads(json.dumps(identity or {}))
        self.board: Board | None = None  # on rank 0, if asked for
        self.describe = describe  # an evaluation's values -> a sentence on them
        self._agree(c)
        chosen = _choose(c, *world.launch) if world.is_main else None
        self.path, self.resume_from = from_main(chosen)
        self.checkpoints = self.path / "checkpoints"
        self._heed_ctrl_c()
        if world.is_main:
            self._lock = locks.take(self.path / ".lock", LOCK_PATIENCE)
            if self.resume_from:
                self._compare()
        self._write(self._mark)
        self._see_the_mark()
        self._write(lambda: self._begin(c))

    def _heed_ctrl_c(self) -> None:
        """Before and after fit(), which has a way of its own, nothing needs saving."""

        def end(*_) -> None:
            raise KeyboardInterrupt(
                f"what is saved stays; go on with the same command and --out {self.path} "
                "--resume auto"
            )

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, end)

    def _agree(self, c: Run) -> None:
        """Raises InputError, on all ranks, if one was started with other settings or data."""
        settings = dataclasses.asdict(c)
        own = {n: v for n, v in settings.items() if n not in MAY_DIFFER} | self.identity
        _join(_differences(from_main(own), own, "{} is {} on rank 0 and {} here"))

    def _mark(self) -> None:
        checkpoint.check_links(self.path)
        (self.path / LAUNCH).write_text(" ".join(self.world.launch), "utf-8")

    def _see_the_mark(self) -> None:
        """Raises InputError, on all ranks, if one is on a machine that has another disk."""
        mark, wanted = self.path / LAUNCH, " ".join(self.world.launch)
        seen = checkpoint.appears(lambda: mark.read_text("utf-8") == wanted)
        _join([] if seen else [f"it does not see {self.path}; all must share the disk of --out"])

    def _write(self, work: Callable[[], None]) -> None:
        try:
            if self.world.is_main:
                work()
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from None

    def _compare(self) -> None:
        saved = checkpoint.read_state(self.resume_from).get("identity", {})
        if differences := _differences(saved, self.identity, "{} was {}, is {}"):
            raise InputError(
                f"--resume: {self.resume_from} is of another run: {'; '.join(differences)}. Give "
                "the settings and files that it was started with, or start a run of its own in "
                "another --out (--init takes this one's weights)"
            )

    def _begin(self, c: Run) -> None:
        self.write_json("config.json", {"stage": c.stage, **dataclasses.asdict(c)})
        if self.path.parent == Path("runs"):
            checkpoint.point(Path("runs") / c.stage, self.path)
        step, validated = -1, True
        if self.resume_from:
            step = checkpoint.read_state(self.resume_from)["step"]
            validated = checkpoint.is_validated(self.resume_from)
            checkpoint.point_best(self.checkpoints)
        for name in ("metrics.jsonl", "spikes.jsonl"):
            _cut_back(self.path / name, step, validated)
        self.board = Board(self.path, step) if c.tensorboard else None

    def close(self) -> None:
        """Lets another run have the folder."""
        if self.world.is_main:
            self._lock.close()

    def write_json(self, name: str, value: Any) -> None:
        if self.world.is_main:
            path = self.path / name
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
            checkpoint.write_whole(path, text)

    def metrics(self, **values: float) -> None:
        self.append("metrics.jsonl", values)
        if self.board:
            try:
                self.board.add(values)
            except OSError as error:
                self.print(f"WARNING: TensorBoard lacks step {values['step']}: {error.strerror}")

    def append(self, name: str, values: dict[str, Any]) -> None:
        """One line more in a file, or none of it. A full disk is said, and does not end the run."""
        if not self.world.is_main:
            return
        values = {k: checkpoint.number(v) if type(v) is float else v for k, v in values.items()}
        path = self.path / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            self.print(f"WARNING: {path} lacks {values}: {error.strerror}")
            with suppress(OSError):
                os.truncate(path, size)  # a part of a line would spoil the next one

    def print(self, text: str = "") -> None:
        """A screen that is gone ends no run: Ctrl-C ends the `tee` behind it before its last step,
        a closed window is no terminal, and the disk of a `> FILE` may be full."""
        if self.world.is_main:
            with suppress(OSError):
                # tqdm.write puts the line above a bar that is being drawn.
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()


# Settings that may differ between ranks: paths, and what rank 0 alone reads.
MAY_DIFFER = {"config", "data", "val_data", "tokenizer", "template", "out", "resume"}
LAUNCH = ".launch"  # holds World.launch, by which a restart finds the folder
LOCK_PATIENCE = 3.0  # seconds: the workers of a torchrun that was killed end within one or two


def _choose(c: Run, launch: str, attempt: str) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint it goes on from or None)."""
    named = c.out if c.resume in ("", "latest", "auto") else c.resume
    known = [Path(named)] if named else Path("runs").glob(f"{c.stage}-*")
    if path := next((p for p in known if _began(p, launch, attempt)), None):
        return path, checkpoint.newest(path / "checkpoints")
    if c.resume:
        path = Path(named) if named else (Path("runs") / c.stage).resolve()
        if found := checkpoint.newest(path / "checkpoints"):
            return path, found
        if c.resume != "auto":
            raise InputError(f"--resume: {path} holds no checkpoint; start without --resume")
    if c.out:
        if (Path(c.out) / "config.json").exists() and c.resume != "auto":
            raise InputError(
                f"{c.out} already holds a run; go on with it by --resume, or choose another --out"
            )
        return Path(c.out), None
    pattern = re.compile(rf"{c.stage}-(\d+)$")
    taken = [int(m[1]) for p in Path("runs").glob("*") if (m := pattern.match(p.name))]
    return Path("runs") / f"{c.stage}-{max(taken, default=0) + 1:03d}", None


def _began(path: Path, launch: str, attempt: str) -> bool:
    """Whether an earlier attempt of this launch, which torchrun has restarted, chose the folder."""
    try:
        found, _, earlier = (path / LAUNCH).read_text("utf-8").partition(" ")
    except OSError:
        return False
    return found == launch and earlier != attempt


def _join(problems: list[str]) -> None:
    """Raises InputError, on all ranks, if a rank has a reason not to join the others."""
    for rank, (host, found) in enumerate(from_all((os.uname().nodename, problems))):
        if found:
            raise InputError(f"rank {rank} on {host} cannot join: {'; '.join(found)}")


def _differences(other: dict[str, Any], own: dict[str, Any], words: str) -> list[str]:
    """`words` take a name, its value there and its value here."""
    names = [name for name, value in other.items() if own.get(name) != value]
    return [words.format(name, _short(other[name]), _short(own.get(name))) for name in names]


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
        text = path.read_text("utf-8", "replace")  # it may be cut off within a character
        lines = [line + "\n" for line in text.split("\n") if kept(line)]
        checkpoint.write_whole(path, "".join(lines))


class Meter:
    """Tokens per second and what else a logged step shows."""

    def __init__(self, config: ModelConfig, world_size: int):
        self.config, self.world_size = config, world_size
        self.restart()

    def restart(self) -> None:
        """Call it after anything that is not training, so that its time does not count."""
        self.started, self.tokens, self.computed, self.squares = time.perf_counter(), 0, 0, 0

    def count(self, row: Row) -> torch.Tensor:
        """Adds one row of this rank, still on the CPU, and returns the tokens of its segments; a
        filler has 0. The model has computed fewer where two segments share some."""
        lengths = row.cu_seqlens.diff().long() * (row.examples >= 0)
        n = int(lengths.sum())
        self.tokens += n
        self.computed += len(row.tokens) if n else 0
        self.squares += int((lengths**2).sum())
        return lengths.sum()

    def read(self, device: torch.device) -> dict[str, float]:
        """Rates since the last call; every rank calls it."""
        counts = torch.tensor([self.tokens, self.computed, self.squares], dtype=torch.float64)
        tokens, computed, squares = sum_over_ranks(counts.to(device)).tolist()
        seconds = time.perf_counter() - self.started
        values = {"tokens_per_s": tokens / seconds, "peak_memory_gb": peak_memory() / 2**30}
        if (peak := peak_flops()) is not None:
            flops = flops_of(self.config, computed, squares)
            values["mfu_causal"] = flops / seconds / (peak * self.world_size)
        self.restart()
        return values


def flops_of(config: ModelConfig, tokens: float, squares: float) -> float:
    """FLOPs of forward and backward, causal count: 6 per matmul weight and token (the embedding is
    a lookup, the head a matmul), and 6 L H E S per token of a segment of S tokens for attention;
    `squares` is the sum of S**2 over segments."""
    matmul = config.n_params() - config.vocab_size * config.d_model
    return 6 * matmul * tokens + 6 * config.n_layers * config.q_size * squares


def peak_flops() -> float | None:
    """Of this run's GPU, if it has one that is known."""
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
        parts.append(f"MFU {values['mfu_causal']:.1%}")
    return "  ".join(parts)
