"""The training scripts, as a user starts them, on a GPU beside a CPU; one of them that is asked to
end; the evaluation; and a build whose classifier is a decoder.

The case "cpu" runs the same commands where there is no GPU.
"""

import gzip
import json
import math
import os
import signal
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


def started(*words: str, **changes: str) -> subprocess.Popen:
    """The tests' own choice of Triton's interpreter is not handed on."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env | changes, **pipes)


def command(*words: str, **changes: str) -> str:
    """What it printed."""
    with started(*words, **changes) as running:
        said = running.stdout.read()
    assert running.returncode == 0, said[-6000:]
    return said


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
    assert stage != "dpo" or found[0] == pytest.approx(math.log(2), abs=2e-3)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)
def test_a_run_that_is_asked_to_end_goes_on(tmp_path, device):
    """SIGTERM at its first step; its losses are then those of a run that nobody stopped."""
    given = [f"--device={device}", "--steps=60", "--log_every=1", "--eval_every=30"]
    out, said = tmp_path / "run", ""
    command("train_sft.py", *given, "--out", str(tmp_path / "straight"))
    with started("train_sft.py", *given, "--out", str(out)) as run:
        for line in run.stdout:
            said += line
            if line.startswith("step 1/"):
                run.send_signal(signal.SIGTERM)
    assert run.returncode == 128 + signal.SIGTERM and "ended by a signal after step" in said, said
    assert "resumed from" in command("train_sft.py", *given, "--out", str(out), "--resume")
    wanted, found = losses(tmp_path / "straight"), losses(out)
    assert len(wanted) == 60 + 3 and found == pytest.approx(wanted, rel=1e-2)
    print(f"a run and its resume on {device}:", "the same bits" * (found == wanted) or "other bits")


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)
def test_a_decoder_learns_which_documents_are_medical(start, tmp_path, device):
    """From every second label of the samples; the build's own F1 on a fifth of these."""
    lines = gzip.decompress((ROOT / "samples/raw_labels.jsonl.gz").read_bytes()).splitlines()
    (tmp_path / "labels.jsonl").write_bytes(b"\n".join(lines[::2]))
    given = ["--workers=1", "--stop_after=domain", "--data", "samples/raw", "--classifier"]
    given += [str(start), "--labels", str(tmp_path / "labels.jsonl"), "--out", str(tmp_path / "x")]
    command("build_corpus.py", *given, **({} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}))
    (mark,) = tmp_path.glob("x/*-domain/model/*.done.json")
    facts = json.loads(mark.read_text("utf-8"))["random_split"]
    assert facts["f1_en"] > 0.8 and facts["f1_zh"] > 0.8, facts


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
