"""What a record becomes, whatever its format: a chat, a preference pair or a document."""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Turns = list[tuple[str, str]]  # (role "user" or "assistant", text)


class BadField(Exception):
    """A record's field cannot be used; the reader adds file and record number."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"field {name!r}: {problem}")
        self.name, self.problem = name, problem


@dataclass(kw_only=True)
class Example:
    """What is known of each, whatever its shape."""

    group: str = ""  # all examples of a group stand on the same side of the validation split
    source: str = ""  # what the record says of where it comes from or what kind it is
    notes: list[str] = field(default_factory=list)  # what reading it changed, for the report
    unread: list[str] = field(default_factory=list)  # the record's fields of text not read
    dropped: str = ""  # why it cannot be trained on, "" if it can


@dataclass
class Chat(Example):
    """Turns alternate freely between user and assistant; the first is a user's, the last an
    assistant's."""

    turns: Turns
    system: str = ""  # "" takes the template's own
    untrained: set[int] = field(default_factory=set)  # turns whose answers are not learned
    raw: bool = False  # a text and its continuation, with no template around them

    def texts(self) -> list[str]:
        return [text for _, text in self.turns]


@dataclass
class PreferencePair(Chat):
    """A chat whose last turn is a user's, and two answers to it."""

    chosen: str = ""
    rejected: str = ""
    kind: str = ""  # "subjective" or "objective" where the record says so

    def texts(self) -> list[str]:
        return [*super().texts(), self.chosen, self.rejected]


@dataclass
class Document(Example):
    """A text to learn as it stands."""

    text: str
    lang: str = ""  # zh or en if the record says so, else as language() sees it

    def texts(self) -> list[str]:
        return [self.text]


# ---------------------------------------------------------------- values of fields


def text_of(value: Any, name: str) -> str:
    """A text, or the text parts of an OpenAI message; None is "". Raises BadField."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [p.get("text") for p in value if isinstance(p, dict) and p.get("type") == "text"]
        if len(parts) != len(value) or not all(isinstance(part, str) for part in parts):
            raise BadField(name, f"only parts of type text can be read: {excerpt(value)}")
        value = "".join(parts)
    if not isinstance(value, str):
        raise BadField(name, f"expected text, found {excerpt(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(
            name,
            f"a lone surrogate {value[error.start]!a} at character {error.start} is not text: a "
            "byte that is no UTF-8, or half of an emoji; mend or remove it",
        ) from None
    return value


def texts_of(value: Any, name: str, depth: int = 0) -> list[str]:
    """A text, or the texts of a list, nested at most once."""
    if not isinstance(value, list):
        return [text_of(value, name)]
    if depth == 2:
        raise BadField(name, "lists within lists within lists")
    texts = [text for item in value for text in texts_of(item, name, depth + 1)]
    if not texts:
        raise BadField(name, "an empty list")
    return texts


def json_of(value: Any) -> Any:
    """A list of objects or of lists that a CSV file holds as JSON; all else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "[[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def blank(text: str) -> bool:
    """Whether there is no visible character in it."""
    return all(map(_is_invisible, text))


@cache
def _is_invisible(c: str) -> bool:
    """White space, a control or format character, or a letter or mark that is blank by its
    definition."""
    blanks = "\u034f\u115f\u1160\u2800\u3164\uffa0"
    if c in blanks or "\ufe00" <= c <= "\ufe0f":
        return True
    return unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf")


def group_of(record: dict, questions: str) -> str:
    """The record's own group, else all that its user says, without spaces and punctuation:
    rewritten copies still share a group."""
    return label_of(record, "group") or words_of(questions)


def words_of(text: str) -> str:
    """Without spaces and punctuation."""
    return text.translate(_WORDS)


def label_of(record: dict, name: str) -> str:
    """A text or a number."""
    value = record.get(name)
    return str(value) if isinstance(value, int | float) else text_of(value, name)


class _Words(dict):
    """Of each character whether str.translate keeps it: spaces, punctuation and controls go. The
    category is looked up once; documents are hashed whole."""

    def __missing__(self, code: int) -> int | None:
        kept = unicodedata.category(chr(code))[0] not in "ZPC"
        self[code] = code if kept else None
        return self[code]


_WORDS = _Words()


def source_of(record: dict) -> str:
    named = (record.get(name) for name in ("source", "kind"))
    return next((str(v) for v in named if isinstance(v, str | int) and v != ""), "")


_CHINESE, _LATIN = re.compile("[\u4e00-\u9fff]"), re.compile("[A-Za-z]+")


def language(text: str) -> str:
    """`zh`, `en` or `other`, by whether its first 1,000 characters hold more Chinese characters or
    more Latin words: a Chinese text full of English terms is still Chinese."""
    start = text[:1000]
    chinese, latin = len(_CHINESE.findall(start)), len(_LATIN.findall(start))
    return "other" if chinese == latin == 0 else "zh" if chinese >= latin else "en"


def excerpt(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except RecursionError:
        return "a value nested too deep to show"
    return text if len(text) <= 80 else text[:77] + "..."
