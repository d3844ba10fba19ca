"""Round trips through folders that transformers wrote and reads, and what a damaged folder says."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanomed import hf
from nanomed.config import InputError
from nanomed.hf import convert as hf_convert
from nanomed.hf import pretrained, writing
from nanomed.hf import tensors as hf_tensors
from nanomed.hf.tokenizer import tokenizer_json
from nanomed.records import Chat
from nanomed.text import tokenizer
from nanomed.text.template import Encoder, fitting
from tests.folders import (
    AQUILA,
    SPECIAL_TEXTS,
    TEXTS,
    all_tensors,
    assert_same_model,
    random_texts,
    transformers_model,
    write_model,
    write_rank_file,
    write_sentencepiece,
)

# kind of tokenizer -> (architecture of an export with bias, of one without)
KINDS = {
    "ranks": ("Qwen2ForCausalLM", "LlamaForCausalLM"),
    "json": ("Qwen2ForCausalLM", "LlamaForCausalLM"),  # Qwen's as tokenizer.json
    "sentencepiece": ("LlamaForCausalLM", "LlamaForCausalLM"),
    "aquila": ("LlamaForCausalLM", "LlamaForCausalLM"),
}


def write_tokenizer(folder: Path, kind: str) -> None:
    if kind == "ranks":
        write_rank_file(folder)
    elif kind == "json":
        content = tokenizer_json(tokenizer.load(path := write_rank_file(folder)))
        path.unlink()
        # As many published files do: a begin token in front of every text. It is the template's
        # to put one there, so an export must not.
        begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        i = content["model"]["vocab"]["<|endoftext|>"]
        one = {"id": "<|endoftext|>", "ids": [i], "tokens": ["<|endoftext|>"]}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, text],
            "special_tokens": {"<|endoftext|>": one},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif kind == "sentencepiece":
        write_sentencepiece(folder)
    else:
        if not AQUILA.is_dir():
            pytest.skip("the real tokenizer is not here")
        for path in AQUILA.iterdir():
            shutil.copyfile(path, folder / path.name)


def transformers_of(folder):
    from transformers import AutoTokenizer

    return transformers_model(folder), AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "kind, bias",
    [
        ("ranks", True),
        ("ranks", False),
        ("json", True),
        ("json", False),
        ("sentencepiece", True),
        ("sentencepiece", False),
        ("aquila", True),
    ],
)
def test_export_loads_in_transformers_with_no_custom_code(kind, bias, tmp_path):
    """Weights, ids, stop tokens, chat template, for every kind of tokenizer."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_tokenizer(source, kind)
    tok = tokenizer.load(source)
    write_model(source, "qwen2" if bias else "llama", vocab_size=tok.vocab_size + 3)
    model = pretrained.load(source)
    hf.export(model, tok, out, torch.float32)

    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [KINDS[kind][0 if bias else 1]]
    theirs, theirs_tok = transformers_of(out)
    assert_same_model(theirs, model, tok.vocab_size)
    assert_same_model(theirs, pretrained.load(out), tok.vocab_size)

    before, after = all_tensors(source), all_tensors(out)
    extra = after.keys() - before.keys()
    assert all(name.endswith("o_proj.bias") and not after[name].any() for name in extra)
    assert bool(extra) == (bias and KINDS[kind][0] == "LlamaForCausalLM")
    assert all(torch.equal(before[name], after[name]) for name in before)

    n_texts = 1000 if bias else 100  # the tokenizer is the same one
    check_tokenizer(tok, theirs_tok, kind in ("ranks", "json"), n_texts)
    check_generation_config(out, theirs, theirs_tok)
    check_no_begin_token(out)
    assert tokenizer.same(tokenizer.load(out), tok)  # and nanomed reads its own export
    card = (out / "README.md").read_text()
    assert "FILL IN" in card and "not a medical device" in card.lower()


def check_no_begin_token(out: Path) -> None:
    """llama.cpp converts what stands here; without it, a token is put before every text."""
    assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is False


