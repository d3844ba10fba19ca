"""Exam questions: a question, lettered options, and the letters of the right ones.

Training and evaluation read such records and put them into words in the same way. How an item is
worded is data: see WORDINGS.
"""

import re
from dataclasses import dataclass
from typing import Any

from nanomed.records.fields import KNOWN_AS, by_known_names, filled, given
from nanomed.records.shapes import BadField, Chat, excerpt, language, text_of
from nanomed.records.turns import main_question, user_text


@dataclass(frozen=True)
class Exam:
    question: str
    options: dict[str, str]  # letter -> text, from A on without a gap
    answers: str  # the right letters in the options' order: "C", "ABD"
    explanation: str = ""
    context: str = ""  # a text that the question is about
    system: str = ""


@dataclass(frozen=True)
class Wording:
    """Plain strings with named fields."""

    question: str  # {context}, {question} and {options}
    option: str  # {letter} and {text}
    answer: str  # {letters} and {texts}
    letters: str = ", "  # between the letters of a multiple answer
    texts: str = "; "  # between its texts
    context: str = "{context}\n"  # left out where there is none
    options: str = "\n"  # between the options


WORDINGS = {
    "zh": Wording(
        "{context}{question}\n{options}", "{letter}. {text}", "{letters}。{texts}", "、", "；"
    ),
    "en": Wording("{context}{question}\n{options}", "{letter}. {text}", "{letters}. {texts}"),
}


def render(exam: Exam, wording: Wording | None = None) -> Chat:
    """The item as a chat: the question with its options, then the right letters with their texts
    and the explanation, if there is one. By default in the wording of the question's language."""
    words = wording or wording_for(exam)
    texts = words.texts.join(exam.options[letter] for letter in exam.answers)
    answer = words.answer.format(letters=words.letters.join(exam.answers), texts=texts)
    if exam.explanation:
        answer += "\n" + exam.explanation
    return Chat([("user", asked(exam, words)), ("assistant", answer)], exam.system)


def asked(exam: Exam, wording: Wording) -> str:
    """The question with its options, as it is asked."""
    options = [wording.option.format(letter=k, text=v) for k, v in exam.options.items()]
    return wording.question.format(
        context=wording.context.format(context=exam.context) if exam.context else "",
        question=exam.question,
        options=wording.options.join(options),
    )


def wording_for(exam: Exam) -> Wording:
    """Of the question's language; English for all that is not Chinese."""
    return WORDINGS["zh" if language(exam.question) == "zh" else "en"]


# ---------------------------------------------------------------- reading

LETTERS = "ABCDEFGHIJ"
MARK = re.compile(r"\(?([A-J])\s*[.．、:：)）]\s*")
BARE = re.compile(r"\W*[a-j]\W*|[\W_]*[A-J](?:[\W_]*[A-J])*[\W_]*")  # "c", "(C)", "ABD", "A、B"
KEYS = ("answer_idx", "answer", "output")  # what says which option is right


def options_of(record: dict) -> dict[str, str] | None:
    """letter -> text of the options in a record: in one field (an object, a list or marked lines)
    or in a column each. None if there are none. Raises BadField where they are there and it is not
    certain which letter is whose."""
    record, _ = by_known_names(record)
    if not filled(record.get("options")):
        return _in_order({letter: record.get(letter) for letter in LETTERS})
    if found := _listed(record["options"]):
        return found
    raise BadField("options", f"not clear as options A, B, ...: {excerpt(record['options'])}")


