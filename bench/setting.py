"""What the GPU benchmarks share: the device, the model's shape, where results go, the flags."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure import Results
from nanomed.config import MODELS, ModelConfig
from nanomed.distributed import World, pick_device

TINY = ModelConfig(1003, 1, 256, 4, 2, 512, 512, 1e6, 1e-5, True)  # for a CPU


@dataclass
class Setting:
    """AquilaMed in bfloat16 on a GPU; on a CPU a tiny model in float32, so that the same code runs
    and shows its table. Figures of the two have nothing to do with each other."""

    device: torch.device
    config: ModelConfig
    dtype: torch.dtype
    rounds: int
    results: Results
    world: World | None = None  # where steps are taken

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int) -> Tensor:
        """Never zeros: a matmul of zeros draws less power and was seen 13% faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def flags(description: str) -> argparse.ArgumentParser:
    """The first line of a script's docstring, and the flags of all."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of little: does it run?")
    parser.add_argument("--results", default="runs/bench.jsonl", help="JSON lines to append to")
    return parser


def arguments(
    parser: argparse.ArgumentParser, gpu: Sequence[int] = (8192,), cpu: Sequence[int] = (256,)
) -> tuple[Setting, argparse.Namespace]:
    """Reads the command line. --tokens is by default what is given for the device."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tokens", type=int, nargs="*", help="of a row")
    given = parser.parse_args()
    device = pick_device(given.device)
    on_gpu = device.type == "cuda"
    given.tokens = given.tokens or [*(gpu if on_gpu else cpu)]
    torch.manual_seed(0)
    config, dtype = (MODELS["aquilamed-7b"], torch.bfloat16) if on_gpu else (TINY, torch.float32)
    rounds = 5 if given.quick else 30
    return Setting(device, config, dtype, rounds, Results(given.results, device)), given