def check_tokenizer(tok, theirs, nfc: bool, n_texts: int = 1000) -> None:
    for text in [*TEXTS, *random_texts(n_texts)]:
        assert theirs.encode(text, add_special_tokens=False) == tok.encode(text), text
        assert theirs.encode(text) == tok.encode(text), "something is put around every text"
    for text in ("<unk>", "a <unk>b", "<0x41>"):  # no template's tokens: typed, they stay text
        assert theirs.encode(text) == tok.encode(text)
    encoder = Encoder(fitting(tok), tok)
    for chat in random_chats(n_texts // 5):
        ids, trained, _ = encoder.chat(chat, 100_000)
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
                if not add:
                    found = theirs.apply_chat_template(
                        messages, return_dict=True, return_assistant_tokens_mask=True
                    )
                    assert found["input_ids"] == ids
                    assert found["assistant_masks"] == [int(flag) for flag in trained]


def random_chats(n: int) -> list[Chat]:
    rng = random.Random(0)
    texts = [t for t in TEXTS + random_texts(100) if t.strip()] + [
        '{{ "quoted" }} {% if %}',
        "\\n'",
        *("\n你好", "\n\n\nx", " \n y", "\r\nz\n"),  # a line break of the template's comes before
    ]
    chats = []
    for i in range(n):
        turns = [(r, rng.choice(texts)) for _ in range(1 + i % 4) for r in ("user", "assistant")]
        chats.append(Chat(turns, system=rng.choice(["", "", *texts])))
    return chats


def check_generation_config(out: Path, model, tok) -> None:
    """A served model must stop, at ids that the exported tokenizer has."""
    generation = json.loads((out / "generation_config.json").read_text())
    template = json.loads((out / "template.json").read_text())
    names = dict.fromkeys((template["turn_end"], template["document_end"]))
    assert generation["eos_token_id"] == [tok.convert_tokens_to_ids(name) for name in names]
    assert model.generation_config.eos_token_id == generation["eos_token_id"]
    assert all(tok.decode([i]) in names for i in generation["eos_token_id"])
    sampled = {name: generation[name] for name in ("do_sample", "temperature", "top_p")}
    assert sampled == {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    # Nothing that changes a greedy answer.
    assert generation.keys() - sampled.keys() == {"eos_token_id", "pad_token_id"}


def test_a_wrong_chat_template_is_noticed(tmp_path):
    """The comparison above can fail: one newline less in the template, and it does."""
    tok = tokenizer.load(write_rank_file(tmp_path))
    write_model(tmp_path, "qwen2")
    hf.export(pretrained.load(tmp_path), tok, tmp_path / "out", torch.float32)
    path = tmp_path / "out/tokenizer_config.json"
    path.write_text(path.read_text().replace("|im_end|>\\\\n", "|im_end|>"))
    with pytest.raises(AssertionError):
        check_tokenizer(tok, transformers_of(tmp_path / "out")[1], nfc=True)


def test_the_whole_aquilamed_has_387_tensors():
    from nanomed.config import MODELS as SHAPES
    from nanomed.model.decoder import Aquila

    with torch.device("meta"):
        model = Aquila(SHAPES["aquilamed-7b"])
    specs = writing._specs(model, torch.bfloat16, is_qwen2=True)
    assert len(specs) == 387 and model.config.n_params() == 8_223_748_096
    shards = hf_tensors.plan(specs)
    assert max(sum(s.n_bytes for s in members) for _, members in shards) <= 5 * 10**9
    assert [name for name, _ in shards][-1] == "model-00004-of-00004.safetensors"


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
    (source / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match=r"python -m nanomed\.hf convert"):
        pretrained.describe(source)
    hf_convert.convert(source, out)
    assert {k: v.dtype for k, v in all_tensors(out).items()} == {
        k: v.dtype for k, v in tensors.items()
    }
    assert all(tensors[k].equal(v) for k, v in all_tensors(out).items())
    pretrained.load(out)
    assert not list(out.glob("*.bin*"))
    assert (out / "qwen.tiktoken").exists() and (out / "chat_template.jinja").exists()


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
