"""Peak memory of a training step of DPO beside one of SFT.

Same model, same row, same labels. And of DPO's reference pass, which runs before the first step.

python bench/dpo_memory.py
python bench/dpo_memory.py --model 100M

Every measurement is a process of its own, the stages in turn. `allocated` is the peak of torch's
allocator during the second step (the first makes the optimizer's state), above what was there
before it: weights and optimizer state are in none of the figures. On CUDA it is
max_memory_allocated, on the CPU the largest running sum of what the profiler saw allocated and
freed. `process` is the most that a whole process on the CPU had in memory, imports included.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dpo
import train_sft
from bench.ours import Examples, model_of
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import DPO, MODELS, SFT, ModelConfig
from nanomed.distributed import pick_device, start
from nanomed.runs.log import Meter
from nanomed.training.losses import segment_logps
from nanomed.training.optim import adamw
from nanomed.training.step import train_step

SHAPES = {
    "tiny": MODELS["tiny"],
    "100M": ModelConfig(32_000, 8, 768, 12, 4, 2048, 4096, 1e6, 1e-5, True),
}
STAGES = ("sft", "dpo", "reference")
SEGMENT = 64  # tokens in each segment of the row, the second half of them trained


def measured(stage: str, config: ModelConfig, tokens: int) -> dict[str, float]:
    """What one step of a stage takes, in MiB."""
    with start(pick_device("auto")) as world:
        torch.set_num_threads(1)
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        model = model_of(world, config, dtype, "none")
        data = examples_of(1 if stage == "sft" else 2, config, tokens)
        every = np.arange(len(data))
        loader = Loader(data, every, every[:0], batch_size=len(data), micro_tokens=tokens, epochs=1)
        if stage == "reference":
            (row,) = loader.step(0)
            work = partial(reference_pass, model, row.to(world.device))
        else:
            work = partial(one_step, stage, model, adamw(model, 0.1), loader, world.device)
        work()
        return peak_of(work, world.device)


def examples_of(n: int, config: ModelConfig, tokens: int) -> Examples:
    """The same segments for all stages, as chats (n=1) or as pairs (n=2)."""
    rng, trained = np.random.default_rng(0), np.arange(SEGMENT) >= SEGMENT // 2
    drawn = rng.integers(config.vocab_size, size=(tokens // SEGMENT // n, n, SEGMENT))
    return Examples([[(ids, trained) for ids in example] for example in drawn])


def one_step(stage: str, model: nn.Module, optimizer, loader: Loader, device) -> None:
    c, loss = SFT(dropout=0.0), train_sft.next_token_loss
    if stage == "dpo":
        n = len(loader.data)
        reference, kinds = torch.zeros(n, 2, device=device), torch.zeros(n, device=device)
        c = DPO()
        loss = train_dpo.preference_loss(reference, kinds, ["subjective", "objective"], c)
    train_step(c, model, optimizer, loader, loss, 0, 1e-6, Meter(model.config, 1))


@torch.no_grad()
def reference_pass(model: nn.Module, row: Row) -> Tensor:
    return segment_logps(model(row), row)


def peak_of(work: Callable[[], None], device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return {"allocated": (torch.cuda.max_memory_allocated() - before) / 2**20}
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return {"allocated": np.cumsum(sizes).max() / 2**20, "process": process}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, default=4096, help="in the row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=STAGES, help="measure this stage in this process")
    given = parser.parse_args()
    config = SHAPES[given.model]
    if given.only:
        return print(json.dumps(measured(given.only, config, given.tokens)))

    shape = ["--model", given.model, "--tokens", str(given.tokens)]
    found: dict[str, list[dict]] = {stage: [] for stage in STAGES}
    for _ in range(given.rounds):
        for stage in STAGES:
            command = [sys.executable, __file__, "--only", stage, *shape]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[stage].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"{given.model}: {config.n_params():,} parameters, a row of {given.tokens} tokens, MiB")
    for what in found["sft"][0]:
        base = statistics.median(result[what] for result in found["sft"])
        for stage, results in found.items():
            values = [result[what] for result in results]
            middle = statistics.median(values)
            print(
                f"  {what}  {stage:9} {middle:8.1f} ({min(values):.1f} to {max(values):.1f}), "
                f"{middle / base:.3f} of SFT's"
            )


if __name__ == "__main__":
    main()
