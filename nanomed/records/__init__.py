"""Records in files and what they become: the readers of every format.

A format is recognised record by record, by its fields, in the order of FORMATS. Adding one is a
line there and a function in chats.py or pairs.py that turns the record into its shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanomed.config import InputError, nearest
from nanomed.records import chats, pairs
from nanomed.records.files import holds_json, read_json, read_lines, read_records
from nanomed.records.shapes import (
    BadField,
    Chat,
    Document,
    PreferencePair,
    Turns,
    excerpt,
    group_of,
    language,
    source_of,
    text_of,
)

__all__ = [
    "BadField", "Chat", "Document", "PreferencePair", "Turns",
    "chats_of", "document_of",
    "is_pair", "pair_of", "read_chats", "read_documents", "read_json", "read_pairs", "read_records",
    "read_texts", "texts_in",
]  # fmt: skip

CHAT, PAIR, DOCUMENT, UNPAIRED, EXAM = "chat", "pair", "document", "unpaired", "exam question"
DESCRIBED = {
    CHAT: "a chat; train_sft.py reads those",
    PAIR: "a preference pair; train_dpo.py reads those",
    DOCUMENT: "a document; train_cpt.py reads those",
    UNPAIRED: "an unpaired preference; nanomed needs a chosen and a rejected answer to each prompt",
    EXAM: "an exam question; it is for evaluation, not for training",
}


@dataclass(frozen=True)
class Format:
    shape: str
    fields: str  # names of which a record has all; `a|b` is either
    convert: Callable[[dict], Any] | None = None
    fits: Callable[[dict], bool] = lambda record: True  # what the names alone do not tell

    @cached_property
    def groups(self) -> list[list[str]]:
        return [names.split("|") for names in self.fields.split()]

    def matches(self, record: dict) -> bool:
        for names in self.groups:
            if all(record.get(name) is None for name in names):
                return False
        return self.fits(record)


def _is_pair(record: dict) -> bool:
    """Not so in Huatuo, where the questions are a list too."""
    return isinstance(record["output"], list) and not isinstance(record.get("instruction"), list)


def _is_unpaired(record: dict) -> bool:
    return record.get("label") in (0, 1)  # also False and True


FORMATS = [
    Format(CHAT, "messages", chats.messages),
    Format(CHAT, "conversations", chats.sharegpt),
    Format(PAIR, "chosen rejected", pairs.chosen_rejected),
    Format(PAIR, "response_chosen response_rejected", pairs.response_pair),
    Format(PAIR, "instruction|input output", pairs.output_pair, _is_pair),
    Format(CHAT, "instruction output", chats.alpaca, lambda r: not _is_pair(r)),
    Format(EXAM, "question options answer"),
    Format(
        CHAT,
        "questions|question|问 answers|answer|答",
        chats.question_answer,
        lambda r: r.get("options") is None,
    ),
    Format(CHAT, "ask answer", chats.toyhom),
    Format(CHAT, "data", chats.question_list, lambda r: isinstance(r["data"], list)),
    Format(UNPAIRED, "prompt completion label", fits=_is_unpaired),
    Format(CHAT, "prompt completion", chats.prompt_completion, lambda r: not _is_unpaired(r)),
    Format(DOCUMENT, "text", lambda r: _document(r, "text")),
    Format(DOCUMENT, "content", lambda r: _document(r, "content")),
]


# ---------------------------------------------------------------- readers


def read_chats(path: str) -> Iterator[tuple[int, Chat, int]]:
    """(record number from 1, chat, bytes read so far) for every chat in a file. A record with
    several wordings of a question gives one chat for each.

    Raises InputError naming file, record and field at the first record that cannot be read.
    """
    for number, record, n_bytes in read_records(path):
        for chat in _naming_record(path, number, chats_of, record):
            yield number, chat, n_bytes


def read_pairs(path: str) -> Iterator[tuple[int, PreferencePair, int]]:
    """(record number from 1, pair, bytes read so far) for every preference pair in a file; raises
    as read_chats does."""
    for number, record, n_bytes in read_records(path):
        yield number, _naming_record(path, number, pair_of, record), n_bytes


def read_documents(path: str, text_key: str = "") -> Iterator[tuple[int, Document, int]]:
    """(record number from 1, document, bytes read so far) for every document in a file. `text_key`
    names the field with the text ("": `text`, else `content`). Raises as read_chats does."""
    for number, record, n_bytes in read_texts(path, text_key):
        yield number, _naming_record(path, number, document_of, record, text_key), n_bytes


def read_texts(path: str, text_key: str = "") -> Iterator[tuple[int, Any, int]]:
    """The same with each record as it stands in the file, for texts_in() to read. A .txt file has
    one document on each line, unless it holds JSON."""
    if path.removesuffix(".gz").endswith(".txt") and not holds_json(path):
        return ((n, {text_key or "text": line}, n_bytes) for n, line, n_bytes in read_lines(path))
    return read_records(path)


def texts_in(
    path: str, number: int, record: Any, text_key: str = ""
) -> list[Document] | list[Chat]:
    """What a record gives to continued pre-training: its document; a chat's record, which has no
    document's field, its chats. Raises InputError naming file, record and field."""
    named = text_key or not isinstance(record, dict) or _first(record, DOCUMENT)
    if not named and _first(record, CHAT):
        return _naming_record(path, number, chats_of, record)
    return [_naming_record(path, number, document_of, record, text_key)]


