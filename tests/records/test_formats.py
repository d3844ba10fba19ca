"""Every format of data file gets its normal form, and what cannot be read is refused by name."""

import json

import pytest

from nanomed.config import InputError
from nanomed.records import (
    FORMATS,
    BadField,
    chats_of,
    document_of,
    pair_of,
    read_chats,
    read_documents,
    read_pairs,
)
from nanomed.records.files import read_csv
from tests.conftest import ROOT
from tests.formats import CHATS, DOCUMENTS, PAIRS, gpt, jsonl


@pytest.fixture
def file(tmp_path):
    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def differs_from_default(shape, names) -> dict:
    values = {name: getattr(shape, name) for name in names}
    return {name: value for name, value in values.items() if value}


@pytest.mark.parametrize("name", CHATS)
def test_chats(name, file):
    file_name, content, expected = CHATS[name]
    names = ("system", "source", "context", "raw", "notes", "dropped")
    chats = [chat for _, chat, _ in read_chats(file(file_name, content))]
    assert [(c.turns, differs_from_default(c, names)) for c in chats] == expected


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, file):
    file_name, content, expected = PAIRS[name]
    names = ("system", "source", "kind", "raw", "notes", "dropped")
    for (_, pair, _), (*values, rest) in zip(
        read_pairs(file(file_name, content)), expected, strict=True
    ):
        assert [pair.turns, pair.chosen, pair.rejected] == values
        group = rest.pop("group", pair.turns[0][1].replace("\n", ""))
        assert differs_from_default(pair, names) == rest and pair.group == group
        rest["group"] = group


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents(name, file):
    file_name, content, expected = DOCUMENTS[name]
    documents = [d for _, d, _ in read_documents(file(file_name, content))]
    assert [(d.text, d.lang) for d in documents] == [(text, lang) for text, lang, _ in expected]
    for document, (_, _, rest) in zip(documents, expected, strict=True):
        assert differs_from_default(document, rest) == rest


def test_every_format_has_a_fixture(file):
    """Each line of FORMATS is met by some record above; two are there to be refused."""
    refused = [{"question": "a", "options": {}, "answer": "A"}]
    refused += [{"prompt": "a", "completion": "b", "label": True}]
    records = [*refused, {"text": "a"}, {"content": "a"}, {"ask": "a", "answer": "b"}]
    for name, content, _ in (*CHATS.values(), *PAIRS.values()):
        if not name.endswith(".csv"):
            text = content.decode()
            rows = json.loads(text) if text[0] == "[" else map(json.loads, text.splitlines())
            records += rows
    first = [next(f for f in FORMATS if f.matches(r)) for r in records]
    assert all(known in first for known in FORMATS)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "convert, record, message",
    [
        (chats_of, {"prompt": "a", "completion": "b", "label": False}, "unpaired preference"),
        (pair_of, {"prompt": "a", "completion": "b", "label": True}, "a chosen and a rejected"),
        (chats_of, {"instruction": "a", "output": ["b", "c"]}, "no chat, .* train_dpo.py"),
        (pair_of, {"instruction": "a", "output": "b"}, "no pair, this is a chat; train_sft.py"),
        (pair_of, {"instruction": "a", "output": ["b"]}, "'output': expected .* found 1"),
        (pair_of, {"instruction": "a", "output": ["b", 3]}, r"'output\[1\]': expected text"),
        (pair_of, {"chosen": "a b", "rejected": "a c"}, "'prompt': none is given"),
        (pair_of, {"chosen": [], "rejected": []}, "'chosen': no turn"),
        (pair_of, {"chosn": "a", "rejected": "b"}, "nearest first: chosen [+] rejected"),
        (document_of, {"txt": "a"}, "found 'txt'; known, the nearest first: text"),
        (document_of, {"messages": []}, "no document, this is a chat"),
        (chats_of, {"text": "a"}, "train_cpt.py reads those"),
        (chats_of, {"question": "a", "options": {}, "answer": "A"}, "an exam question"),
        (chats_of, {"data": ["x"]}, r"'data\[0\]': expected 问"),
        (chats_of, {"conversations": gpt("问"), "chosen": "a", "rejected": "b"}, "train_dpo.py"),
        (chats_of, {"prompt": [], "completion": []}, "'completion': no assistant turn"),
        (chats_of, {"questions": [[["a"]]], "answers": ["b"]}, "lists within lists"),
    ],
)  # fmt: skip
def test_what_a_reader_refuses(convert, record, message):
    with pytest.raises(BadField, match=message):
        convert(record)


def test_a_named_text_key(file):
    path = file("a.jsonl", jsonl({"body": "痛风", "text": "x"}, {"text": "y"}))
    with pytest.raises(InputError, match=r"a.jsonl, record 2: field 'body': not in this record"):
        list(read_documents(path, "body"))
    assert next(read_documents(path, "body"))[1].text == "痛风"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"ask,answer\na\n", r"record 1 \(line 2\): 1 columns, but the header has 2"),
        ("a.csv", b'ask,answer\na,"b\nc,d\n', "after record 0: unexpected end of data"),
        ("a.csv", b"ask,ask\na,b\n", "the header names a column twice"),
        ("a.csv", b"ask,answer\n", "holds no record"),
        ("a.csv", "ask,answer\n糖,糖".encode("gb18030")[:-1], "after record 0: 'gb18030'"),
        ("a.parquet", b"PAR1", "pip install pyarrow"),
        ("a.json", b"1" * 5000, "record 1: Exceeds the limit"),
    ],
)
def test_files_that_cannot_be_read(file, name, content, message):
    with pytest.raises(InputError, match=message):
        list(read_chats(file(name, content)))


def test_empty_rows_of_a_csv_file_are_none(file):
    path = file("a.csv", b"\nask,answer\n\na,b\n\n")
    assert [(i, row) for i, row, _ in read_csv(path)] == [(1, {"ask": "a", "answer": "b"})]


def test_every_format_is_documented():
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8").replace("\\|", "|")
    for known in FORMATS:
        if known.convert:
            assert "| " + " + ".join(f"`{f}`" for f in known.fields.split()) + " |" in text
