"""Records in files and what they become: the readers of every format.

A file is a JSON array, JSON lines, or either as .gz; it is streamed, never held whole. A format is
recognised record by record, by its fields, in the order of CHAT_FORMATS: adding one is a line
there and a function that turns the record into turns.
"""

import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from nanomed.config import InputError, nearest

CHUNK = 1 << 20  # characters read at a time
MAX_RECORD = 64 << 20  # characters; a larger record is a broken file
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}


class BadField(Exception):
    """A record's field cannot be used; the reader adds file and record number."""

    def __init__(self, name: str, problem: str):
        super().__init__(f"field {name!r}: {problem}")


@dataclass
class Chat:
    """Turns alternate freely between user and assistant; the first is a user's, the last an
    assistant's."""

    turns: list[tuple[str, str]]  # (role, text)
    system: str = ""  # "" takes the template's own
    group: str = ""  # all chats of a group stand on the same side of the validation split
    notes: list[str] = field(default_factory=list)  # what reading it changed, for the report
    dropped: str = ""  # why it cannot be trained on, "" if it can


def read_chats(path: str) -> Iterator[tuple[int, Chat, int]]:
    """(record number from 1, chat, bytes read so far) for every chat in a file. A record with
    several wordings of a question gives one chat for each.

    Raises InputError naming file, record and field at the first record that cannot be read.
    """
    for number, record, n_bytes in read_json(path):
        try:
            for chat in chats_of(record):
                yield number, chat, n_bytes
        except BadField as bad:
            raise InputError(f"{path}, record {number}: {bad}") from None


def chats_of(record: Any) -> list[Chat]:
    """The chats in one record of any format. Raises BadField."""
    if not isinstance(record, dict):
        raise BadField("(record)", f"expected an object, found {_excerpt(record)}")
    for fields, convert in CHAT_FORMATS:
        if all(record.get(name) is not None for name in fields):
            group = record.get("group", "")
            return [_checked(chat, group) for chat in convert(record)]
    raise BadField("(record)", _unknown_format(record))


# ---------------------------------------------------------------- formats


def _messages(record: dict) -> list[Chat]:
    """OpenAI: {"messages": [{"role": ..., "content": text or parts}, ...]}."""
    return [_from_turns(record, "messages", "role", "content")]


def _sharegpt(record: dict) -> list[Chat]:
    """ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}."""
    return [_from_turns(record, "conversations", "from", "value")]


def _alpaca(record: dict) -> list[Chat]:
    """Alpaca with optional history; question and answer may be lists (Huatuo): every wording of
    the question with the first answer."""
    turns = []
    for i, pair in enumerate(record.get("history") or []):
        name = f"history[{i}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadField(name, f"expected [question, answer], found {_excerpt(pair)}")
        turns += [("user", _text(pair[0], name)), ("assistant", _text(pair[1], name))]
    extra = _text(record.get("input") or "", "input")
    answers = _texts(record["output"], "output")
    if isinstance(record["output"], list) and isinstance(record["instruction"], str):
        raise BadField("output", "a list of answers is a preference pair: train_dpo.py reads those")
    system = _text(record.get("system") or "", "system")
    questions = [
        f"{question}\n{extra}" if extra else question
        for question in _texts(record["instruction"], "instruction")
    ]
    return [Chat([*turns, ("user", q), ("assistant", answers[0])], system) for q in questions]


def _question_answer(question: str, answer: str):
    def convert(record: dict) -> list[Chat]:
        answers = _texts(record[answer], answer)
        questions = _texts(record[question], question)
        return [Chat([("user", q), ("assistant", answers[0])]) for q in questions]

    return convert


CHAT_FORMATS = [
    (("messages",), _messages),
    (("conversations",), _sharegpt),
    (("instruction", "output"), _alpaca),
    (("questions", "answers"), _question_answer("questions", "answers")),
    (("question", "answer"), _question_answer("question", "answer")),
    (("问", "答"), _question_answer("问", "答")),
]


def _from_turns(record: dict, name: str, role_key: str, text_key: str) -> Chat:
    entries = record[name]
    if not isinstance(entries, list):
        raise BadField(name, f"expected a list of turns, found {_excerpt(entries)}")
    chat = Chat([], _text(record.get("system") or "", "system"))
    for i, entry in enumerate(entries):
        where = f"{name}[{i}]"
        if not isinstance(entry, dict) or role_key not in entry or text_key not in entry:
            raise BadField(
                where, f"expected {role_key!r} and {text_key!r}, found {_excerpt(entry)}"
            )
        role = ROLES.get(entry[role_key]) if isinstance(entry[role_key], str) else None
        if role is None:
            raise BadField(
                f"{where}.{role_key}",
                f"unknown role {_excerpt(entry[role_key])}; known: {', '.join(ROLES)}"
                + nearest(entry[role_key], ROLES),
            )
        text = _text(entry[text_key], f"{where}.{text_key}")
        if role != "system":
            chat.turns.append((role, text))
        elif i == 0:
            chat.system = text
        else:
            raise BadField(f"{where}.{role_key}", "a system turn can only be the first")
    return chat


