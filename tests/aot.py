"""Compiles kernels for GPUs that are not here, by the launches of the ops themselves.

Triton's interpreter replaces its compiler in a whole process, so tests do this in another one:
elsewhere() starts a function there that calls compiling() and returns report()s. compiled() does it
for all kernels at once, for those of RMSNorm, RoPE, SwiGLU and the head in bfloat16 at the sizes of
AquilaMed.
"""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import triton

ROOT = Path(__file__).parents[1]
OPS = ["rmsnorm", "rope", "swiglu", "linear_nll", "split_adamw"]
ATOMIC = re.compile(r"\b(atom|red)\.")  # in PTX: with a result, without one


class Absent:
    """What Triton asks of the GPU in order to compile for it."""

    def __init__(self, architecture: int):
        self.target = triton.backends.compiler.GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A kernel whose launches only compile it."""

    def __init__(self, kernel):
        self.kernel, self.made = kernel, {}

    def __getitem__(self, grid):
        return lambda *args, **options: self.note(self.kernel.warmup(*args, grid=grid, **options))

    def note(self, compiled):
        self.made[compiled.hash] = compiled


def compiling(architecture: int, module: ModuleType, names: tuple[str, ...]) -> dict[str, Compiled]:
    """From here on these kernels of the module are compiled when launched, and do nothing."""
    triton.runtime.driver.set_active(Absent(architecture))
    kernels = {name: Compiled(getattr(module, name)) for name in names}
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    return kernels


def report(kernel: Compiled, folder: Path) -> dict:
    """How many times it was compiled; of the first: bytes of shared memory and of a thread's
    stack, and the PTX."""
    made = list(kernel.made.values())
    return {
        "times": len(made),
        "shared": made[0].metadata.shared,
        "stack": stack_bytes(made[0].asm["cubin"], folder),
        "ptx": made[0].asm["ptx"],
    }


def stack_bytes(cubin: bytes, folder: Path) -> int:
    """Registers that a thread keeps in memory, by NVIDIA's own reader, which Triton brings."""
    (folder / "cubin").write_bytes(cubin)
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [reader, "--dump-resource-usage", folder / "cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


def elsewhere(folder: Path, function: str, *arguments) -> dict:
    """What a function ("module.name") returns, called with these arguments and the folder."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.aot", function, json.dumps(arguments), folder],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16).requires_grad_()


def launch(op: str, n: int) -> None:
    """Forward and backward of n tokens; the head's width does not reach its kernels. Positions and
    labels of an odd number of tokens do not begin at a multiple of 16 bytes."""
    lists = torch.arange(n + n % 2)[n % 2 :]
    module = importlib.import_module(f"kernels.{op}_triton")
    if op == "rmsnorm":
        out = module.rmsnorm(tensor(n, 4096), tensor(4096), 1e-5)
    elif op == "swiglu":
        out = module.swiglu(tensor(n, 14336), tensor(n, 14336))
    elif op == "split_adamw":
        numbers = [torch.zeros(n, dtype=d) for d in (torch.bfloat16, torch.int16)]
        numbers += [torch.zeros(n) for _ in range(3)]
        return module.adamw(*numbers, torch.tensor(0.5), n, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    elif op == "rope":
        q, k, _ = tensor(n, 48, 128).split((32, 8, 8), 1)
        out = torch.cat(module.rope(q, k, lists, 1e6), 1)
    else:
        module._matmul = lambda *_, **__: None  # bfloat16 into float32 is CUDA's
        nll, lse, _ = module.linear_nll(tensor(n, 8), tensor(151851, 8), lists)
        out = nll + lse
    out.sum().backward()


@functools.cache
def compiled(architecture: int) -> dict[str, dict]:
    """Kernel -> its report, after launches over 1, odd, and multiples of 16 tokens, which Triton by
    itself would tell apart."""
    with tempfile.TemporaryDirectory() as folder:
        return elsewhere(Path(folder), "tests.aot.compile_all", architecture, [1, 3, 16, 21])


def compile_all(architecture: int, n_tokens: list[int], folder: Path) -> dict[str, dict]:
    attention = importlib.import_module("tests.kernels.test_flash_attention")
    reports = attention.compile_all(architecture, 16, attention.MANY_LENGTHS, folder)
    for op in OPS:
        module = importlib.import_module(f"kernels.{op}_triton")
        names = [name for name in ("_forward", "_backward", "_step") if hasattr(module, name)]
        kernels = compiling(architecture, module, tuple(names))
        for n in n_tokens:
            launch(op, n)
        reports |= {f"{op}{name}": report(kernel, folder) for name, kernel in kernels.items()}
    return reports


if __name__ == "__main__":
    module, name = sys.argv[1].rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
    print(json.dumps(function(*json.loads(sys.argv[2]), Path(sys.argv[3]))))
