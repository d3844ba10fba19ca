"""nanomed's own training step as a function to call: what bench/step.py times.

The step is nanomed.training.step.train_step with the loader, the model as shard() leaves it and
the optimizer of a run. in_parts() marks where its parts begin, without changing it.
"""

import dataclasses
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import torch

from bench.measure import between, now
from nanomed.batches.loader import Loader
from nanomed.config import DPO, ModelConfig, Run
from nanomed.distributed import World, shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run.log import Meter
from nanomed.training import step
from nanomed.training.optim import adamw
from nanomed.training.reference import answer_logps
from tests.data import Examples

LR = 1e-5


def settings(cls: type[Run], batch_size: int, micro_tokens: int, recompute: str = "none") -> Run:
    seq_len = micro_tokens // 2 if cls is DPO else micro_tokens
    return cls(
        batch_size=batch_size, micro_tokens=micro_tokens, seq_len=seq_len, lr=LR, dropout=0.0,
        weight_decay=0.1, grad_clip=1.0, recompute=recompute, epochs=1000,
    )  # fmt: skip


def model_of(world: World, config: ModelConfig, dtype: torch.dtype, sharded: bool = True) -> Aquila:
    """With the same weights on every side: those of init_weights, seed 0."""
    with torch.device("meta"):
        model = Aquila(config)
    if sharded:
        shard(model, world, dtype)
    model.to_empty(device=world.device)
    init_weights(model)
    return model


class Ours:
    """One optimizer step at each call; `tokens` has the real tokens of each."""

    def __init__(
        self, world: World, config: ModelConfig, data: Examples, c: Run, dtype: torch.dtype,
        model: Aquila | None = None, optimizer: torch.optim.Optimizer | None = None,
    ):  # fmt: skip
        self.c, self.dtype, self.k, self.tokens = c, dtype, 0, []
        self.model = model or model_of(world, config, dtype)
        self.optimizer = optimizer or adamw(self.model, c.weight_decay)
        # A little more than a row: with none to spare, documents that fill n rows go into n + 1.
        wider = dataclasses.replace(c, micro_tokens=c.micro_tokens * 9 // 8)
        parts = np.arange(len(data)), np.arange(0)
        self.loader = Loader(wider, data, world.rank, world.size, parts)
        self.meter = Meter(config, world.size)
        self.loss = lambda scores, row: (scores.nll.sum(), {})
        if isinstance(c, DPO):
            from train_dpo import preference_loss

            logps = answer_logps(self.model, self.loader, world)
            kinds = torch.zeros(len(data), dtype=torch.int64, device=world.device)
            self.loss = preference_loss(logps, kinds, [], c)

    @property
    def setting(self) -> str:
        words = f"packed rows of up to {self.loader.micro_tokens:,} tokens, {casts(self.dtype)}"
        return words + ", reference computed before" * isinstance(self.c, DPO)

    def __call__(self) -> None:
        done = step.train_step(
            self.c, self.model, self.optimizer, self.loader, self.loss, self.k, LR, self.meter
        )
        assert done.applied, "a step that is not finite is not worth timing"
        self.tokens.append(int(done.sums["trained_share" + step.COUNT]))
        self.k += 1


PARTS = ("data", "forward", "backward", "clip+optimizer")


def in_parts(ours: Ours) -> dict[str, float]:
    """Takes a step. Seconds of each part, by the GPU's clock or the CPU's. Parts are told apart
    where train_step calls something of ours: the loader, the model, the loss, the clipping."""
    marks, on_gpu = [], next(ours.model.parameters()).is_cuda
    mark = lambda part: marks.append((part, now(on_gpu)))  # noqa: E731
    own_loss, own_norm = ours.loss, step.get_total_norm

    def loss(scores, row):
        value = own_loss(scores, row)
        mark("backward")
        return value

    def norm(*arguments):
        mark("clip+optimizer")
        return own_norm(*arguments)

    hook = ours.model.register_forward_pre_hook(lambda *_: mark("forward"))
    with patch.object(ours, "loss", loss), patch.object(step, "get_total_norm", norm):
        mark("data")
        ours()
        mark("end")
    hook.remove()
    seconds = dict.fromkeys(PARTS, 0.0)
    for (part, start), (_, end) in pairwise(marks):
        seconds[part] += between(start, end)
    return seconds


def casts(dtype: torch.dtype) -> str:
    """The weights of all sides are float32; what the matmuls compute in, in words."""
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"float32 weights cast to {name}"
