"""What a checkpoint costs: a blocking save, a background save and a resume, beside a step.

    torchrun --standalone --nproc_per_node 1 -m bench.saves          both models
    torchrun --standalone --nproc_per_node 2 -m bench.saves tiny

In every round: a step alone, a blocking save, a background save with steps until it is complete, a
resume. So what slows the machine slows all of them.
"""

import argparse
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch

from bench.measure import fingerprint, quartiles, table
from bench.ours import Ours, settings
from nanomed.config import MODELS, SFT, ModelConfig
from nanomed.distributed import World, from_all, pick_device, start
from nanomed.run import checkpoint, saves
from tests.data import Examples

FOLDER = Path("runs/bench-saves")
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
        self.config, self.world, self.host = SHAPES[shape], world, saves.HostCopy()
        data = Examples.of_lengths([tokens] * 4 * world.size, self.config.vocab_size)
        c = settings(SFT, world.size, tokens)
        self.step = Ours(world, self.config, data, c, torch.float32)
        self.found: dict[str, list[float]] = defaultdict(list)
        self.step()

    def timed(self, name: str, work, *arguments):
        started = time.perf_counter()
        result = work(*arguments)
        self.found[name].append(time.perf_counter() - started)
        return result

    def round(self, folder: Path) -> Path:
        given = folder, self.step.model, self.step.optimizer
        self.timed(STEP, self.step)
        self.timed(BLOCKING, saves.save, *given, {"step": 2 * self.step.k})
        alone = self.found[STEP][-1]

        begun, at = time.perf_counter(), {"step": 2 * self.step.k + 1}
        write = self.timed(WAITS, saves.begin, *given, at, self.host)
        lost = self.found[WAITS][-1]

        def stamped() -> Path:
            saved = write()
            self.found[COMPLETE].append(time.perf_counter() - begun)
            return saved

        writer = saves.Writer(self.step.k, stamped, self.world.device)
        writer.start()
        while any(from_all(writer.is_alive())):  # all ranks make the same steps
            started = time.perf_counter()
            self.step()
            lost += time.perf_counter() - started - alone
        writer.join()
        assert isinstance(writer.outcome, Path), writer.outcome
        self.found[LOSES].append(lost)
        self.timed(RESUME, checkpoint.load, writer.outcome, *given[1:])
        if self.world.is_main:
            checkpoint.keep(folder, 1)
        return writer.outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, on each rank")
    parser.add_argument("--times", type=int, default=5, help="rounds; the first is not counted")
    given = parser.parse_args()
    with start(pick_device("auto")) as world:
        for shape in given.models:
            bench = Bench(shape, given.tokens, world)
            for _ in range(given.times + 1):
                saved = bench.round(FOLDER)
            if world.is_main:
                report(shape, given.tokens, bench, saved)
                shutil.rmtree(FOLDER)


def report(shape: str, tokens: int, bench: Bench, saved: Path) -> None:
    """Medians of all rounds but the first, in which host memory was allocated."""
    machine, found = fingerprint(bench.world.device), bench.found
    size = sum(path.stat().st_size for path in saved.iterdir()) / 1e9
    print(
        f"{shape}: {bench.config.n_params():,} parameters, {tokens} tokens a step and rank, "
        f"{bench.world.size} x {bench.world.device}, {machine['threads']} threads each, torch "
        f"{machine['torch']}, load {machine['load']} on {machine['cores']} cores; a checkpoint has "
        f"{size:.2f} GB; the first background save made training wait {found[WAITS][0]:.3f} s"
    )
    step = quartiles(found[STEP][1:])[1]
    rows = []
    for name in (STEP, BLOCKING, WAITS, LOSES, COMPLETE, RESUME):
        first, middle, third = quartiles(found[name][1:])
        rows.append({"": name, "median s": middle, "IQR s": third - first, "steps": middle / step})
    print(table(rows) + "\n")


if __name__ == "__main__":
    main()