def _checked(chat: Chat, group: Any) -> Chat:
    """Drops what frames no answer, and says so; decides whether the chat can be trained on."""
    if not any(role == "assistant" for role, _ in chat.turns):
        raise BadField("(turns)", "no assistant turn, so there is nothing to train on")
    while chat.turns[0][0] == "assistant":
        chat.turns.pop(0)
        chat.notes.append("assistant turn before the first question dropped")
        if not chat.turns:
            raise BadField("(turns)", "no user turn, so there is nothing to answer")
    while chat.turns[-1][0] == "user":
        chat.turns.pop()
        chat.notes.append("user turn after the last answer dropped")
        if not chat.turns:
            raise BadField("(turns)", "no answer follows a question")
    empty = {role for role, text in chat.turns if not text.strip()}
    chat.dropped = "empty answer" if "assistant" in empty else "empty question" if empty else ""
    chat.group = _text(group, "group") if group else _bare(chat.turns[0][1])
    return chat


def _bare(text: str) -> str:
    """A question without spaces and punctuation: rewritten copies still share a group."""
    return "".join(c for c in text if unicodedata.category(c)[0] not in "ZPC")


def _texts(value: Any, name: str) -> list[str]:
    """A text, or the texts of a list, nested or not."""
    if not isinstance(value, list):
        return [_text(value, name)]
    texts = [text for item in value for text in _texts(item, name)]
    if not texts:
        raise BadField(name, "an empty list")
    return texts


def _text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # OpenAI parts
        parts = [p.get("text") for p in value if isinstance(p, dict) and p.get("type") == "text"]
        if len(parts) != len(value):
            raise BadField(name, f"only parts of type text can be trained on: {_excerpt(value)}")
        value = "".join(_text(part, name) for part in parts)
    if not isinstance(value, str):
        raise BadField(name, f"expected text, found {_excerpt(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadField(
            name,
            f"a lone surrogate {value[error.start]!a} at character {error.start} is not text: "
            "the file was cut inside an emoji; mend or remove it",
        ) from None
    return value


def _unknown_format(record: dict) -> str:
    found = ", ".join(map(repr, record)) or "none"
    by_overlap = sorted(
        (" + ".join(fields) for fields, _ in CHAT_FORMATS),
        key=lambda names: -sum(bool(nearest(n, record)) for n in names.split(" + ")),
    )
    known = "; ".join(by_overlap)
    return f"unknown fields; found {found}; known, the nearest first: {known}"


def _excerpt(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------- files


def read_json(path: str) -> Iterator[tuple[int, Any, int]]:
    """(number from 1, value, bytes read so far) for each element of a JSON array, or each of the
    JSON values that follow one another in a file (JSON lines). Raises InputError."""
    number = 0
    try:
        with open(path, "rb") as raw:
            binary = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            text = io.TextIOWrapper(binary, encoding="utf-8-sig")
            for number, value in enumerate(_values(path, text), 1):
                yield number, value, raw.tell()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}, after record {number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if number == 0:
        raise InputError(f"{path} holds no record: the file is empty")


def _values(path: str, file: TextIO) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    buffer = file.read(CHUNK)
    position = len(buffer) - len(buffer.lstrip())
    array = buffer[position : position + 1] == "["
    position += array
    number, closed, comma_due = 1, False, False
    while not closed:
        position = _NOT_SPACE.search(buffer, position).start()
        if position == len(buffer):
            buffer, position = file.read(CHUNK), 0
            if buffer:
                continue
            break
        if array and buffer[position] == "]":
            closed = True
        elif array and comma_due:
            if buffer[position] != ",":
                raise InputError(f"{path}, after record {number - 1}: expected ',' or ']'")
            position, comma_due = position + 1, False
        else:
            try:
                value, position = decode(buffer, position)
            except RecursionError:
                raise InputError(f"{path}, record {number}: nested too deep") from None
            except json.JSONDecodeError as error:
                more = _may_go_on(error, buffer, position) and file.read(CHUNK + len(buffer))
                if not more:
                    near = buffer[max(position, error.pos - 30) : error.pos + 30]
                    problem = f"broken JSON: {error.msg} near {near!r}"
                    raise InputError(f"{path}, record {number}: {problem}") from None
                buffer, position = buffer[position:] + more, 0
                continue
            yield value
            number, comma_due = number + 1, array
    if array and not closed:
        raise InputError(f"{path}, after record {number - 1}: the array is cut off, no ']'")
    if (buffer[position + 1 :] + file.read(CHUNK)).strip():
        raise InputError(f"{path}: text after the array's end")


_NOT_SPACE = re.compile(r"[^ \t\r\n]|\Z")


def _may_go_on(error: json.JSONDecodeError, buffer: str, position: int) -> bool:
    """Whether the value may be whole once more of the file is read: then the decoder fails at the
    buffer's end, or in a string without one."""
    at_end = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated")
    return at_end and len(buffer) - position <= MAX_RECORD
