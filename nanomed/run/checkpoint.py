"""Sharded checkpoints (torch.distributed.checkpoint) that are whole or not there: which there are,
what to keep of them, and how to load one. saves.py writes them.

    checkpoints/step-000200/    every rank's shard of weights and optimizer, state.json, and
                                manifest.json: the size and hash of each file
    checkpoints/latest, best    links to two of them, for people and for --init

A resume takes the highest step-N, after comparing sizes and hashes. Random numbers need no place
here: dropout is seeded by (seed, step, rank), the order of examples by (seed, epoch).

torch.distributed.checkpoint is imported where it is called: with what it needs it takes as
long as torch, and most commands only ask which checkpoints there are.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nanomed.config import SAVED_BYTES, WEIGHT_BYTES, InputError
from nanomed.distributed import from_all, from_main
from nanomed.run.progress import progress

UNFINISHED = ".unfinished"


# ---------------------------------------------------------------- space


def size_of(model: nn.Module) -> int:
    """Bytes of one checkpoint: 98.7 GB for 8.22 billion parameters."""
    bytes_of = {True: SAVED_BYTES, False: WEIGHT_BYTES}  # of a frozen weight there are no moments
    return sum(bytes_of[param.requires_grad] * param.numel() for param in model.parameters())


def free_space(folder: Path) -> int:
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def check_space(folder: Path, model: nn.Module, n: int) -> None:
    """Raises InputError, on all ranks, unless n checkpoints fit, those already there included."""
    needed, free = n * size_of(model), 0
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        there = sum(file.stat().st_size for step in steps(folder) for file in step.iterdir())
        free = free_space(folder) + there
    free = from_main(free)
    if free < needed:
        raise InputError(
            f"{n} checkpoints need {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are "
            "there; make room, lower --keep_last, or choose another --out"
        )


def check_links(folder: Path) -> None:
    """Raises InputError if the disk has none."""
    try:
        point(folder / ".link", folder)
        (folder / ".link").unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot hold symbolic links ({error.strerror}), as `latest` and `best` are; "
            "choose an --out on another disk"
        ) from None


# ---------------------------------------------------------------- load


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fills model and optimizer, on any number of ranks, and returns the state of save(). Raises
    InputError, on all ranks, for a damaged checkpoint, naming the file."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    _read({"model": weights, "optimizer": {"state": moments["state"]}}, folder)
    # Rates, decay and what else a group has are no tensors, and stay the settings'.
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return read_state(folder)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fills the model alone."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    weights = get_model_state_dict(model)
    _read({"model": weights}, folder)
    set_model_state_dict(model, weights)


def _read(tensors: dict, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from nanomed.run.untrusted import Planner, Reader

    # Where `best` and `latest` lead, rank 0 alone looks up: another machine may see for a minute
    # where they led before, and weights of two checkpoints would be mixed.
    leads_to = from_main(folder.resolve().name)
    folder = folder.with_name(leads_to) if folder.is_symlink() else folder
    reader = Reader(folder, set(verify(folder)))
    reader.read_metadata()  # each rank by itself: not every torch hands an error on from the first
    try:
        with progress(0, "tensor", "reading checkpoint") as bar:
            dcp.load(tensors, storage_reader=reader, planner=Planner(bar))
    except dcp.CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise InputError(f"{folder} cannot be loaded: {first}") from None


def verify(folder: Path) -> dict:
    """The manifest's files, after comparing each with its size and hash; every rank reads a part
    of them. Raises InputError on all ranks."""
    files = _manifest(folder)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine, problems = sorted(files)[rank::size], []
    with progress(len(mine), "file", "checking checkpoint") as bar:
        for name in mine:
            problems += filter(None, [_problem(folder / name, files[name])])
            bar.update()
    problems = [problem for some in from_all(problems) for problem in some]
    if problems:
        raise InputError(
            f"a damaged checkpoint: {'; '.join(problems)}. Delete {folder} to go on from the one "
            "before it"
        )
    return files


def _manifest(folder: Path) -> dict:
    files = _json(folder / "manifest.json").get("files")
    if not isinstance(files, dict) or any(
        Path(name).name != name or name == ".." for name in files
    ):
        raise InputError(f"{folder}/manifest.json is damaged: files must be names in its folder")
    return files


def _problem(path: Path, facts: dict) -> str:
    if not path.is_file() or path.is_symlink():
        return f"{path} is missing"
    if (size := path.stat().st_size) != facts["size"]:
        return f"{path} has {size:,} bytes instead of {facts['size']:,}"
    return "" if described(path) == facts else f"{path} has changed since it was written"


def described(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


CACHED = 60.0  # seconds that NFS may go on showing what was there before


def appears(there: Callable[[], bool]) -> bool:
    """Whether this machine sees, soon enough, what another one has written."""
    until = time.monotonic() + CACHED
    while True:
        with suppress(OSError):
            if there():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def read_state(folder: Path) -> dict:
    return _json(folder / "state.json")


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError:
        raise InputError(f"{path.parent} holds no complete checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: it holds no object")
    return value


# ---------------------------------------------------------------- which ones


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first. They are complete: the rename came last."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(folder: Path) -> Path | None:
    return next(reversed(steps(folder)), None)


def number(value: float) -> float | str:
    """As JSON has it, which has no NaN."""
    return value if math.isfinite(value) else str(value)


def is_validated(saved: Path) -> bool:
    return (saved / "validation.json").exists()


def mark_validated(saved: Path, val_loss: float) -> None:
    """Notes the validation loss of a saved checkpoint and points `best` to the lowest. Rank 0 calls
    it. Raises OSError."""
    write_whole(saved / "validation.json", json.dumps({"val_loss": number(val_loss)}))
    point_best(saved.parent)


def point_best(folder: Path) -> None:
    """Points `best` to the checkpoint with the lowest validation loss, of equal ones to the first.
    That follows from what the checkpoints say, so a kill can lose no decision. A loss that is not
    finite is never the lowest: min() would keep a NaN that comes first."""
    noted = [path for path in steps(folder) if is_validated(path)]
    losses = {path: float(_json(path / "validation.json")["val_loss"]) for path in noted}
    if finite := [path for path in noted if math.isfinite(losses[path])]:
        point(folder / "best", min(finite, key=losses.get))
    else:
        (folder / "best").unlink(missing_ok=True)


def keep(folder: Path, n: int) -> None:
    """Deletes all but the newest n checkpoints and those that latest and best point to. Rank 0
    calls it. Raises OSError."""
    pointed = {(folder / name).resolve() for name in ("latest", "best")}
    for path in steps(folder)[:-n]:
        if path.resolve() not in pointed:
            delete(path)


def delete(path: Path) -> None:
    """No kill leaves half a checkpoint under the name of a whole one."""
    going = path.with_name(path.name + ".old" + UNFINISHED)
    path.rename(going)
    shutil.rmtree(going)


def point(link: Path, target: Path) -> None:
    """Moves a link in one step: whoever reads it sees the old target or the new one."""
    temporary = link.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.rename(link)
    fsync(link.parent)


def write_whole(path: Path, text: str) -> None:
    """What is there stays until the new text is whole and on the disk. Raises OSError."""
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text, "utf-8")
    fsync(unfinished)
    unfinished.rename(path)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some disks cannot flush a folder
            raise
    finally:
        os.close(fd)
