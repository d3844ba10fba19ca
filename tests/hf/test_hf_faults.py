"""What a damaged or unfit folder says, before anything is allocated or written."""

import base64
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomed import hf
from nanomed.config import InputError
from nanomed.hf import pretrained
from nanomed.text import tokenizer
from tests.folders import (
    all_tensors,
    edit_config,
    edit_index,
    edit_tensor,
    shard_with,
    write_model,
    write_rank_file,
    write_sentencepiece,
)


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "in", "qwen2", max_shard_size="100KB")
    write_rank_file(tmp_path / "in")
    return tmp_path / "in"


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def truncate(folder):
    path = shard_with(folder, HEAD)
    path.write_bytes(path.read_bytes()[:-100])


def wrong_header_length(folder):
    path = shard_with(folder, HEAD)
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def more_ranks(path, n):
    lines = [b"%s %d\n" % (base64.b64encode(b"word %d" % i), 500 + i) for i in range(n)]
    path.write_bytes(path.read_bytes() + b"".join(lines))


FAULTS = {
    "truncated": (truncate, r"model-0000.*cut off"),
    "broken header": (wrong_header_length, r"model-0000.*cut off"),
    "missing shard": (lambda f: shard_with(f, HEAD).unlink(), "names model-.*which is not there"),
    "absent file": (lambda f: edit_index(f, **{HEAD: "x.safetensors"}), "names x.safetensors"),
    "wrong file": (
        lambda f: edit_index(f, **{HEAD: shard_with(f, "model.embed_tokens.weight").name}),
        "do not agree on lm_head.weight",
    ),
    "path out": (lambda f: edit_index(f, **{HEAD: "../x.safetensors"}), "not the name of a file"),
    "absolute path": (lambda f: edit_index(f, **{HEAD: "/etc/passwd"}), "not the name of a file"),
    "wrong shape": (
        lambda f: edit_tensor(f, NORM, lambda t: t[:-1].clone()),
        r"asks for model.norm.weight of shape \(64,\), model-.* has \(63,\)",
    ),
    "another model's config": (
        lambda f: edit_config(f, intermediate_size=96, num_hidden_layers=3),
        "does not fit the weights.*mlp.down_proj",
    ),
    "missing layer": (lambda f: edit_config(f, num_hidden_layers=3), "lacks 12 tensors.*layers.2"),
    "unused layer": (lambda f: edit_config(f, num_hidden_layers=1), "no place for, 12 tensors"),
    "no theta": (lambda f: edit_config(f, ("rope_parameters",)), "does not guess"),
    "two thetas": (lambda f: edit_config(f, rope_theta=1e4), "two different values"),
    "rope_scaling": (
        lambda f: edit_config(f, rope_scaling={"type": "yarn", "factor": 4.0}),
        "rope_scaling.*yarn.*not something nanomed can do",
    ),
    "rope_scaling is no object": (
        lambda f: edit_config(f, rope_scaling="dynamic"),
        "rope_scaling dynamic",
    ),
    "new rope_type": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        "rope_parameters.*llama3",
    ),
    "model_type": (lambda f: edit_config(f, model_type="mistral"), "model_type 'mistral'"),
    "hidden_act": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "head_dim": (lambda f: edit_config(f, head_dim=32), "head_dim 32"),
    "no field": (lambda f: edit_config(f, ("rms_norm_eps",)), "rms_norm_eps is None"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "int8": (lambda f: edit_tensor(f, NORM, lambda t: t.to(torch.int8)), "norm.weight is I8"),
    "vocabulary": (
        lambda f: more_ranks(f / "qwen.tiktoken", 300),
        "has 1008 ids, the model's embedding only 900 rows",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused_before_anything_is_allocated(fault, folder):
    damage, message = FAULTS[fault]
    pretrained.describe(folder)  # it was sound
    damage(folder)
    with pytest.raises(InputError, match=message):
        pretrained.describe(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(bad, folder):
    edit_tensor(folder, HEAD, lambda t: t.index_fill(0, torch.tensor([7]), bad))
    with pytest.raises(InputError, match=r"lm_head\.weight holds numbers that are NaN"):
        hf.load(folder)


def test_a_bias_that_the_model_has_no_place_for_is_refused(tmp_path):
    write_model(tmp_path, "llama", attention_bias=True)
    write_rank_file(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 1e-3
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        hf.load(tmp_path)


def test_tied_embeddings_that_differ_are_refused(folder):
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match="differ"):
        hf.load(folder)


def test_another_tokenizer_than_the_weights_is_refused(folder, tmp_path):
    other = write_sentencepiece(tmp_path)
    with pytest.raises(InputError, match="gives other ids"):
        pretrained.describe(folder, tokenizer_path=str(other))
    same = tmp_path / "same"
    same.mkdir()
    shutil.copyfile(folder / "qwen.tiktoken", same / "other_name.tiktoken")
    pretrained.describe(folder, tokenizer_path=str(same))


def test_export_refuses_before_it_writes(folder, tmp_path, monkeypatch):
    model, tok = hf.load(folder), tokenizer.load(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="not empty"):
        hf.export(model, tok, folder)
    with pytest.raises(InputError, match="do not belong together"):
        hf.export(model, tokenizer.load(write_sentencepiece(folder / "..")), tmp_path / "out")
    (tmp_path / "tokenizer.model").unlink()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB free"):
        hf.export(model, tok, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_older_export_of_the_run_is_replaced(folder, tmp_path):
    model, tok = hf.load(folder), tokenizer.load(folder)
    hf.export(model, tok, tmp_path / "out", torch.float32)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    about = {"stage": "sft", "data": ["hospital/chats.jsonl"], "lr": 2e-6}
    hf.export(model, tok, tmp_path / "out", torch.float32, replace=True, about=about)
    assert (all_tensors(tmp_path / "out")[NORM] == 3).all()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    card = (tmp_path / "out/README.md").read_text()
    assert "chats.jsonl" in card and "hospital" not in card and "lr: 2e-06" in card
