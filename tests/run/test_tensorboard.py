"""TensorBoard gets the numbers of metrics.jsonl, under TRL's names, over a resume too."""

import json
import os
import re
import signal
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanomed import arguments
from nanomed.config import DPO, SFT, InputError
from nanomed.run import tensorboard
from nanomed.run.tensorboard import named
from nanomed.stages import stage
from tests.training.test_faults import train


def stopped(world, out: str) -> str | int | None:
    def on_step(world, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    return train(world, out, on_step=on_step, tensorboard=True)["outcome"]


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself reads."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_numbers_of_metrics_jsonl_over_a_resume(pool, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert pool(1, stopped, str(out)) == [128 + signal.SIGTERM]
    board = tensorboard.Board(out, 7)  # as if a step had been made that no checkpoint has
    board.add({"step": 9, "loss": 99.0})
    board.writer.close()
    time.sleep(1)  # files are read in the order of their names: second, then process number
    pool(1, partial(train, tensorboard=True), str(out))
    wanted: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        step = line.pop("step")
        for name, value in line.items():
            wanted.setdefault(named(name), {})[step] = pytest.approx(value, rel=1e-6)
    found = shown(out / "tensorboard")
    assert found == wanted and len(found["train/loss"]) == len(wanted["train/loss"]) > 9
    assert {"train/learning_rate", "train/grad_norm", "eval/loss"} <= set(found)


def test_names_are_trls():
    """As its trainers' sources have them, and Hugging Face's callback writes them: eval_x is
    eval/x, all else train/x."""
    if not find_spec("trl"):
        pytest.skip("TRL is not installed")
    trl, transformers = (Path(find_spec(n).origin).parent for n in ("trl", "transformers"))
    logged = re.compile(r'(?:_metrics\[mode\]|logs)\["([\w/]+)"\]')
    for name, ours in (
        ("sft", ["loss", "lr", "grad_norm", "accuracy"]),
        ("dpo", ["loss", "lr", "grad_norm", *(f"rewards/{x}" for x in REWARDS), *LOGPS]),
    ):
        texts = [trl / f"trainer/{name}_trainer.py", transformers / "trainer.py"]
        theirs = {key for path in texts for key in logged.findall(path.read_text("utf-8"))}
        assert {named(x) for x in ours} <= {f"train/{key}" for key in theirs}
        assert {named(f"val_{x}") for x in ours} <= {f"eval/{key}" for key in theirs}


REWARDS = ("chosen", "rejected", "margins", "accuracies")
LOGPS = ("logps/chosen", "logps/rejected")


def test_without_the_package_nothing_starts(monkeypatch):
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    for kind in (SFT, DPO):
        c = arguments.parse(kind, ["--tensorboard"])
        with pytest.raises(InputError, match="pip install tensorboard"):
            stage.model_and_encoder(c)
