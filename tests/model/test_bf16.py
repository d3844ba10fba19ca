"""--dtype bf16 on a CPU: computing in bfloat16, everything that lasts in float32."""

import numpy as np
import pytest
import torch

from nanomed.batches.loader import Loader
from nanomed.config import SFT
from nanomed.distributed import full, shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run.log import Meter
from nanomed.stages.stage import compute_dtype
from nanomed.training.optim import adamw
from nanomed.training.step import train_step
from tests.data import ListData

STEPS = 6


def losses(world, config, dtype: str) -> tuple[list[float], set[torch.dtype]]:
    """Of a few steps on the same chats, and the dtypes of weights, gradients and moments."""
    c = SFT(dtype=dtype, dropout=0.0, batch_size=8, seq_len=64, micro_tokens=128, epochs=STEPS)
    with torch.device("meta"):
        model = Aquila(config)
    shard(model, world, compute_dtype(c, world.device))
    model.to_empty(device=world.device)
    init_weights(model)
    optimizer, meter = adamw(model, c.weight_decay), Meter(config, world.size)
    kinds, found = set(), []

    class Seen:
        param_groups = optimizer.param_groups
        zero_grad = optimizer.zero_grad

        def step(self):
            optimizer.step()
            moments = [x for s in optimizer.state.values() for x in s.values()]
            grads = [p.grad for p in model.parameters()]
            kinds.update(x.dtype for x in [*model.parameters(), *grads, *moments])

    data = ListData.of_lengths([20, 41, 9, 33, 17, 50, 28, 60])
    loader = Loader(c, data, world.rank, world.size, (np.arange(8), np.arange(0)))
    loss = lambda scores, row: (scores.nll.sum(), {})  # noqa: E731
    for k in range(STEPS):
        found.append(train_step(c, model, Seen(), loader, loss, k, 1e-2, meter).loss)
    assert all(full(p).isfinite().all() for p in model.parameters())
    return found, kinds


def test_bf16_trains_as_float32_does(pool, small):
    exact, _ = pool(2, losses, small, "fp32")[0]
    rounded, kinds = pool(2, losses, small, "bf16")[0]
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact
    assert rounded[-1] < rounded[0] - 0.5
    assert kinds == {torch.float32}
    assert compute_dtype(SFT(), torch.device("cpu")) == torch.float32  # unless asked
