"""What a checkpoint costs: seconds of a save, its parts and a resume, beside those of a step.

torchrun --standalone --nproc_per_node 1 bench/saves.py tiny
torchrun --standalone --nproc_per_node 1 bench/saves.py 1GB
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanomed import checkpoint
from nanomed.config import MODELS, SFT, ModelConfig
from nanomed.distributed import pick_device, shard, start
from nanomed.log import Meter
from nanomed.model import Aquila, init_weights
from nanomed.optim import adamw
from nanomed.step import train_step
from tests.data import ListData

SHAPES = {
    "tiny": MODELS["tiny"],
    "1GB": ModelConfig(32_000, 16, 1024, 16, 16, 2816, 4096, 1e6, 1e-5, True),  # float32 weights
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-saves"))
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, on each rank")
    parser.add_argument("--times", type=int, default=3)
    given = parser.parse_args()
    device = pick_device("auto")
    with start(device) as world:
        from nanomed.loader import Loader

        config = SHAPES[given.model]
        with torch.device("meta"):
            model = Aquila(config)
        shard(model, world, torch.float32)
        model.to_empty(device=device)
        init_weights(model)
        optimizer, meter = adamw(model, 0.1), Meter(config, world.size)
        n = given.times * world.size
        data = ListData.of_lengths([given.tokens] * (n + 1), config.vocab_size)
        loader = Loader(
            data, np.arange(n), np.arange(n, n + 1), batch_size=world.size,
            micro_tokens=given.tokens, epochs=1, rank=world.rank, world_size=world.size,
        )  # fmt: skip
        c, loss = SFT(dropout=0.0), lambda nll, row: (nll.sum(), {})
        parts = ["step", "save", "  of it, writing and flushing", "resume", "  of it, hashing"]
        found: dict[str, list[float]] = {name: [] for name in parts}
        written = checkpoint._write, checkpoint.verify

        def timed(name, work, *arguments):
            started = time.perf_counter()
            result = work(*arguments)
            found[name].append(time.perf_counter() - started)
            return result

        checkpoint._write = lambda *a: timed("  of it, writing and flushing", written[0], *a)
        checkpoint.verify = lambda *a: timed("  of it, hashing", written[1], *a)
        for k in range(given.times):
            timed("step", train_step, c, model, optimizer, loader, loss, k, 1e-4, meter)
            saved = timed("save", checkpoint.save, given.folder, model, optimizer, {"step": k + 1})
            timed("resume", checkpoint.load, saved, model, optimizer)
            checkpoint.keep(given.folder, 1)
        if world.is_main:
            size = sum(path.stat().st_size for path in saved.iterdir()) / 1e9
            print(f"{given.model}: {config.n_params():,} parameters, {given.tokens} tokens a step "
                  f"and rank, {world.size} x {device}; a checkpoint has {size:.2f} GB")  # fmt: skip
            for name, seconds in found.items():
                print(f"{name:30} {statistics.median(seconds):8.3f} s")
            shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
