"""What a checkpoint costs: a blocking save, a background save and a resume, beside a step.

    torchrun --standalone --nproc_per_node 1 bench/saves.py          both models
    torchrun --standalone --nproc_per_node 2 bench/saves.py tiny

In every round: a step alone, a blocking save, a background save with steps until it is complete, a
resume. So what slows the machine slows all of them.
"""

import argparse
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import fingerprint, quartiles, table
from nanomed.batches.loader import Loader
from nanomed.config import MODELS, SFT, ModelConfig
from nanomed.distributed import World, from_all, pick_device, shard, start
from nanomed.model.decoder import Aquila, init_weights
from nanomed.runs import checkpoint, saves
from nanomed.runs.log import Meter
from nanomed.training.optim import adamw
from nanomed.training.step import train_step
from tests.data import ListData

SHAPES = {
    "tiny": MODELS["tiny"],
    "1GB": ModelConfig(32_000, 16, 1024, 16, 16, 2816, 4096, 1e6, 1e-5, True),  # float32 weights
}
STEP, BLOCKING, RESUME = "a step", "a blocking save: training waits", "a resume"
WAITS, COMPLETE, LOSES = (
    f"a background save: {what}"
    for what in ("training waits", "complete after", "waits, and steps made slower")
)


class Bench:
    """A sharded model that has trained one step, and what was measured: seconds by name."""

    def __init__(self, shape: str, tokens: int, world: World):
        self.config, self.world, self.done = SHAPES[shape], world, 0
        with torch.device("meta"):
            self.model = Aquila(self.config)
        shard(self.model, world, torch.float32)
        self.model.to_empty(device=world.device)
        init_weights(self.model)
        self.optimizer = adamw(self.model, 0.1)
        self.meter = Meter(self.config, world.size)
        self.host = saves.HostCopy()
        n = 100 * world.size
        data = ListData.of_lengths([tokens] * (n + 1), self.config.vocab_size)
        self.loader = Loader(
            data, np.arange(n), np.arange(n, n + 1), batch_size=world.size,
            micro_tokens=tokens, epochs=1, rank=world.rank, world_size=world.size,
        )  # fmt: skip
        self.found: dict[str, list[float]] = defaultdict(list)
        self.step()

    def step(self) -> None:
        train_step(
            SFT(dropout=0.0), self.model, self.optimizer, self.loader,
            lambda nll, row: (nll.sum(), {}), self.done % self.loader.n_steps, 1e-4, self.meter,
        )  # fmt: skip
        self.done += 1

    def timed(self, name: str, work, *arguments):
        started = time.perf_counter()
        result = work(*arguments)
        self.found[name].append(time.perf_counter() - started)
        return result

    def round(self, folder: Path) -> Path:
        given = folder, self.model, self.optimizer
        self.timed(STEP, self.step)
        self.timed(BLOCKING, saves.save, *given, {"step": 2 * self.done})

        begun, at = time.perf_counter(), {"step": 2 * self.done + 1}
        write = self.timed(WAITS, saves.begin, *given, at, self.host)

        def stamped() -> Path:
            saved = write()
            self.found[COMPLETE].append(time.perf_counter() - begun)
            return saved

        writer, during = saves.Writer(self.done, stamped, self.world.device), []
        writer.start()
        while any(from_all(writer.is_alive())):  # all ranks make the same steps
            started = time.perf_counter()
            self.step()
            during.append(time.perf_counter() - started)
        writer.join()
        assert isinstance(writer.outcome, Path), writer.outcome
        lost = sum(seconds - self.found[STEP][-1] for seconds in during)
        self.found[LOSES].append(self.found[WAITS][-1] + lost)
        self.timed(RESUME, checkpoint.load, writer.outcome, self.model, self.optimizer)
        if self.world.is_main:
            checkpoint.keep(folder, 1)
        return writer.outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-saves"))
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, on each rank")
    parser.add_argument("--times", type=int, default=5, help="rounds; the first is not counted")
    given = parser.parse_args()
    device = pick_device("auto")
    with start(device) as world:
        for shape in given.models:
            bench = Bench(shape, given.tokens, world)
            for _ in range(given.times + 1):
                saved = bench.round(given.folder)
            if world.is_main:
                report(shape, given.tokens, bench, saved)
                shutil.rmtree(given.folder)


def report(shape: str, tokens: int, bench: Bench, saved: Path) -> None:
    """Medians of all rounds but the first, in which host memory was allocated."""
    machine = fingerprint(bench.world.device)
    size = sum(path.stat().st_size for path in saved.iterdir()) / 1e9
    print(
        f"{shape}: {bench.config.n_params():,} parameters, {tokens} tokens a step and rank, "
        f"{bench.world.size} x {bench.world.device}, {machine['threads']} threads each, torch "
        f"{machine['torch']}, load {machine['load']} on {machine['cores']} cores; a checkpoint has "
        f"{size:.2f} GB; the first background save made training wait "
        f"{bench.found[WAITS][0]:.3f} s"
    )
    step = quartiles(bench.found[STEP][1:])[1]
    rows = []
    for name in (STEP, BLOCKING, WAITS, LOSES, COMPLETE, RESUME):
        first, middle, third = quartiles(bench.found[name][1:])
        rows.append({"": name, "median s": middle, "IQR s": third - first, "steps": middle / step})
    print(table(rows) + "\n")


if __name__ == "__main__":
    main()
