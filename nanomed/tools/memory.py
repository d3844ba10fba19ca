"""What a stage takes on each GPU, by part, and the cheapest change that fits.

    python -m nanomed.tools.memory --gpus 8 --gpu_memory 40 --config configs/sft.toml --model aquilamed-7b
    python -m nanomed.tools.memory --stage dpo --gpus 1 --init FOLDER --recompute lean

All other flags are the stage's own (`python train_sft.py --help`). nanomed/stages/memory.py is the formula.
"""  # noqa: E501

import argparse
import dataclasses

from nanomed import arguments
from nanomed.config import MODELS, InputError, ModelConfig, Run
from nanomed.distributed import launch
from nanomed.hf import pretrained
from nanomed.model.recompute import POLICIES
from nanomed.stages.memory import lines, memory


def main(argv: list[str] | None = None) -> None:
    stages = {cls.stage: cls for cls in Run.__subclasses__()}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stage", choices=stages, default="sft")
    parser.add_argument("--gpus", type=int, default=8, help="over which FSDP shards")
    parser.add_argument("--gpu_memory", type=float, default=40, help="GiB of each")
    given, rest = parser.parse_known_args(argv)
    if given.gpus < 1:
        raise InputError(f"--gpus is {given.gpus}; it must be at least 1")
    c = arguments.parse(stages[given.stage], rest)
    config = config_of(c)
    print(f"{c.stage}, {config.n_params():,} parameters on {given.gpus} GPUs, kernels {c.kernels}")
    print("\n".join(lines(config, c, given.gpus, given.gpu_memory)))
    for recompute in POLICIES:
        other = dataclasses.replace(c, recompute=recompute)
        total = sum(memory(config, other, given.gpus).values())
        print(f"  with --recompute {recompute}: {total:.1f} GiB")


def config_of(c: Run) -> ModelConfig:
    return pretrained.config_of(c.init) if c.init else MODELS[c.model or "tiny"]


if __name__ == "__main__":
    launch(main)