def _listed(value: Any) -> dict[str, str] | None:
    if isinstance(value, str):
        return _in_lines(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # ARC
        return _in_order(dict(zip(value.get("label") or LETTERS, value["text"], strict=False)))
    if isinstance(value, dict):
        return _in_order({str(key).strip().upper(): text for key, text in value.items()})
    if not isinstance(value, list) or len(value) > len(LETTERS):
        return None
    entries = dict(zip(LETTERS, value, strict=False))
    if all(isinstance(entry, dict) for entry in value):  # [{"key": "A", "value": ...}, ...]
        texts = {k: [v for v in entry.values() if v != k] for k, entry in entries.items()}
        if any(len(found) != 1 for found in texts.values()):
            return None
        entries = {letter: text for letter, (text,) in texts.items()}
    elif all(isinstance(entry, str) and MARK.match(entry) for entry in value):
        return _in_lines("\n".join(value))
    return _in_order(entries)


def _in_lines(value: str) -> dict[str, str] | None:
    """Lines that begin with A., B., ...; a line without its letter goes on with the one before."""
    options: dict[str, str] = {}
    for line in filter(None, map(str.strip, value.splitlines())):
        match = MARK.match(line) or re.match(r"([A-J])\s+", line)
        if match and match[1] == LETTERS[len(options) : len(options) + 1]:
            options[match[1]] = line[match.end() :]
        elif options:
            options[list(options)[-1]] += "\n" + line
        else:
            return None
    return _in_order(options)


def _in_order(options: dict[Any, Any]) -> dict[str, str] | None:
    """The options from A on, without empty ones at the end. None if there are not two, if one is
    missing, or if one is no plain text."""
    given = {k: str(v) for k, v in sorted(options.items()) if v is not None and str(v).strip()}
    plain = all(isinstance(options[letter], str | int | float) for letter in given)
    return given if plain and len(given) > 1 and LETTERS.startswith("".join(given)) else None


def in_columns(record: dict) -> bool:
    """Whether columns A, B, ... are options: the answer can name one of them."""
    options, answer = options_of(record), record[given(record, KEYS)]
    bare = BARE.fullmatch(str(answer)) or str(answer).strip().isdigit()
    return bool(options) and bool(bare or letters_of(answer, options))


def exam_of(record: dict) -> Exam | None:
    """The exam question in a record of any of these layouts; None if it has no options. Raises
    BadField where it is not certain how they or the answer are meant."""
    record, _ = by_known_names(record)
    if not (options := options_of(record)):
        return None
    readings = {key: letters_of(record[key], options) for key in KEYS if filled(record.get(key))}
    if len({*readings.values()}) != 1 or "" in readings.values():
        raise BadField(
            next(iter(readings), "answer"),
            f"an exam question, and {excerpt([record[key] for key in readings])} does not say "
            f"which of its options {', '.join(options)} is right: write the letter",
        )
    main = main_question(record)
    alone = {name: value for name, value in record.items() if name != "context"}
    return Exam(
        user_text(alone, main, text_of(record.get(main), main)),
        options,
        readings.popitem()[1],
        *(text_of(record.get(name), name) for name in ("explanation", "context", "system")),
    )


def letters_of(answer: Any, options: dict[str, str]) -> str:
    """The letters that an answer names, in the options' order. It may be "C", "(C)", "opc", "ABD",
    "A、B、D", ["A", "D"], or an option's whole text, with its letter or without. "" if it is not
    certain: it names none, or can be read in two ways, as a number can (from 0 or from 1?)."""
    if isinstance(answer, list):
        parts = [letters_of(part, options) for part in answer]
        found = "".join(parts)
        return _sorted(found, options) if all(parts) else ""
    if not isinstance(answer, str) or answer.strip().isdigit():
        return ""
    text = answer.strip()
    readings = {k for k, option in options.items() if option.strip().lower() == text.lower()}
    if (match := MARK.match(text)) and options.get(match[1], "").strip() == text[match.end() :]:
        readings.add(match[1])
    if text in KNOWN_AS or BARE.fullmatch(text):
        readings.add(_sorted(KNOWN_AS.get(text) or re.sub(r"[\W_]", "", text).upper(), options))
    return readings.pop() if len(readings) == 1 else ""


def _sorted(letters: str, options: dict[str, str]) -> str:
    """The letters in order; "" if one is no option's or stands twice."""
    known = set(letters) <= set(options) and len(set(letters)) == len(letters)
    return "".join(sorted(letters)) if known else ""
