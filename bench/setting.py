"""What the GPU benchmarks share: the device, the model's shape, where results go, the flags."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.measure import Results
from nanomed.config import MODELS, ModelConfig
from nanomed.distributed import pick_device

TINY = ModelConfig(1003, 1, 256, 4, 2, 512, 512, 1e6, 1e-5, True)  # for a CPU


@dataclass
class Setting:
    """AquilaMed in bfloat16 on a GPU; on a CPU a tiny model in float32, so that the same code runs
    and shows its table. Figures of the two have nothing to do with each other."""

    device: torch.device
    model: ModelConfig
    dtype: torch.dtype
    rounds: int
    results: Results

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int) -> Tensor:
        """Never zeros: a matmul of zeros draws less power and was seen 13% faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def arguments(
    description: str, parser: argparse.ArgumentParser | None = None
) -> tuple[Setting, argparse.Namespace]:
    """Reads the command line; a parser brings flags of its own."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description.splitlines()[0]
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all?")
    parser.add_argument("--tokens", type=int, nargs="*", help="of a row (8192; on a CPU 256)")
    parser.add_argument("--results", default="runs/bench.jsonl", help="JSON lines to append to")
    given = parser.parse_args()
    device = pick_device(given.device)
    on_gpu = device.type == "cuda"
    given.tokens = given.tokens or [8192 if on_gpu else 256]
    torch.manual_seed(0)
    model, dtype = (MODELS["aquilamed-7b"], torch.bfloat16) if on_gpu else (TINY, torch.float32)
    rounds = 5 if given.quick else 30
    return Setting(device, model, dtype, rounds, Results(given.results, device)), given
