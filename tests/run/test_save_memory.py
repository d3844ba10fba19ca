"""What a save takes of each rank's memory, in shards: a rank's part of weights and moments."""

import ctypes
import json
from pathlib import Path

import pytest
import torch

from nanomed.config import SAVED_BYTES, ModelConfig
from nanomed.distributed import keep_freed_memory, local, shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run import saves
from nanomed.run.log import RunFolder
from nanomed.training.optim import adamw
from tests.forks import Group, server
from tests.killed import settings
from tests.sharded_worker import Peak

# 44 million parameters: a checkpoint of 0.5 GB, whose largest tensor is a thirteenth of it.
LARGE = ModelConfig(20_000, 8, 512, 8, 4, 1408, 512, 1e6, 1e-5, True)


def saving(world, out: str, save: str) -> None:
    """Three saves, the training standing still; leaves each one's peak above its beginning in
    out-RANK."""
    keep_freed_memory()  # as a run does
    with torch.device("meta"):
        model = Aquila(LARGE)
    shard(model, world, torch.float32)
    model.to_empty(device="cpu")
    init_weights(model)
    optimizer = adamw(model, 0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()  # and the gradients stay, for a save not to live in the room they leave
    size = SAVED_BYTES * sum(local(p).numel() for p in model.parameters())
    c = settings(out, save=save, keep_last=1)
    run = RunFolder(c, world)
    found = []
    with saves.Saver(c, model, optimizer, run) as saver:
        for step in (1, 2, 3):
            ctypes.CDLL(None).malloc_trim(0)
            with Peak() as peak:
                saver.save(step)
                saver.wait()
            found.append(peak.bytes / size)
    run.close()
    Path(f"{out}-{world.rank}").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("save", ["blocking", "background"])
def test_a_save_takes_at_most_1_3_shards(tmp_path, n_ranks, save):
    """A blocking save streams tensor by tensor. The first one in the background makes
    the host's copy, a whole shard that stays; the later ones copy into the same memory."""
    out = tmp_path / "run"
    assert Group(server(), n_ranks, saving, str(out), save).wait(400) == [0] * n_ranks
    for rank in range(n_ranks):
        first, *later = json.loads(Path(f"{out}-{rank}").read_text())
        print(f"{save} saves, rank {rank} of {n_ranks}: {first:.2f}", *(f"{x:.2f}" for x in later))
        copy = 1 if save == "background" else 0
        assert copy <= first <= copy + 0.3
        assert max(later) <= 0.3
