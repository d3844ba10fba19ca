"""Sharded checkpoints (torch.distributed.checkpoint) that are whole or not there.

    checkpoints/step-000200/    every rank's shard of weights and optimizer, state.json
    checkpoints/latest, best    links to two of them

Random numbers need no place here: dropout is seeded by (seed, step, rank), the order of examples
by (seed, epoch).
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from nanomed.config import InputError


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> Path:
    """Writes folder/step-N for state["step"], then moves folder/latest to it. All ranks call it."""
    target = folder / f"step-{state['step']:06d}"
    unfinished = target.with_suffix(".unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, mode=0o700)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / "state.json").write_text(json.dumps(state, indent=2))
        for path in (*unfinished.iterdir(), unfinished):
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)  # the same step of a run that was resumed
        unfinished.rename(target)
        point(folder / "latest", target)
        _fsync(folder)
    dist.barrier()
    return target


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fills model and optimizer, on any number of ranks, and returns the state of save()."""
    state = read_state(folder)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return state


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fills the model alone."""
    read_state(folder)
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)


def read_state(folder: Path) -> dict:
    try:
        return json.loads((folder / "state.json").read_text())
    except OSError:
        raise InputError(f"{folder} holds no complete checkpoint") from None


def is_validated(saved: Path) -> bool:
    return (saved / "validation.json").exists()


def mark_validated(saved: Path, val_loss: float) -> None:
    """Notes the validation loss of a saved checkpoint, and points `best` to it if it is lowest."""
    if dist.get_rank() == 0:
        best = saved.parent / "best" / "validation.json"
        lowest = json.loads(best.read_text())["val_loss"] if best.exists() else math.inf
        (saved / "validation.json").write_text(json.dumps({"val_loss": val_loss}))
        if val_loss < lowest:
            point(saved.parent / "best", saved)
    dist.barrier()


def keep(folder: Path, n: int) -> None:
    """Deletes all but the newest n checkpoints and those that latest and best point to."""
    if dist.get_rank() > 0:
        return
    steps = sorted(folder.glob("step-*[0-9]"))
    pointed = {(folder / name).resolve() for name in ("latest", "best")}
    for path in steps[:-n]:
        if path.resolve() not in pointed:
            shutil.rmtree(path)


def point(link: Path, target: Path) -> None:
    """Moves a link in one step: whoever reads it sees the old target or the new one."""
    temporary = link.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.rename(link)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
