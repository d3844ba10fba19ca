"""Every flag of every stage, with a value of its own, in a run that starts and ends."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from nanomed import hf
from nanomed.config import CPT, DPO, SFT, ModelConfig
from nanomed.model.decoder import Aquila
from nanomed.run import checkpoint
from tests.conftest import ROOT
from tests.ranks import script

FLAGS = {
    "init": "start", "tokenizer": str(ROOT / "samples/tokenizer.model"), "template": "chatml",
    "data": "data.jsonl", "val_data": "val.jsonl", "val_fraction": "0.3", "out": "run",
    "fields": "source=kind",
    "steps": "2", "epochs": "3", "batch_size": "4", "micro_tokens": "600", "seq_len": "300",
    "lr": "0.01", "min_lr_ratio": "0.2", "warmup_ratio": "0.5", "weight_decay": "0.2",
    "grad_clip": "0.5", "dropout": "0.2", "seed": "7", "recompute": "lean",
    "kernels": "reference", "dtype": "bf16", "device": "cpu", "allow_drop": "0.5",
    "log_every": "2", "eval_every": "1", "save_every": "1", "save": "blocking",
    "keep_last": "1", "max_bad": "2", "show_text": "", "repeat": "",
    "nodes_share": "replicate", "sum_gradients": "step", "optimizer": "split",
    "beta": "0.2", "label_smoothing": "0.1", "sft_weight": "0.1",
}  # fmt: skip
# Of --dry_run; a file of settings; and what tests of their own start with.
ELSEWHERE = {"dry_run", "hardware", "mfu", "examples", "config", "resume", "model", "tensorboard"}


@pytest.fixture
def place(tmp_path, encoder) -> Path:
    """A folder with a model of random weights."""
    torch.manual_seed(0)
    model = Aquila(ModelConfig(encoder.tokenizer.vocab_size, 1, 64, 2, 1, 96, 512, 1e6, 1e-5, True))
    hf.export(model, encoder.tokenizer, tmp_path / "start", torch.float32, encoder.template)
    return tmp_path


def few(name: str, target: Path, n: int = 20) -> Path:
    lines = (ROOT / "samples" / name).read_text("utf-8").splitlines(True)
    target.write_text("".join(lines[:n]), "utf-8")
    return target


@pytest.mark.parametrize("stage", [SFT, CPT, DPO])
def test_every_flag_at_once_starts(pool, place, stage):
    """--sft_weight never did: nobody had started a run with it."""
    names = {field.name for field in dataclasses.fields(stage)} - ELSEWHERE
    assert names <= set(FLAGS), "a new flag needs a value here"
    values = {name: FLAGS[name] for name in sorted(names)}
    if stage is DPO:
        values["dropout"] = "0"  # another is refused
    if stage is CPT:
        values["data"] = "data.jsonl:1"  # a weight, for --repeat
        del values["val_data"]
    changed = [n for n in values if str(getattr(stage(), n, "")) == values[n] and n != "dropout"]
    assert changed == [], "these have their default"
    file = "cpt_medical.jsonl" if stage is CPT else f"{stage.stage}.jsonl"
    few(file, place / "data.jsonl")
    few(file, place / "val.jsonl", 4)
    flags = [word for name, value in values.items() for word in (f"--{name}", value) if word]
    pool(1, script, f"train_{stage.stage}", flags, str(place))
    assert (place / "run/export/model.safetensors").exists()
    assert checkpoint.newest(place / "run/checkpoints").name == "step-000002"


DPO_FLAGS = (
    "--init start --out run --seq_len 300 --micro_tokens 600 --batch_size 4 --steps 2 "
    "--save_every 1 --val_fraction 0 --save blocking --keep_last 2"
)


def test_dpo_goes_on_with_its_data_in_another_place(pool, place):
    """The reference belongs to the tokens, wherever their file lies and whatever code read it; the
    tokenizer may be the copy that the run keeps. (Other tokens: tests/run/test_resume.py.)"""
    few("dpo.jsonl", place / "pairs.jsonl")
    pool(1, script, "train_dpo", [*DPO_FLAGS.split(), "--data", "pairs.jsonl"], str(place))
    wanted = (place / "run/export/model.safetensors").read_bytes()
    shutil.rmtree(place / "run/checkpoints/step-000002")  # as if it had been killed before
    shutil.rmtree(place / "run/export")
    (place / "elsewhere").mkdir()
    moved = shutil.move(place / "pairs.jsonl", place / "elsewhere/of_another_name.jsonl")
    again = [*DPO_FLAGS.split(), "--resume", "--data", str(moved), "--tokenizer", "run"]
    pool(1, script, "train_dpo", again, str(place))
    assert (place / "run/export/model.safetensors").read_bytes() == wanted
