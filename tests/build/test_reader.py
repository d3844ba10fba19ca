"""The decoder with a linear head, as a classifier of documents."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomed.batches.packing import row_from
from nanomed.build import classifier, reader
from nanomed.config import InputError
from nanomed.hf import pretrained
from tests.build import corpora
from tests.build.scored import folder_of
from tests.build.test_classifier import labelled


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory) -> str:
    return str(folder_of(encoder, tmp_path_factory.mktemp("decoder") / "model"))


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory) -> tuple[reader.Reader, Path]:
    found, work = labelled(320), tmp_path_factory.mktemp("work")
    texts, targets = [x.text for x in found], np.array([x.value for x in found])
    return reader.learn("domain", texts, targets, folder, work), work


def test_it_learns_what_is_medical_and_leaves_its_weights_alone(learned):
    model, work = learned
    others = labelled(100, seed=1)
    right = np.array([x.value for x in others]) > 0.5
    assert classifier.f1(model([x.text for x in others]) > 0, right) > 0.9
    assert list(work.iterdir()) == []


def test_a_score_is_the_head_of_the_mean_state_whoever_stands_beside(learned, folder, tmp_path):
    """The states by transformers, from the weights that were saved; the head by hand."""
    transformers = pytest.importorskip("transformers")
    model, _ = learned
    model.save(tmp_path / "model.safetensors")
    again = reader.read(tmp_path / "model.safetensors", folder)
    texts = ["头痛三天，伴发热。", "The knee hurts. " * 80, ""]
    found = again(texts)
    assert (found == model(texts)).all()
    assert found.tolist() == [again([text])[0] for text in texts]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(theirs.model.layers) == 2 and len(model.model.layers) == 1  # three in five
    del theirs.model.layers[1:]
    body = {k: v for k, v in model.tensors.items() if not k.startswith("lm_head")}
    assert not theirs.model.load_state_dict(body, strict=False).unexpected_keys
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, value in zip(texts, found, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)[: reader.LONGEST - 1]
        ids = torch.tensor([[*ids, model.encoder.document_end]])
        assert ids.shape[1] <= 512
        with torch.no_grad():
            state = theirs.model(ids).last_hidden_state[0].mean(0)
        by_hand = state @ model.tensors["lm_head.weight"][0] + model.tensors["lm_head.bias"]
        assert value == pytest.approx(by_hand.item(), abs=1e-4)


def test_the_head_begins_as_the_best_ridge_regression(folder, encoder):
    """Its strength against leaving out one document after another, as the definition says."""
    found = labelled(60)
    data, y = reader.Texts(encoder, [x.text for x in found]), torch.randn(60)
    model = pretrained.load(folder, torch.device("cpu"), torch.float32)
    model.lm_head = reader.MeanState()
    with torch.no_grad():
        states = torch.cat([model(row_from([ids])) for ids in data.ids]).double()
    model.lm_head = reader.LinearHead(model.config.d_model)
    reader.begin(model, data, y)

    def fitted(of: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        x, mean = states[of], states[of].mean(0)
        x = x - mean
        weight = torch.linalg.solve(
            x.T @ x + strength * torch.eye(x.shape[1]).double(),
            x.T @ (y[of] - y[of].mean()).double(),
        )
        return weight, y[of].double().mean() - mean @ weight

    def left_out(strength: float) -> float:
        wrong = 0.0
        for i in range(60):
            weight, bias = fitted(torch.arange(60) != i, strength)
            wrong += float(states[i] @ weight + bias - y[i]) ** 2
        return wrong

    everything = torch.ones(60, dtype=torch.bool)
    largest = torch.linalg.svdvals(states - states.mean(0))[0].item() ** 2
    best = min((largest * 10.0**-n for n in range(1, 9)), key=left_out)
    weight, bias = fitted(everything, best)
    assert torch.allclose(model.lm_head.weight[0].double(), weight, rtol=1e-3, atol=1e-6)
    assert model.lm_head.bias.item() == pytest.approx(bias.item(), abs=1e-4)


def test_a_run_that_was_killed_goes_on(learned, folder, tmp_path, monkeypatch):
    """After the second of its three epochs, and to the same bits."""
    found = labelled(320)
    given = [x.text for x in found], np.array([x.value for x in found]), folder, tmp_path
    trained, steps = reader.fit, []

    def killed(c, model, loader, loss, run):
        def counting(values, row):
            steps.append(row)
            if len(steps) > 25:
                raise KeyboardInterrupt
            return loss(values, row)

        trained(c, model, loader, counting, run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reader, "fit", killed)
        reader.learn("domain", *given)
    assert [*tmp_path.glob("run-*/checkpoints/step-*")]
    again = reader.learn("domain", *given)
    assert all((again.tensors[k] == v).all() for k, v in learned[0].tensors.items())


def test_a_run_that_began_otherwise_is_not_gone_on_with(folder, tmp_path, monkeypatch):
    names = []

    def stopped(c, *_):
        names.append(c.out)
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "fit", stopped)
    for changed in ({}, {"RATE": 9e-6}, {"DEPTH": 1.0}, {}):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name, value in changed.items():
                patch.setattr(reader, name, value)
            reader.learn("quality", ["a", "b"], np.array([0.0, 6.0]), folder, tmp_path)
    assert names[0] == names[3] and len({*names}) == 3


def test_one_that_was_saved_with_all_layers_is_read(folder, encoder, tmp_path):
    model = pretrained.load(folder, torch.device("cpu"), torch.float32)
    model.lm_head = reader.LinearHead(model.config.d_model)
    path = tmp_path / "model.safetensors"
    reader.Reader(model, encoder, model.state_dict()).save(path)
    assert len(reader.read(path, folder).model.layers) == 2


def test_documents_that_are_all_alike_begin_at_the_mean(folder, encoder):
    model = pretrained.load(folder, torch.device("cpu"), torch.float32)
    model.lm_head = reader.LinearHead(model.config.d_model)
    for n in (1, 7):
        reader.begin(model, reader.Texts(encoder, ["同样的话。"] * n), torch.arange(float(n)))
        assert not model.lm_head.weight.any() and model.lm_head.bias.item() == (n - 1) / 2


def test_quality_is_a_number(folder, tmp_path):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 7, 320).astype(float)
    texts = [f"{'good clear ' * int(n)}{'buy now ' * int(6 - n)}{rng.random()}" for n in targets]
    model = reader.learn("quality", texts, targets, folder, tmp_path)
    assert (
        classifier.spearman(classifier.score_texts("quality", model, texts[:100]), targets[:100])
        > 0.9
    )


# ---------------------------------------------------------------- as a stage


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> tuple[list[str], list[str]]:
    """(files, further arguments)"""
    home = tmp_path_factory.mktemp("raw")
    files = corpora.corpus(home, 2, 40)
    corpora.exam(home)
    names = ("law", "medicine")
    labels = [{"text": x.text, "domain": names[x.value], "source": x.source} for x in labelled(96)]
    path = corpora.write(home / "labels.jsonl.gz", labels)
    return files, ["--labels", path, "--stop_after", "domain"]


@pytest.fixture(scope="module")
def built(raw, folder, tmp_path_factory) -> Path:
    files, more = raw
    out = tmp_path_factory.mktemp("built") / "out"
    return corpora.build(files, out, *more, "--classifier", folder)


def test_a_build_chooses_by_it(built):
    facts = json.loads((built / "report.json").read_text())["models"]["domain"]
    assert set(facts["unseen_sources"]["each"]) == {"source0", "source1", "source2"}
    assert len([*(built / "3-domain").glob("*.jsonl.gz")]) > 2  # some shards
    scores = {record["nanomed"]["domain"] for record in corpora.kept(built)}
    assert len(scores) > 5 and min(scores) >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ranks"])
def test_every_engine_leaves_the_same_bytes(raw, folder, built, tmp_path, engine):
    files, more = raw
    places = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
    command = corpora.command(files, tmp_path / "out", "--workers", "2", *more)
    runs = [
        subprocess.Popen([*command, "--classifier", folder], env=os.environ | place)
        for place in (places if engine == "ranks" else [{}])
    ]
    assert [run.wait() for run in runs] == [0] * len(runs)
    assert corpora.digests(tmp_path / "out") == corpora.digests(built)


def test_another_model_asks_for_another_folder(raw, folder, tmp_path):
    files, more = raw
    corpora.build(files, tmp_path / "out", *more[:2], "--stop_after", "rules")
    with pytest.raises(InputError, match="classifier"):
        corpora.build(files, tmp_path / "out", *more, "--classifier", folder)
    with pytest.raises(InputError, match="no such folder"):
        corpora.build(files, tmp_path / "other", *more, "--classifier", str(tmp_path / "none"))


def test_more_processes_than_gpus_are_refused_before_it_is_trained(
    raw, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    files, more = raw
    with pytest.raises(InputError, match="2 processes on a machine"):
        corpora.build(files, tmp_path / "out", *more, "--classifier", folder)
    assert not (tmp_path / "out").exists()
