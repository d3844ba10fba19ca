"""Records in files and what they become: the readers of every format.

A format is recognised record by record, by its fields, in the order of FORMATS. Adding one is a
line there and a function in chats.py or pairs.py that turns the record into its shape.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from nanomed.config import InputError, nearest
from nanomed.records import chats, exams, files, pairs
from nanomed.records.fields import (
    LABELS,
    by_known_names,
    filled,
    given,
    holds_text,
    naming,
    renamed,
    unread,
)
from nanomed.records.files import read_json
from nanomed.records.shapes import (
    BadField,
    Chat,
    Document,
    PreferencePair,
    Turns,
    blank,
    excerpt,
    group_of,
    language,
    source_of,
    text_of,
)
from nanomed.records.turns import MARKS, NO, OPENING, QUESTION, ROLES, TURN, YES, main_question

__all__ = [
    "CHAT", "DOCUMENT", "PAIR", "BadField", "Chat", "Document", "PreferencePair", "Turns",
    "chats_of", "examples_in", "examples_of", "names_of", "pair_of",
    "read_chats", "read_json", "read_pairs", "read_records", "texts_in",
]  # fmt: skip

CHAT, PAIR, DOCUMENT = "chat", "pair", "document"
DESCRIBED = {
    CHAT: "a chat; train_sft.py reads those",
    PAIR: "a preference pair; train_dpo.py reads those",
    DOCUMENT: "a document; train_cpt.py reads those",
}
CHECKED = {CHAT: chats.checked, PAIR: pairs.checked, DOCUMENT: lambda document, record: document}


@dataclass(frozen=True)
class Format:
    shape: str
    fields: str  # names of which a record has all; of `a|b` the first that is filled is read
    convert: Callable[[dict], Any]
    besides: Iterable[str] = ()  # names of what is read where it is there
    fits: Callable[[dict], bool] = lambda record: True  # what the names alone do not tell

    @cached_property
    def groups(self) -> list[list[str]]:
        return [names.split("|") for names in self.fields.split()]

    def n_filled(self, record: dict) -> int:
        """How many of the fields it needs hold something; -1 if one is not even there."""
        names = self.needed_in(record)
        return sum(filled(record[n]) for n in names) if all(names) and self.fits(record) else -1

    def matches(self, record: dict) -> bool:
        return self.n_filled(record) == len(self.groups)

    def needed_in(self, record: dict) -> list[str]:
        return [given(record, names) for names in self.groups]


def _is_pair(record: dict) -> bool:
    """Not so in Huatuo, where the questions are a list too."""
    is_list = isinstance(record.get("output"), list)
    return is_list and not isinstance(record.get("instruction"), list)


def _document(record: dict) -> list[Document]:
    document = Document(text_of(record["text"], "text"))
    # What records call their languages has no end; the report knows three.
    named = record.get("lang")
    document.lang = named if named in ("zh", "en") else language(document.text)
    document.source, document.group = source_of(record), group_of(record, document.text)
    document.dropped = "empty text" * blank(document.text)
    return [document]


ASKED = (*OPENING, "instruction", "context", "input")
ITEM = (*ASKED, *exams.KEYS, "explanation")
FORMATS = [
    Format(CHAT, "messages", chats.dialogue, (*OPENING, "instruction")),
    Format(PAIR, "chosen rejected", pairs.chosen_rejected, (*OPENING, *pairs.PROMPTS)),
    Format(PAIR, "messages|answer rejected", pairs.rejected_beside, (*OPENING, *pairs.PROMPTS)),
    Format(PAIR, "instruction|input output", pairs.output_pair, (*OPENING, *QUESTION), _is_pair),
    Format(CHAT, "question|instruction answer_idx|answer|output options", chats.exam, ITEM),
    Format(CHAT, "question|instruction answer_idx|answer|output A B", chats.exam,
           (*ITEM, *exams.LETTERS), exams.in_columns),
    Format(CHAT, "question|prompt|instruction|input answer|output", chats.question_answer,
           ASKED, lambda record: not _is_pair(record)),
    Format(CHAT, "ask answer", chats.toyhom, (*OPENING, "title")),
    Format(CHAT, "data", chats.question_list, OPENING, lambda r: isinstance(r["data"], list)),
    Format(CHAT, "prompt completion", chats.prompt_completion, OPENING),
    Format(DOCUMENT, "text", _document),
]  # fmt: skip
KNOWN = {n for f in FORMATS for n in (*re.split("[ |]", f.fields), *f.besides)}


def names_of(fields: Iterable[str]) -> dict[str, str]:
    """What --fields gives: a file's name -> the known one. Raises InputError."""
    return naming(fields, {*KNOWN, *LABELS, *ROLES, *TURN, *MARKS})


# ---------------------------------------------------------------- readers


def read_records(path: str, fields: Iterable[str] = ()) -> Iterator[tuple[int, Any, int]]:
    """(number from 1, record, bytes read so far) for every record in a file of any kind, its fields
    under the names that they are known by; `fields` has those of --fields. Raises InputError."""
    names = names_of(fields)
    return ((n, renamed(record, names), size) for n, record, size in files.read_records(path))


def read_chats(path: str, fields: Iterable[str] = ()) -> Iterator[tuple[int, Chat, int]]:
    """(record number from 1, chat, bytes read so far) for every chat in a file. A record with
    several wordings of a question gives one chat for each.

    Raises InputError naming file, record and field at the first record that cannot be read.
    """
    return _examples(path, fields, CHAT)


def read_pairs(path: str, fields: Iterable[str] = ()) -> Iterator[tuple[int, PreferencePair, int]]:
    """(record number from 1, pair, bytes read so far) for every preference pair in a file; raises
    as read_chats does."""
    return _examples(path, fields, PAIR)


