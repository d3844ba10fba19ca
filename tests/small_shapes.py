"""Every Triton op, forward and backward, at small odd shapes: what compute-sanitizer watches.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.small_shapes

Without the cache every tensor is an allocation of its own: an access beyond it is an error, not a
look at a neighbour. Without a GPU the ops run in Triton's interpreter, in float32.
"""

import importlib
import os

import torch

from tests import interpreter
from tests.kernel_cases import CASES, DEVICE, like, run

LENGTHS = {"rmsnorm": (1, 3, 129), "rope": (1, 129), "swiglu": (1, 3, 129), "linear_nll": (2, 37)}
SEGMENTS = ([1], [3, 1, 130])


def main() -> None:
    # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "0" if DEVICE.type == "cuda" else "1")
    interpreter.repair()
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for op, lengths in LENGTHS.items():
        work = getattr(importlib.import_module(f"kernels.{op}_triton"), op)
        for n in lengths:
            case = CASES[op](n)
            others = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.others)
            report(
                f"{op}, {n} tokens", *run(work, [like(x, dtype) for x in case.inputs], (*others,))
            )
    work = importlib.import_module("kernels.attention_triton").attention
    for lengths in SEGMENTS:
        inputs = [torch.randn(sum(lengths), h, 128, device=DEVICE, dtype=dtype) for h in (2, 1, 1)]
        borders = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
        report(f"attention, {lengths}", *run(work, inputs, (borders, max(lengths))))


def report(what: str, outputs: list, gradients: tuple, _) -> None:
    sums = [x.float().sum().item() for x in (*outputs, *gradients)]  # the host waits here
    print(what, "finite" if torch.tensor(sums).isfinite().all() else sums, flush=True)


if __name__ == "__main__":
    main()
