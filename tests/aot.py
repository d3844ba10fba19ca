"""Compiles kernels for GPUs that are not here, as a launch on one would: tests call compile_all().

The interpreter replaces the compiler in a process, so compiling needs another one:
TRITON_INTERPRET=0 python -m tests.aot kernels.rope:_forward [...]
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

ARCHITECTURES = 80, 90  # A100, H100 and H200

# Of an AquilaMed layer in bfloat16: what each module's _tile() takes.
SIZES = {
    "kernels.rmsnorm": (4096,),
    "kernels.rope": (32, 8, 128),
    "kernels.swiglu": (14336,),
    "kernels.linear_nll": (151851,),
}
FLOATS = {"eps", "direction"}
FLOAT32 = {"rstd_ptr", "dw_ptr", "wavelengths_ptr", "nll_ptr", "dnll_ptr", "lse_ptr"}
INT64 = {"positions_ptr", "rows_ptr", "labels_ptr"}


def type_of(name: str, constants: dict[str, int]) -> str:
    if name in constants:
        return "constexpr"
    if not name.endswith("_ptr"):
        return "fp32" if name in FLOATS else "i32"
    return "*fp32" if name in FLOAT32 else "*i64" if name in INT64 else "*bf16"


def compile_one(target: str, architecture: int) -> dict:
    """The PTX, and the length of the machine code that ptxas made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel = target.split(":")
    module = importlib.import_module(name)
    constants = dict(module._tile(*SIZES[name]))
    options = {"num_warps": constants.pop("num_warps")}
    function = getattr(module, kernel)
    signature = {name: type_of(name, constants) for name in function.arg_names}
    # Pointers and strides that torch makes are multiples of 16, save for lengths.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind not in ("fp32", "constexpr")
        and name not in function.do_not_specialize
        and name not in function.do_not_specialize_on_alignment
    }
    source = ASTSource(function, signature, constants, attrs)
    gpu = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=gpu, options=options)
    return {"ptx": compiled.asm["ptx"], "bytes": len(compiled.asm["cubin"])}


def compile_all(targets: list[str]) -> dict[str, dict]:
    """{"kernels.rope:_forward sm90": what came out}; fails with the compiler's words."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
        run = subprocess.run(
            [sys.executable, "-m", "tests.aot", *targets],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


if __name__ == "__main__":
    results = {f"{t} sm{a}": compile_one(t, a) for t in sys.argv[1:] for a in ARCHITECTURES}
    print(json.dumps(results))
