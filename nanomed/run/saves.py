"""Writing checkpoints, beside the training or in its way, so that they are whole or not there.

A save has two halves. begin() looks at the weights and the disk and makes step-N.unfinished; for a
background save it also copies this rank's shard into host memory. Then training may go on. What
begin() returns does the rest: every rank writes its shard and hashes what it wrote; the manifest
follows; everything is flushed to the disk; then one rename makes it a checkpoint. So a kill or a
full disk at any moment leaves the checkpoints before it as they were, and only afterwards are older
ones deleted.

In the background the second half runs in a thread of each rank, and what the threads exchange goes
through a group of their own: in the training's group it would be mixed up with the gradients.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from nanomed import watchdog
from nanomed.config import Run
from nanomed.distributed import Sharing, from_all, host_group, local, mesh_of
from nanomed.run import checkpoint
from nanomed.run.checkpoint import UNFINISHED
from nanomed.run.log import RunFolder


class SaveFailed(Exception):
    """A checkpoint was not written; those before it are as they were. Every rank raises it."""


# ---------------------------------------------------------------- one save


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Writes folder/step-N for state["step"], then moves folder/latest to it. All ranks call it.
    Raises SaveFailed, on all ranks, if the disk refuses or a weight is not finite."""
    return begin(folder, model, optimizer, state)()


def begin(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    host: "HostCopy | None" = None,
) -> Callable[[], Path]:
    """The first half of a save; returns the second. With a `host` copy the second may run in any
    thread while the training goes on, but before the next begin(). Both raise SaveFailed on all
    ranks."""
    target = folder / f"step-{state['step']:06d}"
    unfinished = target.with_suffix(UNFINISHED)
    group = host.group if host else None
    with _undone_if_it_fails(unfinished):
        _together(lambda: _check_finite(model))
        _on_main(lambda: _prepare(folder, unfinished, checkpoint.size_of(model)))
        weights, moments = get_state_dict(model, optimizer)
        tensors = {"model": weights, "optimizer": {"state": moments["state"]}}
        if host:
            _together(lambda: host.take(tensors))
            tensors = host.tensors

    def write() -> Path:
        with _undone_if_it_fails(unfinished):
            _write(tensors, unfinished, group)
            shards = f"__{dist.get_rank()}_*.distcp"  # how the writer names this rank's
            hashes = _together(
                lambda: {p.name: checkpoint.described(p) for p in unfinished.glob(shards)}, group
            )
            _on_main(lambda: _complete(unfinished, target, state, hashes), group)
        return target

    return write


class HostCopy:
    """This rank's shard of weights and moments in host memory: SAVED_BYTES per parameter, shared
    among the ranks. It is allocated at the first save and kept; page-locked if the model is on a
    GPU."""

    def __init__(self, sharing: Sharing | None = None) -> None:
        self.group, self.mesh = host_group(), mesh_of("cpu", sharing or Sharing())
        self.tensors: dict = {}
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, tensors: dict) -> None:
        """Copies all of it. When it returns, the originals may change."""
        self.tensors = self._copied(tensors, ())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

    def _copied(self, value: dict | Tensor, place: tuple) -> dict | Tensor:
        if isinstance(value, dict):
            return {key: self._copied(item, (*place, key)) for key, item in value.items()}
        source = local(value.detach())
        if place not in self._buffers:
            pinned = source.is_cuda
            self._buffers[place] = torch.empty_like(source, device="cpu", pin_memory=pinned)
        copy = self._buffers[place].copy_(source, non_blocking=True)
        if not isinstance(value, DTensor):
            return copy
        return DTensor.from_local(
            copy, self.mesh, value.placements, run_check=False,
            shape=value.shape, stride=value.stride(),
        )  # fmt: skip


@contextmanager
def _undone_if_it_fails(unfinished: Path) -> Iterator[None]:
    try:
        yield
    except SaveFailed as error:
        # Torch's own message does not say "full". Not of `unfinished`: rank 0 is deleting that.
        free = checkpoint.free_space(unfinished.parent) / 1e9
        if dist.get_rank() == 0:  # a full disk needs the room
            shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveFailed(f"{error} ({free:.1f} GB free)") from None


