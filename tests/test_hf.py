"""Round trips through folders that transformers wrote and reads, and what a damaged folder says."""

import base64
import json
import random
import shutil
import struct
import unicodedata
from pathlib import Path

import pytest
import torch
from folders import (
    AQUILA,
    SPECIAL_TEXTS,
    TEXTS,
    random_texts,
    write_model,
    write_rank_file,
    write_sentencepiece,
)
from safetensors.torch import load_file, save_file

from nanomed import hf, hf_convert, hf_tensors, pretrained, tokenizer
from nanomed.config import InputError
from nanomed.generate import Sampling, generate
from nanomed.packing import row_from
from nanomed.records import Chat
from nanomed.template import Encoder, fitting

# kind of tokenizer -> (architecture of an export with bias, of one without)
KINDS = {
    "ranks": ("Qwen2ForCausalLM", "LlamaForCausalLM"),
    "sentencepiece": ("LlamaForCausalLM", "LlamaForCausalLM"),
    "aquila": ("LlamaForCausalLM", "LlamaForCausalLM"),
}


def write_tokenizer(folder: Path, kind: str) -> None:
    if kind == "ranks":
        write_rank_file(folder)
    elif kind == "sentencepiece":
        write_sentencepiece(folder)
    else:
        if not AQUILA.is_dir():
            pytest.skip("the real tokenizer is not here")
        for path in AQUILA.iterdir():
            shutil.copyfile(path, folder / path.name)


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_of(folder):
    from transformers import AutoTokenizer

    return transformers_model(folder), AutoTokenizer.from_pretrained(folder)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def edit_config(folder: Path, drop=(), **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def assert_same_model(theirs, ours, vocab_size: int) -> None:
    ids = torch.randint(0, vocab_size, (33,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        got = ours(row_from([ids.tolist()]), logits=True)
    assert (expected - got).abs().max() < 1e-4
    new = theirs.generate(
        ids[None, :9], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert (
        generate(ours, [ids[:9].tolist()], set(), Sampling(max_new=20))[0][0] == new[0, 9:].tolist()
    )


# ---------------------------------------------------------------- round trips

MODELS = {
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen2-bf16-sharded": ("qwen2", {"dtype": torch.bfloat16, "max_shard_size": "60KB"}),
    "llama-fp16": ("llama", {"dtype": torch.float16}),
}


@pytest.mark.parametrize("name", MODELS)
def test_import_is_what_transformers_computes(name, tmp_path):
    kind, changes = MODELS[name]
    write_model(tmp_path, kind, **changes)
    # Loaded again: a model made bfloat16 and back has lost its angles.
    theirs = transformers_model(tmp_path)
    ours = hf.load(tmp_path)
    assert_same_model(theirs, ours, 900)
    stored = all_tensors(tmp_path)
    for key, param in ours.named_parameters():
        key = hf.hf_name(key)
        key = "model.embed_tokens.weight" if key not in stored else key
        assert torch.equal(param, stored[key].float()), key


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
    assert_same_model(theirs, hf.load(tmp_path), 900)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_export_loads_in_transformers_with_no_custom_code(kind, bias, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_tokenizer(source, kind)
    tok = tokenizer.load(source)
    write_model(source, "qwen2" if bias else "llama", vocab_size=tok.vocab_size + 3)
    model = hf.load(source)
    hf.export(model, tok, out, torch.float32)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [KINDS[kind][0 if bias else 1]]
    theirs, theirs_tok = transformers_of(out)
    assert_same_model(theirs, model, tok.vocab_size)
    assert_same_model(theirs, hf.load(out), tok.vocab_size)

    before, after = all_tensors(source), all_tensors(out)
    extra = after.keys() - before.keys()
    assert all(name.endswith("o_proj.bias") and not after[name].any() for name in extra)
    assert bool(extra) == (bias and KINDS[kind][0] == "LlamaForCausalLM")
    assert all(torch.equal(before[name], after[name]) for name in before)

    check_tokenizer(tok, theirs_tok, nfc=kind == "ranks")
    check_generation_config(out, theirs, theirs_tok)
    assert tokenizer.same(tokenizer.load(out), tok)  # and nanomed reads its own export
    card = (out / "README.md").read_text()
    assert "Licence Agreement" in card and "not a medical device" in card.lower()


def check_tokenizer(tok, theirs, nfc: bool) -> None:
    for text in [*TEXTS, *random_texts(1000)]:
        assert theirs.encode(text, add_special_tokens=False) == tok.encode(text), text
        assert theirs.encode(text) == tok.encode(text), "something is put around every text"
    encoder = Encoder(fitting(tok), tok)
    for chat in random_chats(200):
        ids = encoder.chat(chat, 100_000)[0]
        prompt_ids = encoder.prompt(Chat(chat.turns[:-1], chat.system))
        for wanted, turns, add in [(ids, chat.turns, False), (prompt_ids, chat.turns[:-1], True)]:
            messages = [{"role": role, "content": text} for role, text in turns]
            if chat.system:
                messages.insert(0, {"role": "system", "content": chat.system})
            rendered = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add
            )
            rendered_nfc = unicodedata.normalize("NFC", rendered) if nfc else rendered
            assert rendered_nfc == tok.decode(wanted)
            if not any(name in text for name in SPECIAL_TEXTS for _, text in chat.turns):
                assert theirs.encode(rendered, add_special_tokens=False) == wanted


def random_chats(n: int) -> list[Chat]:
    rng = random.Random(0)
    texts = [t for t in TEXTS + random_texts(100) if t.strip()] + [
        '{{ "quoted" }} {% if %}',
        "\\n'",
    ]
    chats = []
    for i in range(n):
        turns = [(r, rng.choice(texts)) for _ in range(1 + i % 4) for r in ("user", "assistant")]
        chats.append(Chat(turns, system=rng.choice(["", "", *texts])))
    return chats


def check_generation_config(out: Path, model, tok) -> None:
    """Pitfall 19: a served model must stop, at ids that the exported tokenizer has."""
    generation = json.loads((out / "generation_config.json").read_text())
    template = json.loads((out / "template.json").read_text())
    names = dict.fromkeys((template["turn_end"], template["document_end"]))
    assert generation["eos_token_id"] == [tok.convert_tokens_to_ids(name) for name in names]
    assert model.generation_config.eos_token_id == generation["eos_token_id"]
    assert all(tok.decode([i]) in names for i in generation["eos_token_id"])


def test_a_wrong_chat_template_is_noticed(tmp_path):
    """The comparison above can fail: one newline less in the template, and it does."""
    tok = tokenizer.load(write_rank_file(tmp_path))
    write_model(tmp_path, "qwen2")
    hf.export(hf.load(tmp_path), tok, tmp_path / "out", torch.float32)
    path = tmp_path / "out/tokenizer_config.json"
    path.write_text(path.read_text().replace("|im_end|>\\\\n", "|im_end|>"))
    with pytest.raises(AssertionError):
        check_tokenizer(tok, transformers_of(tmp_path / "out")[1], nfc=True)


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


def test_the_whole_aquilamed_has_387_tensors():
    from nanomed.config import MODELS as SHAPES
    from nanomed.model import Aquila

    with torch.device("meta"):
        model = Aquila(SHAPES["aquilamed-7b"])
    specs = hf._specs(model, torch.bfloat16, is_qwen2=True)
    assert len(specs) == 387 and model.config.n_params() == 8_223_748_096
    shards = hf_tensors.plan(specs)
    assert max(sum(s.n_bytes for s in members) for _, members in shards) <= 5 * 10**9
    assert [name for name, _ in shards][-1] == "model-00004-of-00004.safetensors"


def test_tied_embeddings_become_two_tensors(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    theirs = write_model(source, "llama", tie_word_embeddings=True)
    write_rank_file(source)
    assert "lm_head.weight" not in all_tensors(source)
    hf.export(hf.load(source), tokenizer.load(source), out, torch.float32)
    tensors = all_tensors(out)
    assert tensors["lm_head.weight"].equal(tensors["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert "two tensors" in (out / "README.md").read_text()
    assert_same_model(theirs, hf.load(out), 900)


def bin_folder(folder: Path, shards: int = 2) -> dict[str, torch.Tensor]:
    write_model(folder, "llama", dtype=torch.bfloat16)
    write_rank_file(folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    names = [f"pytorch_model-{i}.bin" for i in range(shards)]
    parts = {name: dict(list(tensors.items())[i::shards]) for i, name in enumerate(names)}
    for name, part in parts.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_bin_folders_are_converted_by_their_own_command(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tensors = bin_folder(source)
    with pytest.raises(InputError, match=r"python -m nanomed\.hf convert"):
        pretrained.describe(source)
    hf_convert.convert(source, out)
    assert {k: v.dtype for k, v in all_tensors(out).items()} == {
        k: v.dtype for k, v in tensors.items()
    }
    assert all(tensors[k].equal(v) for k, v in all_tensors(out).items())
    hf.load(out)
    assert not list(out.glob("*.bin*")) and (out / "qwen.tiktoken").exists()


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_bin_file_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    bin_folder(source)
    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model-1.bin")
    with pytest.raises(InputError, match=r"pytorch_model-1\.bin cannot be read as plain tensors"):
        hf_convert.convert(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


# ---------------------------------------------------------------- faults


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "in", "qwen2", max_shard_size="100KB")
    write_rank_file(tmp_path / "in")
    return tmp_path / "in"


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit_index(folder: Path, **changes) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def edit_tensor(folder: Path, name: str, change) -> None:
    path = shard_with(folder, name)
    tensors = load_file(path)
    save_file({k: change(v) if k == name else v for k, v in tensors.items()}, path)


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