def _naming_record(path: str, number: int, convert: Callable, *arguments: Any) -> Any:
    try:
        return convert(*arguments)
    except BadField as bad:
        raise InputError(f"{path}, record {number}: {bad}") from None


def chats_of(record: Any) -> list[Chat]:
    """The chats in one record of any format. Raises BadField."""
    return [chats.checked(chat, record) for chat in _format_of(record, CHAT).convert(record)]


def pair_of(record: Any) -> PreferencePair:
    """The preference pair in one record of any format. Raises BadField."""
    return pairs.checked(_format_of(record, PAIR).convert(record), record)


def is_pair(record: dict) -> bool:
    return any(known.shape == PAIR and known.matches(record) for known in FORMATS)


def document_of(record: Any, text_key: str = "") -> Document:
    """The document in one record. Raises BadField."""
    if not text_key:
        return _format_of(record, DOCUMENT).convert(record)
    if not isinstance(record, dict) or text_key not in record:
        raise BadField(text_key, f"not in this record, which is {excerpt(record)}")
    return _document(record, text_key)


def _document(record: dict, key: str) -> Document:
    text = text_of(record[key], key)
    named = record.get("lang")
    plain = {k: v for k, v in record.items() if isinstance(v, str | int | float) and k != key}
    return Document(
        text,
        source_of(record),
        named if isinstance(named, str) else language(text),
        group_of(record, text),
        labels=plain,
        dropped="" if text.strip() else "empty text",
    )


# ---------------------------------------------------------------- recognising


def _format_of(record: Any, wanted: str) -> Format:
    """The first format of the wanted shape. Raises BadField, saying what the record is instead."""
    if not isinstance(record, dict):
        raise BadField("(record)", f"expected an object, found {excerpt(record)}")
    if known := _first(record, wanted):
        return known
    if found := _first(record):
        raise BadField("(record)", f"no {wanted}, this is {DESCRIBED[found.shape]}")
    raise BadField("(record)", _unknown_format(record, wanted))


def _first(record: dict, shape: str = "") -> Format | None:
    """The first format that a record has; of one shape, if one is named."""
    asked = (known for known in FORMATS if shape in ("", known.shape))
    return next((known for known in asked if known.matches(record)), None)


def _unknown_format(record: dict, wanted: str) -> str:
    names = [name[:40] for name in record]
    found = ", ".join(map(repr, names[:12])) or "none"
    if len(names) > 12:
        found += f" and {len(names) - 12} more"
    fields = [known.fields for known in FORMATS if known.shape == wanted]
    fields.sort(key=lambda f: -sum(bool(nearest(n, names[:50])) for n in f.split()))
    known = "; ".join(f.replace(" ", " + ") for f in fields)
    return f"unknown fields; found {found}; known, the nearest first: {known}"