def _together(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list:
    """Does something on every rank; what each returns. Raises SaveFailed on all if one failed, in
    whatever way: a rank that went on alone would wait for the others for ever."""
    value, problem = None, ""
    try:
        value = work()
    except SaveFailed as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    outcomes = from_all((value, problem), group)
    for rank, (_, problem) in enumerate(outcomes):
        if problem:
            raise SaveFailed(f"rank {rank}: {problem}")
    return [value for value, _ in outcomes]


def _on_main(work: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    _together(work if dist.get_rank() == 0 else lambda: None, group)


def _check_finite(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if not local(param).isfinite().all():
            raise SaveFailed(f"{name} has a value that is not finite; such weights are not saved")


def _prepare(folder: Path, unfinished: Path, size: int) -> None:
    for leftover in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(leftover)
    unfinished.mkdir(parents=True, mode=0o700)
    if checkpoint.free_space(folder) < size:
        raise SaveFailed(f"{size / 1e9:.1f} GB needed in {folder}")


def _write(tensors: dict, unfinished: Path, group: dist.ProcessGroup | None) -> None:
    try:  # dcp flushes each file to the disk
        dcp.save(tensors, checkpoint_id=unfinished, process_group=group)
    except CheckpointException as error:  # it has every rank's error, and every rank gets it
        rank, (first, _) = sorted(error.failures.items())[0]
        raise SaveFailed(f"rank {rank}: {type(first).__name__}: {first}") from None


def _complete(unfinished: Path, target: Path, state: dict, hashes: list[dict]) -> None:
    text = json.dumps(state, ensure_ascii=False, indent=2)
    checkpoint.write_whole(unfinished / "state.json", text)
    files = {name: facts for shards in hashes for name, facts in shards.items()}
    for path, size in [(unfinished / name, facts["size"]) for name, facts in files.items()]:
        if not checkpoint.appears(lambda path=path, size=size: path.stat().st_size == size):
            raise SaveFailed(f"{path}, which another rank has written, is not seen by rank 0")
    for name in (".metadata", "state.json"):
        files[name] = checkpoint.described(unfinished / name)
    checkpoint.write_whole(unfinished / "manifest.json", json.dumps({"files": files}, indent=2))
    checkpoint.fsync(unfinished)
    if target.exists():  # the same step of a run that went on from an earlier one
        checkpoint.delete(target)
    unfinished.rename(target)
    checkpoint.fsync(target.parent)
    checkpoint.point(target.parent / "latest", target)


# ---------------------------------------------------------------- the saves of a run


class Writer(threading.Thread):
    """Does the second half of a save. `outcome` is then the checkpoint, or what went wrong. Python
    waits for such a thread before it ends, and `with Saver` before that."""

    def __init__(self, step: int, write: Callable[[], Path], device: torch.device):
        super().__init__(name=f"the save of step {step}")
        self.step, self.write, self.device = step, write, device
        self.outcome: Path | Exception | None = None

    def run(self) -> None:
        try:
            if self.device.type == "cuda":  # a thread starts on the first GPU
                torch.cuda.set_device(self.device)
            self.outcome = self.write()
        except Exception as error:
            self.outcome = error


class Saver:
    """Saves a run's checkpoints, one at a time. Once one is complete, its validation loss is noted,
    `best` moves, and old ones are deleted; rank 0 does this by itself, so nobody waits for it.

    `saved` is what became of the last save that is over: the checkpoint, or None. A save that fails
    is said and leaves the run alive. All ranks make the same calls. Leaving the context waits."""

    def __init__(self, c: Run, model: nn.Module, optimizer: torch.optim.Optimizer, run: RunFolder):
        self.run, self.model, self.optimizer = run, model, optimizer
        self.keep_last, self.saved = c.keep_last, run.resume_from
        self.host = None
        # `auto` is where tests prove it: on the CPU. On CUDA no background save has ever run.
        if c.save == "background" or (c.save == "auto" and run.world.device.type == "cpu"):
            self.host = HostCopy(getattr(model, "sharing", None))
        self.writer: Writer | None = None
        self.val_loss: float | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def save(self, step: int) -> None:
        """Saves the model as it is now; in the background it is being written when this returns."""
        self.wait()
        self.saved, self.val_loss = None, None
        state = {"step": step, "identity": self.run.identity}
        try:
            write = begin(self.run.checkpoints, self.model, self.optimizer, state, self.host)
        except SaveFailed as error:
            self._say_not_saved(step, error)
            return
        self.writer = Writer(step, write, self.run.world.device)
        if self.host:
            self.writer.start()
        else:
            self.writer.run()

    def validated(self, val_loss: float | None) -> None:
        """Of the weights of the last save, as soon as they are a checkpoint; None says nothing."""
        self.val_loss = val_loss
        if self.writer is None:
            self._note()

    def poll(self) -> None:
        """Finishes a save that is written; waits for nothing."""
        if self.writer and not self.writer.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        watchdog.away("a save, or what comes after training")
        if self.writer is None:
            return
        if self.writer.is_alive():
            self.writer.join()
        writer, self.writer = self.writer, None
        if not isinstance(writer.outcome, Path):
            self._say_not_saved(writer.step, writer.outcome)
            return
        self.saved = writer.outcome
        self._note()
        if self.run.world.is_main:
            try:
                checkpoint.keep(self.run.checkpoints, self.keep_last)
            except OSError as error:
                self.run.print(f"WARNING: old checkpoints are still there: {error}")

    def _note(self) -> None:
        if self.saved is None or self.val_loss is None or not self.run.world.is_main:
            return
        try:
            checkpoint.mark_validated(self.saved, self.val_loss)
        except OSError as error:
            self.run.print(f"WARNING: {self.saved} cannot become the best checkpoint: {error}")

    def _say_not_saved(self, step: int, error: Exception | None) -> None:
        kind = "" if isinstance(error, SaveFailed) else f"{type(error).__name__}: "
        self.run.print(
            f"WARNING: step {step} IS NOT SAVED: {kind}{error}. Earlier checkpoints are as they "
            "were; the next save will try again"
        )
