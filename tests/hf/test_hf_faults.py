"""What a damaged or unfit folder says, before anything is allocated or written."""

import base64
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomed import hf
from nanomed.batches.packing import row_from
from nanomed.config import InputError
from nanomed.hf import pretrained
from nanomed.text import tokenizer
from tests.conftest import ROOT
from tests.folders import (
    LLAMA31,
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
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope_parameters.*longrope",
    ),
    "scaling without its kind": (
        lambda f: edit_config(f, rope_scaling={"factor": 2.0}),
        "rope_scaling {'factor': 2.0} is not something nanomed can do",
    ),
    "a rope for each kind of layer": (
        lambda f: edit_config(
            f, rope_parameters={"rope_theta": 1e4, "full_attention": {"rope_theta": 1e6}}
        ),
        "rope_parameters.*full_attention.*not something",
    ),
    "half of Llama 3.1": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "low_freq_factor is None",
    ),
    "scaled and not": (
        lambda f: edit_config(f, rope_scaling=LLAMA31),
        "rope_scaling and rope_parameters differ",
    ),
    "sliding window": (
        lambda f: edit_config(
            f, ("layer_types",), use_sliding_window=True, sliding_window=32, max_window_layers=1
        ),
        "sliding_window 32 is not something",
    ),
    "mistral's window": (
        lambda f: edit_config(f, ("sliding_window", "layer_types"), model_type="mistral"),
        r"sliding_window \(by default\) is not something",
    ),
    "model_type": (lambda f: edit_config(f, model_type="mixtral"), "model_type 'mixtral'"),
    "hidden_act": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act 'gelu'"),
    "head_dim": (lambda f: edit_config(f, head_dim=32), r"k_proj.bias of shape \(64,\)"),
    "odd head_dim": (lambda f: edit_config(f, head_dim=15), "head_dim 15 do not divide"),
    "weights twice": (
        lambda f: save_file(all_tensors(f), f / "model.safetensors"),
        r"holds the weights twice, as model\.safetensors and as the files",
    ),
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
        pretrained.load(folder)


def test_a_bias_that_the_model_has_no_place_for_is_refused(tmp_path):
    """Of o_proj, where q, k and v have none: transformers has no such model."""
    write_model(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    name = "model.layers.1.self_attn.o_proj.bias"
    save_file(load_file(path) | {name: torch.ones(64)}, path)
    with pytest.raises(InputError, match=r"no place for, model\.layers\.1\.self_attn\.o_proj"):
        pretrained.load(tmp_path)


def test_an_index_left_behind_is_not_read(tmp_path):
    """save_pretrained first in shards, then whole: transformers reads the whole file."""
    write_model(tmp_path, "llama", max_shard_size="60KB")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    theirs = write_model(tmp_path / "whole", "llama", seed=1)
    shutil.copyfile(tmp_path / "whole/model.safetensors", tmp_path / "model.safetensors")
    ours = pretrained.load(tmp_path)
    assert torch.equal(ours.norm.weight, theirs.model.norm.weight)


def test_a_full_optimizer_step_in_transformers_comes_back(folder, tmp_path):
    """A Llama's attention_bias gives o_proj one too: zeros in our export, trained elsewhere."""
    from transformers import AutoModelForCausalLM

    sentencepiece = tokenizer.load(write_sentencepiece(tmp_path))
    source = tmp_path / "source"
    write_model(source, "qwen2", vocab_size=sentencepiece.vocab_size)
    hf.export(pretrained.load(source), sentencepiece, tmp_path / "out", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(10, 40)[None]
    theirs(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(theirs.parameters(), 0.1).step()
    theirs.save_pretrained(tmp_path / "out")
    ours = pretrained.load(tmp_path / "out")
    assert ours.config.o_bias and ours.layers[0].self_attn.o_proj.bias.any()
    with torch.no_grad():
        expected, got = theirs(ids).logits[0], ours(row_from([ids[0].tolist()]), logits=True)
    assert (expected - got).abs().max() < 1e-4


def test_tied_embeddings_that_differ_are_refused(folder):
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match="differ"):
        pretrained.load(folder)


def test_another_tokenizer_than_the_weights_is_refused(folder, tmp_path):
    other = write_sentencepiece(tmp_path)
    with pytest.raises(InputError, match="gives other ids"):
        pretrained.describe(folder, tokenizer_path=str(other))
    same = tmp_path / "same"
    same.mkdir()
    shutil.copyfile(folder / "qwen.tiktoken", same / "other_name.tiktoken")
    pretrained.describe(folder, tokenizer_path=str(same))


def test_export_refuses_before_it_writes(folder, tmp_path, monkeypatch):
    model, tok = pretrained.load(folder), tokenizer.load(folder)
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


@pytest.mark.parametrize(
    "head, wanted",
    [
        ("---\nlicense: other\nlicense_name: baai-aquila-model-license\ntags: [x]\n---\n# A\n", 2),
        ("---\nlicense: apache-2.0\n---\n", 1),
        ("# A\n\n---\nlicense: not a head\n---\n", 0),
        ("---\ntags: [x]\n---\nlicense: in the text\n", 0),
        (None, 0),
    ],
)
def test_a_card_names_the_licence_of_the_start_and_no_other(head, wanted, folder, tmp_path):
    if head:
        (folder / "README.md").write_text(head)
    model, tok = pretrained.load(folder), tokenizer.load(folder)
    run = tmp_path / "run"
    hf.export(model, tok, run / "export", torch.float32, about={"init": str(folder)})
    # And so does the card of what starts from that run.
    hf.export(model, tok, tmp_path / "next", torch.float32, about={"init": str(run)})
    for out in (run / "export", tmp_path / "next"):
        card = (out / "README.md").read_text()
        lines = card.split("---\n")[1].splitlines()
        licence = [line for line in lines if line.startswith("license")]
        assert licence == (head or "").splitlines()[1 : 1 + wanted]
        assert ("FILL IN" in card) == (not wanted) and card.startswith("---\nlibrary_name")


def test_an_older_export_of_the_run_is_replaced(folder, tmp_path):
    model, tok = pretrained.load(folder), tokenizer.load(folder)
    hf.export(model, tok, tmp_path / "out", torch.float32)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    about = {"stage": "sft", "data": ["hospital/chats.jsonl"], "lr": 2e-6}
    hf.export(model, tok, tmp_path / "out", torch.float32, replace=True, about=about)
    assert (all_tensors(tmp_path / "out")[NORM] == 3).all()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    card = (tmp_path / "out/README.md").read_text()
    assert "chats.jsonl" in card and "hospital" not in card and "lr: 2e-06" in card


def test_the_docs_remedy_for_a_missing_theta_is_the_one_for_its_vocabulary():
    """The folders that lack it are Aquila-7B's and AquilaChat2-7B's; 1000000 is a sibling's."""
    rows = (ROOT / "docs/aquilamed.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith("|") and "guess [rope_theta]" in row]
    assert "100,008" in row and re.search(r'"rope_theta": 10000\.0\b', row) and "1000000" not in row
