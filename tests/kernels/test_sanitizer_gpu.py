"""NVIDIA's compute-sanitizer over the Triton ops: accesses outside an allocation, races in shared
memory. Not part of bench/gpu.sh: it takes minutes."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests import small_shapes
from tests.conftest import ROOT

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def test_the_watched_program_runs_every_op(capsys, monkeypatch):
    """Here, on a GPU or at fewer sizes in the interpreter, without the sanitizer."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(small_shapes, "LENGTHS", dict.fromkeys(small_shapes.LENGTHS, (3,)))
        monkeypatch.setattr(small_shapes, "SEGMENTS", ([3, 1],))
    small_shapes.main()
    said = capsys.readouterr().out.splitlines()
    wanted = sum(map(len, small_shapes.LENGTHS.values())) + len(small_shapes.SEGMENTS)
    assert len(said) == wanted and all(line.endswith("finite") for line in said)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not os.path.exists(SANITIZER), reason="needs CUDA's compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    watched = [sys.executable, "-m", "tests.small_shapes"]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    subprocess.run(watched, cwd=ROOT, env=alone, check=True)  # compiles, unwatched
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", *watched]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