def _examples(path: str, fields: Iterable[str], shape: str) -> Iterator[tuple[int, Any, int]]:
    for number, record, n_bytes in read_records(path, fields):
        for example in _naming_record(path, number, record, shape):
            yield number, example, n_bytes


def texts_in(path: str, number: int, record: Any) -> list[Document] | list[Chat]:
    """What a record gives to continued pre-training: its document; a chat's record, which has no
    document's field, its chats. Raises InputError naming file, record and field."""
    return _naming_record(path, number, record, DOCUMENT, CHAT)


def examples_in(path: str, number: int, record: Any) -> list[PreferencePair | Chat | Document]:
    """What a record of any kind gives to the stage that it is for: a pair, its chats, or its
    document. Raises InputError as texts_in() does."""
    return _naming_record(path, number, record, PAIR, CHAT, DOCUMENT, expected=CHAT)


def _naming_record(path: str, number: int, record: Any, *shapes: str, expected: str = "") -> Any:
    try:
        return examples_of(record, *shapes, expected=expected)
    except BadField as bad:
        raise InputError(f"{path}, record {number}: {bad}") from None


def chats_of(record: Any) -> list[Chat]:
    """The chats in one record of any format. Raises BadField."""
    return examples_of(record, CHAT)


def pair_of(record: Any) -> PreferencePair:
    """The preference pair in one record of any format. Raises BadField."""
    return examples_of(record, PAIR)[0]


def examples_of(record: Any, *shapes: str, expected: str = "") -> list[Any]:
    """What a record holds, of the first of these shapes that it has; with the first thing goes the
    ledger of what was not read. Raises BadField: a record of none of them is refused as no
    `expected`, by default the first of them."""
    if not isinstance(record, dict):
        raise BadField("(record)", f"expected an object, found {excerpt(record)}")
    fields, own = by_known_names(record)
    known = _first(fields, *shapes)
    shape = known.shape if known else expected or shapes[0]
    try:
        if shape == CHAT or not known:
            _refuse_unpaired(fields)
        if not known:
            _refuse(record, fields, shape)
        found = [CHECKED[shape](one, fields) for one in known.convert(fields)]
    except BadField as bad:
        raise BadField(_own_name(bad.name, own), bad.problem) from None
    left = found[0].unread + unread(fields, {*known.needed_in(fields), *known.besides})
    found[0].unread = [_own_name(name, own) for name in left]
    return found


def _own_name(place: str, own: dict[str, str]) -> str:
    """`answer[2]` as the file calls it: `response[2]`."""
    name = re.match(r"[^\[.]*", place)[0]
    return own.get(name, name) + place[len(name) :]


def _first(record: dict, *shapes: str) -> Format | None:
    """The first format whose fields a record fills; of these shapes, if any are named. If there is
    none, the one that it fills best: null is an empty text, and its record is dropped as such."""
    asked = _formats(*shapes)
    for known in asked:
        if known.matches(record):
            return known
    best = max(asked, key=lambda known: known.n_filled(record))
    return best if best.n_filled(record) >= 0 else None


@cache
def _formats(*shapes: str) -> list[Format]:
    return [known for shape in shapes or DESCRIBED for known in FORMATS if known.shape == shape]


# ---------------------------------------------------------------- refusals


def _refuse_unpaired(record: dict) -> None:
    """Raises BadField for an answer that is marked as good or bad (KTO): a bad one would be learned
    like a good one."""
    for name in ("kto_tag", "label"):
        if str(record.get(name)).lower() in NO | YES and _first(record, CHAT):
            raise BadField(
                name,
                f"{excerpt(record[name])} makes this an unpaired preference; nanomed needs a "
                "chosen and a rejected answer to each prompt. If it says something else: "
                f"--fields kind={name}",
            )


def _refuse(record: dict, fields: dict, wanted: str) -> None:
    """Raises BadField, saying what the record is instead."""
    if other := _first(fields):
        raise BadField("(record)", f"no {wanted}, this is {DESCRIBED[other.shape]}")
    names = [name[:40] for name in record]
    found = ", ".join(map(repr, names[:12])) or "none"
    if len(names) > 12:
        found += f" and {len(names) - 12} more"
    formats = [known.fields for known in FORMATS if known.shape == wanted]
    formats.sort(key=lambda f: -sum(bool(nearest(n, names[:50])) for n in re.split("[ |]", f)))
    known = "; ".join(f.replace(" ", " + ") for f in formats)
    raise BadField(
        "(record)",
        f"unknown fields; found {found}; known, the nearest first: {known}. To read them under "
        f"these names: {_flag(fields, wanted)}",
    )


def _flag(fields: dict, wanted: str) -> str:
    """The flag that would read the record, as far as its fields let us guess."""
    there = {"question": main_question(fields), "answer": given(fields, ("answer", "output"))}
    needed = {CHAT: ["question", "answer"], PAIR: ["question", "chosen", "rejected"]}
    missing = [n for n in needed.get(wanted, ["text"]) if not there.get(n, n in fields)]
    left = [n for n, v in fields.items() if n not in LABELS and n not in KNOWN and holds_text(v)]
    turns = [n for n in left if isinstance(fields[n], list) and isinstance(fields[n][0], dict)]
    if turns and wanted == CHAT:
        keys = [key for key, value in fields[turns[0]][0].items() if isinstance(value, str)]
        missing, left = ["messages", "role", "content"], [turns[0], *keys]
    pairs = [f"{ours}={theirs}" for ours, theirs in zip(missing, left, strict=False)]
    return "--fields " + (" ".join(pairs) or "KNOWN=THEIRS ...")
