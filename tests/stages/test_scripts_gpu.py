"""The three training scripts, as a user starts them, on a GPU beside a CPU; then the evaluation.

The case "cpu" runs the same commands where there is no GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.training.test_exactness import metrics_of

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GPU = [pytest.mark.gpu, pytest.mark.slow, NEEDS_GPU]  # half a minute each
STEPS = "--steps=12", "--log_every=1", "--eval_every=6"
# A GPU draws other fresh weights than a CPU, so all begin with the same ones, and learn much.
LIKE_FRESH = "--lr=1e-3", "--batch_size=8", "--val_fraction=0.1"


def command(*words: str) -> str:
    """What it printed. The tests' own choice of Triton's interpreter is not handed on."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def losses(run: Path) -> list[float]:
    """Of all steps and validations, in order."""
    return [v for m in metrics_of(run) for k, v in m.items() if k in ("loss", "val_loss")]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """What a short fine-tuning on the CPU left."""
    run = tmp_path_factory.mktemp("start") / "run"
    command("train_sft.py", "--device=cpu", "--out", str(run), *STEPS)
    return run


@pytest.mark.parametrize(
    "device, dtype, tolerance",
    [
        pytest.param("cpu", "bf16", 0.02, marks=pytest.mark.slow),
        pytest.param("cuda", "fp32", 1e-3, marks=GPU),
        pytest.param("cuda", "bf16", 0.02, marks=GPU),
    ],
)
@pytest.mark.parametrize("stage", ["cpt", "sft", "dpo"])
def test_a_script_learns_what_it_learns_on_a_cpu(start, tmp_path, stage, device, dtype, tolerance):
    """Every loss of 12 steps and three validations."""
    given = [f"train_{stage}.py", *STEPS, "--init", str(start), *LIKE_FRESH * (stage != "dpo")]
    command(*given, "--device=cpu", "--out", str(tmp_path / "cpu"))
    there = [*given, f"--device={device}", f"--dtype={dtype}", "--out", str(tmp_path / "there")]
    assert ("triton" in command(*there)) == (device == "cuda")
    wanted, found = losses(tmp_path / "cpu"), losses(tmp_path / "there")
    assert len(wanted) == 12 + 3 and found == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)
def test_the_evaluation_scores_as_on_a_cpu(start, tmp_path, device):
    """The same tasks, and the loss of held-out chats, in float32."""
    items = []
    for where in ("cpu", device):
        out = tmp_path / f"evals-{len(items)}"
        given = "--device", where, "--dtype=fp32", "--limit=8", "--out", str(out)
        command("evaluate.py", "--model", str(start), *given)
        items.append(json.loads((out / "results.json").read_text("utf-8")))
    for task, wanted in items[0].items():
        if "loss" in wanted:
            assert items[1][task]["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert items[0].keys() == items[1].keys()
