"""nanomed's own training step as a function to call: what bench/step.py times.

The step is nanomed.training.step.train_step with the loader, the sharded model and the optimizer
of a run. `Split` marks where its parts begin, without changing it.
"""

from itertools import pairwise

import numpy as np
import torch

from bench.measure import between, now
from nanomed.batches.loader import Loader
from nanomed.config import DPO, ModelConfig, Run
from nanomed.distributed import World, shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.recompute import set_recompute
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


def model_of(
    world: World, config: ModelConfig, dtype: torch.dtype, recompute: str, sharded: bool = True
) -> Aquila:
    """With the same weights on every side: those of init_weights, seed 0."""
    with torch.device("meta"):
        model = Aquila(config)
    set_recompute(model, recompute)
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
        self.model = model or model_of(world, config, dtype, c.recompute)
        self.optimizer = optimizer or adamw(self.model, c.weight_decay)
        # A little more than a row: with none to spare, documents that fill n rows go into n + 1.
        self.loader = Loader(
            data, np.arange(len(data)), np.arange(0), batch_size=c.batch_size,
            micro_tokens=c.micro_tokens * 9 // 8, epochs=c.epochs, rank=world.rank,
            world_size=world.size,
        )  # fmt: skip
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
        self.tokens.append(int(done.sums["tokens"]))
        self.k += 1


class Split:
    """Seconds of each part of the steps inside `with`: data, forward, backward, clip+optimizer.

    The clock is the GPU's (events) or the CPU's. Parts are told apart where train_step calls
    something of ours: the loader, the model, the loss, the clipping."""

    PARTS = ("data", "forward", "backward", "clip+optimizer")

    def __init__(self, ours: Ours):
        self.ours, self.marks = ours, []
        self.cuda = next(ours.model.parameters()).is_cuda

    def mark(self, part: str | None) -> None:
        self.marks.append((part, now(self.cuda)))

    def __enter__(self) -> "Split":
        ours, self.before = self.ours, (self.ours.loss, step.get_total_norm)
        self.hook = ours.model.register_forward_pre_hook(lambda *_: self.mark("forward"))

        def loss(scores, row):
            value = self.before[0](scores, row)
            self.mark("backward")
            return value

        def norm(*arguments):
            self.mark("clip+optimizer")
            return self.before[1](*arguments)

        ours.loss, step.get_total_norm = loss, norm
        return self

    def __exit__(self, *_) -> None:
        self.ours.loss, step.get_total_norm = self.before
        self.hook.remove()

    def __call__(self) -> None:
        self.mark("data")
        self.ours()
        self.mark(None)

    def seconds(self) -> dict[str, float]:
        """Of all marked steps together, by part."""
        total = dict.fromkeys(self.PARTS, 0.0)
        for (part, start), (_, end) in pairwise(self.marks):
            if part:
                total[part] += between(start, end)
        return total


def casts(dtype: torch.dtype) -> str:
    """The weights of all sides are float32; what the matmuls compute in, in words."""
    name = str(dtype).removeprefix("torch.")
    return name if dtype == torch.float32 else f"float32 weights cast to {name}"


def weights_of(model: Aquila) -> dict[str, torch.Tensor]:
    """Of an unsharded model, under the names of transformers."""
    params = model.named_parameters()
    return {n if n.startswith("lm_head") else f"model.{n}": p.detach() for n, p in params}
