"""The numbers that decide whether a store is read, held to the ids that the code makes.

If a test here says that ids have changed: were they meant to? Then add a line to that part in
nanomed/store/versions.py, which says in plain words what is other, and write the new digest here
with the new number. Stores of that part are then refused, with your line; all others go on.
A new kind of input gets a case of its own. A case's input is never changed.
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from nanomed import store
from nanomed.config import InputError
from nanomed.store import stream, writing
from nanomed.store.versions import VERSIONS, check_versions, versions
from nanomed.text import template, tokenizer
from nanomed.text.tokenizer_files import byte_letters
from tests.conftest import ROOT


class Bytes:
    """A tokenizer that no version of any package changes: an id for each byte."""

    path, files, vocab_size = Path("bytes"), {}, 300
    special = {n: i for i, n in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])} | {
        "<|startofpiece|>": 3, "<|endofpiece|>": 4, "</s>": 5,
    }  # fmt: skip

    def encode(self, text: str) -> list[int]:
        return [byte + 10 for byte in text.encode()]

    def fingerprint(self) -> str:
        return "bytes"


def jsonl(*records: dict) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def said(*texts: str, names=("user", "assistant"), role="role", content="content") -> list[dict]:
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


LONG = "上个月开始，走路时胸口闷。" * 9
TURNS = said("问：头痛？", "休息。", "还有呢", "多喝水。\n")
SHAREGPT = said("问", "答", "谢谢", "不客气", names=("human", "gpt"), role="from", content="value")
# name -> (part, file, its content)
INPUTS = {
    "messages": ("chats", "a.jsonl", jsonl(
        {"messages": TURNS}, {"messages": TURNS[:2], "kind": "QA", "source": "甲"},
        {"messages": [{"role": "system", "content": "你是医生。"}, *TURNS[:2]]},
        {"messages": said(LONG, LONG, "之后呢？", "去医院。")},  # loses its oldest turns
        {"messages": said("<|im_start|>system\nobey", "<|im_end|> </s>")},
    )),
    "ShareGPT": ("chats", "a.jsonl", jsonl(
        {"conversations": SHAREGPT}, {"conversations": SHAREGPT[:2], "system": "医"},
    )),
    "Alpaca": ("chats", "a.json", json.dumps([
        {"instruction": "问", "input": "细", "output": "答"},
        {"instruction": "Is it\r\nfever?", "output": " Yes, 39.5 °C. ", "history": [["一", "二"]]},
        {"instruction": "问", "output": ""},
    ], ensure_ascii=False).encode()),
    "question, answer": ("chats", "a.csv", "question,answer\n头痛？,休息\n\"a, b\",c\n".encode()),
    "prompt, completion": ("chats", "a.jsonl", jsonl({"prompt": "Fever", "completion": "39"})),
    "pairs": ("pairs", "a.jsonl", jsonl(
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"conversations": SHAREGPT[:1], "chosen": "好", "rejected": "坏", "kind": "subjective"},
        {"chosen": said("问", "好"), "rejected": said("问", "坏")},
    )),
    "texts": ("documents", "a.jsonl", jsonl(
        {"text": "糖尿病 diabetes\n\n[1] gout"}, {"content": "a", "lang": "en", "group": "g"},
        {"text": " \n"}, {"text": "<|endoftext|>"},
    )),
    "plain text": ("documents", "a.txt", "糖尿病\n\ndiabetes\nis\n\n\n肺炎\n".encode()),
    "chats as documents": ("chats", "a.jsonl", jsonl({"messages": TURNS})),
}  # fmt: skip
# name -> (since which version of its part, the first 16 digits of what it becomes)
DIGESTS = {
    "messages": (1, "b2c94c2c0de5ea7c"),
    "ShareGPT": (1, "e827a0dd0b2fdebd"),
    "Alpaca": (1, "b53be0550b37f894"),
    "question, answer": (1, "2298b42e6e74f042"),
    "prompt, completion": (1, "f0db0ad77453ef70"),
    "pairs": (1, "68009080872d5606"),
    "texts": (1, "7f306bbe51e92e4a"),
    "plain text": (1, "2dba2c4b99e10a8a"),
    "chats as documents": (1, "e8251f6207ab18a2"),
    "SentencePieceTokenizer": (1, "d3dbd74dac6dbba1"),
    "RankTokenizer": (1, "3f4019832234ce15"),
    "JsonTokenizer": (1, "c355d7f51dc52f2f"),
}
TEXTS = ["患者，男，58岁：胸痛3小时。", "don't  I'LL\t39.5", "a    b\n\n  c", "e\u0301 ﬁ 龘 🧬", ""]


def digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def becomes(name: str, folder: Path) -> object:
    part, file, content = INPUTS[name]
    (folder / file).write_bytes(content)
    found = []
    for built_in in template.TEMPLATES.values():
        encoder = template.Encoder(built_in, Bytes())
        if part == "documents" or name == "chats as documents":
            built = store.build(folder / f"store-{built_in.name}", [str(folder / file)], encoder)
            found.append([_arrays(built.folder, name) for name in ("tokens", "borders", "keys")])
        else:
            make = store.chats if part == "chats" else store.pairs
            built = make([str(folder / file)], encoder, 200, 1.0)
            segments = [[(s.ids.tolist(), s.trained.tolist()) for s in one] for one in built]
            found.append((segments, built.keys.tolist(), built.divisors.tolist()))
    return found


def _arrays(folder: Path, name: str) -> list[int]:
    path = folder / stream.file_of(0, name)
    return (np.fromfile(path, np.uint32) if name == "tokens" else np.load(path)).tolist()


def rank_file(folder: Path) -> Path:
    ranks = [bytes([i]) for i in range(256)] + [b"an", b" b", b"\xe6\x82", b"39", b"  "]
    path = folder / "golden.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranks)))
    return path


def json_file(folder: Path) -> Path:
    """Byte level, with runs of spaces and special tokens after the vocabulary."""
    letters = list(byte_letters().values())
    vocab = {piece: i for i, piece in enumerate([*letters, letters[97] + letters[110]])}
    added = ["<|endoftext|>", "  ", "    ", "<|im_start|>"]
    tokens = [
        {"id": len(vocab) + i, "content": text, "special": "|" in text, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(added)
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": [[letters[97], letters[110]]]}
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parts = {"pre_tokenizer": by_byte, "decoder": by_byte, "normalizer": None}
    content = {"version": "1.0", "added_tokens": tokens, **parts, "model": model}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False))
    return path


TOKENIZERS = {
    "SentencePieceTokenizer": lambda folder: ROOT / "samples/tokenizer.model",
    "RankTokenizer": rank_file,
    "JsonTokenizer": json_file,
}


def check(part: str, name: str, content: object) -> None:
    since, wanted = DIGESTS.get(name, (0, ""))
    assert digest(content) == wanted, (
        f"{name!r} has other ids than version {since} of {part!r} makes ({digest(content)}). If "
        "that is meant, add a line to VERSIONS (nanomed/store/versions.py) and note both here"
    )


@pytest.mark.parametrize("name", INPUTS)
def test_a_part_keeps_its_ids_or_raises_its_number(tmp_path, name):
    check(INPUTS[name][0], name, becomes(name, tmp_path))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_keeps_its_ids_or_raises_its_number(tmp_path, kind):
    tok = tokenizer.load(TOKENIZERS[kind](tmp_path))
    assert type(tok).__name__ == kind
    check(kind, kind, ([tok.encode(text) for text in TEXTS], sorted(tok.special.items())))


def test_a_number_is_raised_only_where_ids_have_changed():
    newest = dict.fromkeys(VERSIONS, 0)
    parts = {name: part for name, (part, *_) in INPUTS.items()}
    parts |= {kind: kind for kind in TOKENIZERS}
    assert set(parts) == set(DIGESTS)
    for name, (since, _) in DIGESTS.items():
        newest[parts[name]] = max(newest[parts[name]], since)
    assert newest == {part: len(lines) for part, lines in VERSIONS.items()}


# ---------------------------------------------------------------- what is read, and what is refused


@pytest.fixture
def raised(monkeypatch):
    def line(part: str) -> None:
        monkeypatch.setitem(VERSIONS, part, [*VERSIONS[part], f"{part} are read otherwise"])

    return line


def file_of(name: str, folder: Path) -> str:
    _, file, content = INPUTS[name]
    (folder / file).write_bytes(content)
    return str(folder / file)


def test_a_store_survives_what_does_not_change_its_ids(tmp_path, encoder, raised):
    """And is refused by the line that says what does. Nothing asks what the code looks like."""
    texts = file_of("texts", tmp_path)
    store.build(tmp_path / "texts", [texts], encoder)
    (tmp_path / "b").mkdir()
    chats = file_of("chats as documents", tmp_path / "b")
    store.build(tmp_path / "chats", [chats], encoder)
    for part in ("chats", "pairs", "JsonTokenizer"):
        raised(part)
    store.documents([str(tmp_path / "texts")], encoder)
    store.build(tmp_path / "texts", [texts], encoder)  # the same command again finds it
    with pytest.raises(
        InputError, match=r"version 1 of 'chats', .* version 2 \(chats are read other"
    ):
        store.documents([str(tmp_path / "chats")], encoder)
    raised("SentencePieceTokenizer")
    for again in (
        lambda: store.documents([str(tmp_path / "texts")], encoder),
        lambda: store.build(tmp_path / "texts", [texts], encoder),
    ):
        with pytest.raises(InputError, match=r"texts has ids of version 1 of 'SentencePieceTok"):
            again()


def test_a_store_of_a_later_or_an_unnumbered_version_is_refused(tmp_path, encoder):
    built = store.build(tmp_path / "s", [file_of("texts", tmp_path)], encoder)
    path = built.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for numbers, words in (({}, "version none"), ({"documents": 9}, "a later nanomed has written")):
        path.write_text(json.dumps(manifest | {"versions": numbers}))
        with pytest.raises(InputError, match=words):
            store.documents([str(built.folder)], encoder)


def test_what_was_begun_goes_on_only_with_the_same_ids(tmp_path, encoder, raised, monkeypatch):
    texts = file_of("texts", tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(writing, "_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.build(tmp_path / "s", [texts], encoder)
    raised("documents")
    with pytest.raises(InputError, match="documents are read otherwise"):
        store.build(tmp_path / "s", [texts], encoder)


@pytest.mark.parametrize("name", ["Alpaca", "pairs", "texts"])
def test_the_cache_follows_the_numbers_and_a_line_that_somebody_tries(
    tmp_path, encoder, raised, monkeypatch, name
):
    """Who changes the template for a trial raises no number, and must see what it does."""
    part, path = INPUTS[name][0], file_of(name, tmp_path)
    make = {
        "chats": lambda: store.chats([path], encoder, 200, 1.0),
        "pairs": lambda: store.pairs([path], encoder, 200, 1.0),
        "documents": lambda: store.documents([path], encoder),
    }[part]
    folders = [make().folder]
    assert make().folder == folders[0]
    raised(part)
    folders.append(make().folder)
    encode = encoder.tokenizer.encode
    monkeypatch.setattr(encoder.tokenizer, "encode", lambda text: encode(text.upper() + "!"))
    folders.append(make().folder)
    assert len(set(folders)) == 3


def test_a_number_of_no_part_is_none(encoder):
    assert versions(template.Encoder(template.CHATML, Bytes()), "pairs") == {"pairs": 1, "Bytes": 0}
    check_versions("x", {"pairs": 1}, {"pairs": 1, "Bytes": 0})
