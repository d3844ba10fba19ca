"""Every shape that nanomed reads: what transformers computes from the folder, and written again."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomed import hf
from nanomed.hf import pretrained, reading
from nanomed.hf import tensors as hf_tensors
from nanomed.text import tokenizer
from tests.folders import (
    LLAMA31,
    all_tensors,
    assert_same_model,
    edit_config,
    transformers_model,
    write_model,
    write_rank_file,
)

MODELS = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2-bf16-sharded": ("qwen2", {"dtype": torch.bfloat16, "max_shard_size": "60KB"}),
    "llama-fp16": ("llama", {"dtype": torch.float16}),
    "llama-fp64": ("llama", {"dtype": torch.float64}),
    "llama-o-bias": ("llama", {"attention_bias": True, "o_bias": 0.1}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA31}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2-no-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"hidden_size": 66, "head_dim": 32}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "o_bias": 0.1, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", MODELS)
def test_import_is_what_transformers_computes(name, tmp_path):
    kind, changes = MODELS[name]
    write_model(tmp_path, kind, **changes)
    # Loaded again: a model made bfloat16 and back has lost its angles.
    theirs = transformers_model(tmp_path)
    ours = pretrained.load(tmp_path)
    assert_same_model(theirs, ours, 900)
    stored = all_tensors(tmp_path)
    for key, param in ours.named_parameters():
        key = reading.hf_name(key)
        key = "model.embed_tokens.weight" if key not in stored else key
        assert torch.equal(param, stored[key].float()), key


@pytest.mark.parametrize("name", MODELS)
def test_export_of_any_shape_is_what_was_read(name, tmp_path):
    kind, changes = MODELS[name]
    write_model(tmp_path / "in", kind, **changes)
    ours = pretrained.load(tmp_path / "in")
    assert ours.config.n_params() == sum(p.numel() for p in ours.parameters())
    hf.export(ours, tokenizer.load(write_rank_file(tmp_path)), tmp_path / "out", torch.float32)
    assert reading.read_config(tmp_path / "out") == ours.config
    assert_same_model(transformers_model(tmp_path / "out"), ours, 900)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish"},
        {"num_key_value_heads": None},
        {"rope_scaling": LLAMA31 | {"type": "llama3"}, "rope_theta": 5e5},  # and the newer, too
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": True},
    ],
    ids=str,
)
def test_a_llama_by_another_spelling(changes, tmp_path):
    write_model(tmp_path, "llama", num_key_value_heads=4, rope_parameters=LLAMA31)
    theirs = transformers_model(tmp_path)
    edit_config(tmp_path, ("rope_parameters",) if "rope_scaling" in changes else (), **changes)
    assert_same_model(theirs, pretrained.load(tmp_path), 900)


@pytest.mark.parametrize("model_type", ["aquila", "aquila3"])
@pytest.mark.parametrize("spelling", ["old", "new", "both"])
def test_aquilas_own_types_and_both_spellings(model_type, spelling, tmp_path):
    kind = "qwen2" if model_type == "aquila3" else "llama"
    theirs = write_model(tmp_path, kind)
    old = {"rope_theta": 250_000.0, "torch_dtype": "float32"}
    new = ("rope_parameters", "dtype") if spelling == "old" else ()
    edit_config(
        tmp_path, (*new, "head_dim", "attention_bias"), model_type=model_type,
        architectures=["AquilaForCausalLM"], **({} if spelling == "new" else old),
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in (0, 1)}
    save_file(load_file(path) | angles, path)
    assert_same_model(theirs, pretrained.load(tmp_path), 900)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-bf16-sharded"])
def test_exported_in_its_own_dtype_a_folder_is_equal_to_the_byte(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_tensors, "SHARD_BYTES", 60_000 if "sharded" in name else 5 * 10**9)
    kind, changes = MODELS[name]
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, kind, **changes)
    write_rank_file(source)
    dtype = pretrained.dtype_of(source)
    model = pretrained.load(source, torch.device("cpu"), dtype)
    hf.export(model, tokenizer.load(source), out, dtype)
    before, after = all_tensors(source), all_tensors(out)
    assert before.keys() == after.keys() and pretrained.dtype_of(out) == dtype
    for key in before:
        assert before[key].dtype == after[key].dtype == dtype
        assert before[key].view(torch.uint8).equal(after[key].view(torch.uint8)), key
    if name == "qwen2":  # one file: the same file, so our writer writes what safetensors does
        a, b = (folder / "model.safetensors" for folder in (source, out))
        assert a.read_bytes() == b.read_bytes()
    else:
        files = sorted(out.glob("*.safetensors"))
        assert len(files) > 3 and all(path.stat().st_size < 70_000 for path in files[1:-1])


def test_tied_embeddings_become_two_tensors(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    theirs = write_model(source, "llama", tie_word_embeddings=True)
    write_rank_file(source)
    assert "lm_head.weight" not in all_tensors(source)
    hf.export(pretrained.load(source), tokenizer.load(source), out, torch.float32)
    tensors = all_tensors(out)
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "two tensors" in (out / "README.md").read_text()
    assert_same_model(theirs, pretrained.load(out), 900)
