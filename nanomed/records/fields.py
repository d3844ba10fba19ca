"""The names that fields go by, and the ledger of those that hold text and are not read."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from nanomed.config import InputError, nearest

# What a field is called here, and what else it is called in files. --fields adds to this.
NAMES = {
    "messages": "conversations conversation",
    "question": "questions Question query 问",
    "answer": "answers Answer response Response target anwer 答",
    "text": "content",
    "chosen": "response_chosen",
    "rejected": "response_rejected rejected_response rejected_messages",
    "options": "option Options choices",
    "answer_idx": "answer_key answerKey correct_answer cop",
    "explanation": "Explanation exp",
    **{x: f"op{x.lower()} option_{x.lower()} option{x}" for x in "ABCDEFGHIJ"},
}
KNOWN_AS = {other: name for name, others in NAMES.items() for other in others.split()}
# These say what a record is, not what is to be learned. So does any field without a letter: a
# number, a date, a truth value.
LABELS = {
    *("id", "_id", "idx", "index", "uid", "uuid", "url", "group", "source", "kind", "type"),
    *("lang", "language", "label", "department", "category", "tags"),
    "nanomed",  # what build_corpus.py and build_sft.py know of a record
}


def filled(value: Any) -> bool:
    """Whether a field holds anything: null is empty."""
    return value is not None and value != "" and value != [] and value != {}


def given(record: dict, names: Iterable[str]) -> str:
    """The first of several fields that is filled; else the first that is there; "" if none is."""
    first = ""
    for name in names:
        if name in record:
            if filled(record[name]):
                return name
            first = first or name
    return first


def by_known_names(record: dict) -> tuple[dict, dict[str, str]]:
    """(the record with its fields under their known names, known name -> the file's own). Of
    several fields with the same known name one gets it, and the others keep theirs: a filled one
    before an empty one, then the one that the file itself calls so."""
    if not KNOWN_AS.keys() & record.keys():
        return record, {}
    own: dict[str, str] = {}
    for name in sorted(record, key=lambda name: (not filled(record[name]), name in KNOWN_AS)):
        own.setdefault(KNOWN_AS.get(name, name), name)
    rest = {name: record[name] for name in record if name not in own.values()}
    return rest | {known: record[name] for known, name in own.items()}, own


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a value of JSON, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from strings_in(child)


def holds_text(value: Any) -> bool:
    return any(c.isalpha() for string in strings_in(value) for c in string)


def unread(record: dict, read: Collection[str]) -> list[str]:
    """The fields that hold text, are no labels, and are not among those that are read."""
    return [
        name
        for name, value in record.items()
        if name not in read and name not in LABELS and holds_text(value)
    ]


# ---------------------------------------------------------------- --fields


def naming(fields: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """A file's name -> the known one, from the KNOWN=THEIRS of --fields. Raises InputError."""
    names = {}
    for entry in fields:
        ours, _, theirs = entry.partition("=")
        if not theirs or ours not in known:
            raise InputError(
                f"--fields {entry}: expected KNOWN=THEIRS, where THEIRS is a field of the file and "
                f"KNOWN a name in docs/formats.md{nearest(ours, known)}"
            )
        names[theirs] = ours
    return names


def renamed(record: Any, names: dict[str, str]) -> Any:
    """A record, or a turn, with its fields and its roles under the names that --fields gives them.
    A field whose name another one takes is kept under one that no reader knows."""
    if not names or not isinstance(record, dict):
        return record
    taken = {names[name] for name in record if name in names}
    result = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = [renamed(entry, names) for entry in value]
        new = names.get(name) or (f"{name} (the file's own)" if name in taken else name)
        result[new] = value
    for key in ("role", "from"):
        if isinstance(role := result.get(key), str):
            result[key] = names.get(role, names.get(role.lower(), role))
    return result
