"""The training that the kill matrix kills: 12 steps with dropout, a checkpoint every second step,
a validation every fourth, where an epoch ends. A new stage is a function in STAGES."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import train_cpt
from nanomed.batches.loader import Loader
from nanomed.config import CPT, DPO, SFT, ModelConfig
from nanomed.distributed import local, shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run import checkpoint, log, saves
from nanomed.training import optim, trainer
from tests.data import ListData
from tests.documents import random_documents, slices_of

# One layer: what fails around steps and saves does not ask how many there are.
SMALL = ModelConfig(97, 1, 128, 2, 1, 96, 512, 1e6, 1e-5, True)
N_STEPS = 12
ROWS = 256  # tokens of a row, by the number of ranks: each has two rows a step


def settings(out: str, **changes) -> SFT:
    fixed = dict(lr=1e-2, batch_size=16, epochs=3, seq_len=64, micro_tokens=ROWS, warmup_ratio=0.0)
    return SFT(**{**fixed, "save_every": 2, "eval_every": 4, "out": out, **changes})


def build(world) -> Aquila:
    with torch.device("meta"):
        model = Aquila(SMALL, dropout=0.2)
    shard(model, world, torch.float32)
    model.to_empty(device="cpu")
    init_weights(model)
    return model


def loader_of(world, c: SFT) -> Loader:
    """64 chats of different lengths to train on, and 7 held out."""
    lengths = random.Random(5)
    data = ListData.of_lengths([lengths.randrange(3, 60) for _ in range(71)])
    c = dataclasses.replace(c, micro_tokens=ROWS // world.size)
    return Loader(c, data, world.rank, world.size, (np.arange(64), np.arange(64, 71)))


def _sft(world, given: dict):
    c = settings(**given)
    return c, loader_of(world, c), lambda scores, row: (scores.nll.sum(), {})


def _dpo(world, given: dict):
    from tests.training import test_dpo

    rows = ROWS // world.size
    fixed = dict(lr=1e-3, beta=0.1, batch_size=16, epochs=3, seq_len=64, micro_tokens=rows)
    c = DPO(**fixed, save_every=2, eval_every=4, **given)
    loss = test_dpo.loss_of(test_dpo.random_reference(71), c)
    return c, test_dpo.loader_of(world, c, 64, n_val=7), loss


def _cpt(world, given: dict):
    """Two sources, one of which is gone through again in the middle of the run."""
    rows = ROWS // world.size
    fixed = dict(lr=1e-3, batch_size=16, epochs=3, seq_len=32, micro_tokens=rows, steps=N_STEPS)
    c = CPT(**fixed, save_every=2, eval_every=4, **given)
    sources = [random_documents(60, 0), random_documents(20, 1)]
    data = slices_of(sources, c.seq_len, [Fraction(1, 2)] * 2, [random_documents(5, 2)] * 2, 0)
    loader = Loader(c, data, world.rank, world.size, (data.train, data.val), data.mixture)
    return c, loader, train_cpt.next_token_loss(data, torch.arange(97) % 5)


# name -> function(world, settings that are given) -> (all settings, loader, loss), of 12 steps
STAGES = {"sft": _sft, "cpt": _cpt, "dpo": _dpo}


def train(
    world, out: str, dies: str = "", stage: str = "sft", save: str = "background", held: float = 0.0
) -> None:
    """Starts or goes on, to the end; at the named point it kills itself instead. Writers in the
    background are held for `held` seconds at most. Leaves behind what it did (examples-N.jsonl),
    what it saved (saved.txt) and what became of it (end-N)."""
    c, loader, loss = STAGES[stage](world, {"out": out, "resume": "auto", "save": save})
    run = log.RunFolder(c, world, {"what": "the kill matrix"})
    _hold_writers(held)
    if dies:
        arm(dies, world, run)
    _note_saves(run)
    examples = loader.examples

    def noted(step: int):
        with open(run.path / f"examples-{world.rank}.jsonl", "a") as file:
            file.write(json.dumps([step, examples(step).tolist()]) + "\n")
        return examples(step)

    loader.examples = noted
    model = build(world)
    keep_optimizer = {}
    adamw = optim.adamw
    trainer.adamw = lambda *a: keep_optimizer.setdefault("it", adamw(*a))
    trainer.fit(c, model, loader, loss, run)
    (run.path / f"end-{world.rank}").write_text(digest(model, keep_optimizer["it"]))
    run.close()


def digest(model, optimizer) -> str:
    """Of this rank's weights and optimizer, bit for bit."""
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(local(param.detach()).numpy().tobytes())
        for name in ("step", "exp_avg", "exp_avg_sq"):
            found.update(local(optimizer.state[param][name]).numpy().tobytes())
    return found.hexdigest()


