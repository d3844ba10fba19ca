"""Every format of data file gets its normal form, and what cannot be read is refused by name."""

import json
import re

import pytest

from nanomed.config import InputError
from nanomed.records import (
    FORMATS,
    BadField,
    chats_of,
    pair_of,
    read_chats,
    read_pairs,
)
from nanomed.records.fields import LABELS, NAMES, by_known_names
from nanomed.records.files import read_records
from nanomed.records.turns import MARKS, ROLES
from tests.conftest import ROOT
from tests.formats import CHATS, DOCUMENTS, PAIRS, document_of, gpt, jsonl, read_documents


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
    names = ("system", "source", "untrained", "raw", "notes", "unread", "dropped")
    chats = [chat for _, chat, _ in read_chats(file(file_name, content))]
    assert [(c.turns, differs_from_default(c, names)) for c in chats] == expected


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, file):
    file_name, content, expected = PAIRS[name]
    names = ("system", "source", "kind", "raw", "notes", "unread", "dropped")
    for (_, pair, _), (*values, rest) in zip(
        read_pairs(file(file_name, content)), expected, strict=True
    ):
        assert [pair.turns, pair.chosen, pair.rejected] == values
        said = "".join(text for role, text in pair.turns if role == "user")
        group = rest.pop("group", said.replace("\n", ""))
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
    """Each line of FORMATS reads some record above, or one of these."""
    records = [{"text": "a"}, {"ask": "a", "answer": "b"}]
    records.append({"question": "a", "options": ["b", "c"], "answer": "A"})
    records.append({"question": "a", "A": "b", "B": "c", "answer": "A"})
    records.append({"query": "a", "response": "b", "rejected_response": "c"})
    for name, content, _ in (*CHATS.values(), *PAIRS.values()):
        if not name.endswith(".csv"):
            text = content.decode()
            rows = json.loads(text) if text[0] == "[" else map(json.loads, text.splitlines())
            records += rows
    known = [by_known_names(record)[0] for record in records]
    first = [next(f for f in FORMATS if f.matches(record)) for record in known]
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
        (chats_of, {"question": "a", "options": ["b", "c"], "answer": 1}, "an exam question"),
        (chats_of, {"data": ["x"]}, r"'data\[0\]': expected 问"),
        (chats_of, {"conversations": gpt("问"), "chosen": "a", "rejected": "b"}, "train_dpo.py"),
        (chats_of, {"prompt": [], "completion": []}, "'completion': no assistant turn"),
        (chats_of, {"questions": [[["a"]]], "answers": "b"}, "'questions': lists within lists"),
    ],
)  # fmt: skip
def test_what_a_reader_refuses(convert, record, message):
    with pytest.raises(BadField, match=message):
        convert(record)


def test_a_named_text_key(file):
    path = file("a.jsonl", jsonl({"body": "痛风", "text": "x"}, {"body": "痛"}))
    documents = [d for _, d, _ in read_documents(path, ["text=body"])]
    assert [(d.text, d.unread) for d in documents] == [
        ("痛风", ["text (the file's own)"]),
        ("痛", []),
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"ask,answer\na\n", r"record 1 \(line 2\): 1 columns, but the header has 2"),
        ("a.csv", b'ask,answer\na,"b\nc,d\n', "after record 0: unexpected end of data"),
        ("a.csv", b"ask,ask\na,b\n", "the header names a column twice"),
        ("a.csv", b"ask,answer\n", "holds no record"),
        ("a.csv", "ask,answer\n痛，是吗,是的".encode("gb18030")[:-1], "after record 0: 'gb18030'"),
        ("a.parquet", b"PAR1", "a.parquet: .*size is 4 bytes"),
        ("a.json", b"1" * 5000, "record 1: Exceeds the limit"),
    ],
)
def test_files_that_cannot_be_read(file, name, content, message):
    with pytest.raises(InputError, match=message):
        list(read_chats(file(name, content)))


def test_empty_rows_of_a_csv_file_are_none(file):
    path = file("a.csv", b"\nask,answer\n\na,b\n\n")
    assert [(i, row) for i, row, _ in read_records(path)] == [(1, {"ask": "a", "answer": "b"})]


# ---------------------------------------------------------------- docs/formats.md


def cells(section: str) -> list[list[str]]:
    """The cells of the tables in a section, without their heads."""
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8").replace("\\|", "¦")
    (found,) = re.findall(rf"^## {section}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    lines = [line for line in found.splitlines() if line.startswith("| `")]
    return [
        [cell.strip().replace("¦", "|") for cell in line.strip("|").split("|")] for line in lines
    ]


def coded(cell: str) -> list[str]:
    return re.findall("`(.*?)`", cell)


@pytest.mark.parametrize(
    "section, shape", [("Chats", "chat"), ("Preference pairs", "pair"), ("Documents", "document")]
)
def test_the_page_has_every_format_and_no_other(section, shape):
    rows = [row for row in cells(section) if len(row) == 3]
    known = [known.fields.split() for known in FORMATS if known.shape == shape]
    assert [coded(fields) for fields, *_ in rows] == known


def test_the_page_has_every_role_and_no_other():
    rows = [row for row in cells("Chats") if len(row) == 2]
    assert {role: meaning for names, meaning in rows for role in coded(names)} == ROLES


def test_the_page_has_every_name_and_label_and_no_other():
    rows = {coded(known)[0]: coded(others) for known, others in cells("Names")}
    letters = {x for x in NAMES if len(x) == 1}
    words = {name: others.split() for name, others in NAMES.items() if name not in letters}
    assert rows == words | {"A": NAMES["A"].split()} and letters == set("ABCDEFGHIJ")
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    labels = text.split("of these names:")[1].split("Counted as")[0]
    assert coded(labels) == sorted(LABELS)
    marks = text.split("A turn of the assistant whose")[1].split("is 0 or false")[0]
    assert tuple(coded(marks)) == MARKS
