"""What is asked without --tasks: the samples' exam, and the chats that training holds out."""

import json
import re

import pytest
import torch

import evaluate
from nanomed.config import SFT, InputError
from nanomed.evals import samples
from nanomed.evals.benchmarks import read_items
from nanomed.evals.compare import compare
from nanomed.hf import pretrained
from tests.evals.test_benchmarks import files_of, model  # noqa: F401


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("samples") / "evals"
    evaluate.score(["--model", str(model), "--out", str(out), "--limit", "6"])
    return out


def test_the_exam_and_the_held_out_chats(done):
    results = json.loads((done / "results.json").read_text())
    assert set(results) == {"samples_exam", "heldout_options", "heldout_chats"}
    assert set(results["samples_exam"]["subjects"]) <= {*samples.SUBJECTS.values()}
    assert results["samples_exam"]["protocol"] == "chat"
    chats = [item for item in read_items(done) if item["id"].startswith("heldout_chats/")]
    assert len(chats) == results["heldout_chats"]["n"] == 6
    assert all(item["gold"] is None and len(item["logprobs"]) == 1 for item in chats)
    (answers,) = json.loads((done / "answers.json").read_text()).values()
    assert all(one["question"] and isinstance(one["answer"], str) for one in answers)


def test_the_loss_is_that_of_the_runs_validation(done, model):  # noqa: F811
    """Over the first held-out chats, by the rows that training validates with."""
    _, encoder = pretrained.describe(model)
    loader = samples.held_out(str(model), encoder, SFT.seq_len)
    weights = pretrained.load(model, torch.device("cpu"), torch.float32)
    rows = [*loader.rows(loader.val[:6])]
    with torch.no_grad():
        total = sum(weights(row).nll.sum().item() for row in rows)
    tokens = sum((row.labels != -100).sum().item() for row in rows)
    found = json.loads((done / "results.json").read_text())["heldout_chats"]
    assert found["tokens"] == tokens and found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert set(loader.val[:6].tolist()).isdisjoint(loader.train.tolist())


def test_chats_that_a_run_has_trained_on_are_not_held_out(model, monkeypatch):  # noqa: F811
    _, encoder = pretrained.describe(model)
    n_held_out = []
    for settings in (
        {"stage": "sft", "val_fraction": 0.1, "val_data": ["another.jsonl"]},
        {"stage": "sft", "val_fraction": 0.01, "val_data": []},
        {"stage": "cpt", "val_fraction": 0.001, "val_data": []},  # of documents
        {},
    ):
        monkeypatch.setattr(pretrained, "settings_of", lambda _, found=settings: found)
        n_held_out.append(len(samples.held_out("", encoder, SFT.seq_len).val))
    assert n_held_out == [0, 16, 138, 138]


def test_a_held_out_chat_is_no_right_answer(done, model, capsys):  # noqa: F811
    found = compare(done, done)
    assert set(found) == {"samples_exam", "heldout_options"}
    before = files_of(done)
    evaluate.score(["--model", str(model), "--out", str(done), "--limit", "6"])
    shown = capsys.readouterr().out
    assert re.search(r"heldout_chats: [\d.]+ \+- [\d.]+ nats for each of", shown)
    assert "held-out questions, answered by" in shown and files_of(done) == before


@pytest.mark.parametrize("more", [["--data", "x"], ["--shots", "3"], ["--protocol", "plain"]])
def test_what_goes_with_tasks_alone(more):
    with pytest.raises(InputError, match="without --tasks the samples are asked"):
        evaluate.score(["--model", "no folder", *more])