def _note_saves(run) -> None:
    complete = saves._complete

    def noted(unfinished, target, *arguments):
        complete(unfinished, target, *arguments)
        with open(run.path / "saved.txt", "a") as file:
            file.write(target.name + "\n")

    saves._complete = noted


WRITES, AWAITED = threading.Event(), threading.Event()


def _hold_writers(seconds: float) -> None:
    """Each writer in the background begins when somebody waits for it, or after `seconds`."""
    start, write, wait = saves.Writer.start, saves._write, saves.Saver.wait

    def held_start(writer):
        WRITES.set()
        AWAITED.clear()
        start(writer)

    def held_write(*arguments):
        AWAITED.wait(seconds)
        WRITES.clear()
        write(*arguments)

    def noted_wait(saver):
        AWAITED.set()
        wait(saver)

    saves.Writer.start, saves._write, saves.Saver.wait = held_start, held_write, noted_wait


# ---------------------------------------------------------------- named points


def _is(name: str):
    return lambda path, *_: Path(path).name.startswith(name)


def _meanwhile(*_) -> bool:
    return WRITES.is_set()


def _validates_meanwhile(model, *_) -> bool:
    return WRITES.is_set() and not model.training


# name -> (owner, function at whose call it dies, when, rank); the last rank is -1
POINTS = {
    "before the shards": (saves, "_write", None, 0),
    "one rank before its shard": (saves, "_write", None, -1),
    "while shards are hashed": (checkpoint, "described", _is("__"), -1),
    "between shards and manifest": (saves, "_complete", None, 0),
    "between manifest and rename": (checkpoint, "fsync", _is("step-000006.unfinished"), 0),
    "between rename and latest": (checkpoint, "point", _is("latest"), 0),
    "after the save, before validation": (trainer, "evaluate", None, 0),
    "in the middle of validation": (Aquila, "forward", lambda self, *_: not self.training, 0),
    "between validation and its note": (checkpoint, "mark_validated", None, 0),
    "between the note and best": (checkpoint, "point_best", None, 0),
    "while best moves": (checkpoint, "point", _is("best"), 0),
    "while an old checkpoint is deleted": (checkpoint.shutil, "rmtree", _is("step-000002.old"), 0),
    "in the middle of accumulation": (torch.Tensor, "backward", 4, -1),
    "before the update": (torch.optim.AdamW, "step", None, -1),
    "at an epoch's edge": (trainer, "train_step", lambda *a: a[5] == 8, 0),
    "while a line is logged": (log.RunFolder, "append", None, 0),
}
# These happen only while a writer in the background is held.
BESIDE_A_WRITER = {
    "a step, while shards are written": (torch.optim.AdamW, "step", _meanwhile, -1),
    "a validation, while shards are written": (Aquila, "forward", _validates_meanwhile, 0),
    "a validation is over, its save is not": (saves.Saver, "validated", _meanwhile, 0),
    "the next save waits": (saves.Saver, "save", _meanwhile, -1),
    "the copy of the next save, before it is whole": (saves.HostCopy, "_copied", 3, -1),
}


def arm(name: str, world, run) -> None:
    """Makes this process kill itself at the point, once there is a checkpoint of step 4."""
    owner, attribute, when, rank = (POINTS | BESIDE_A_WRITER)[name]
    if world.rank != rank % world.size:
        return
    original = getattr(owner, attribute)
    calls = {"n": 0}

    def dying(*arguments, **named):
        armed = any(path.name >= "step-000004" for path in checkpoint.steps(run.checkpoints))
        calls["n"] += armed
        nth = isinstance(when, int)  # the fourth backward pass is a step's second
        due = calls["n"] == when if nth else when is None or when(*arguments)
        if armed and due:
            if attribute == "rmtree":  # half of it is gone
                next(Path(arguments[0]).iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(owner, attribute, dying)
