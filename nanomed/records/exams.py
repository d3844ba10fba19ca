"""Exam questions: a question, lettered options, and the letters of the right ones.

Training and evaluation read such records and put them into words in the same way. How an item is
worded is data: see WORDINGS.
"""

import re
from dataclasses import dataclass
from typing import Any

from nanomed.records.shapes import BadField, Chat, excerpt, language, text_of


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

OPTIONS = ("options", "option", "choices")
# A column of one option: A, opa, option_a, optionA.
COLUMN = re.compile("([A-J])|(?:op|option_?)([a-jA-J])")
MARK = re.compile(r"\(?([A-J])\s*[.．、:：)）]\s*")
LETTERS = "ABCDEFGHIJ"
ASKED = ("question", "Question", "instruction", "query")
KEYS = ("answer_idx", "answer_key", "answerKey", "cop", "answer", "Answer", "output", "response")
EXPLANATIONS = ("explanation", "Explanation", "exp")


def options_of(record: dict) -> dict[str, str] | None:
    """letter -> text of the options in a record: in one field (an object, a list or marked lines)
    or in a column each. None if there are none. Raises BadField where they are there and it is not
    certain which letter is whose."""
    for name in OPTIONS:
        if record.get(name):
            found = _listed(record[name])
            if not found:
                raise BadField(name, f"not clear as options A, B, ...: {excerpt(record[name])}")
            return found
    columns = {}
    for name, value in record.items():
        if (match := COLUMN.fullmatch(name)) and value not in (None, ""):
            columns[(match[1] or match[2]).upper()] = value
    return _in_order(columns)


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


def exam_of(record: dict) -> Exam | None:
    """The exam question in a record of any of these layouts; None if it has no options. Raises
    BadField where it has some and it is not certain how they or the answer are meant."""
    if not (options := options_of(record)):
        return None
    question, name = (
        next((n for n in names if record.get(n) not in (None, "")), "") for names in (ASKED, KEYS)
    )
    if not question or not name:
        raise BadField("answer", "an exam question needs `question`, options and `answer`")
    if not (letters := letters_of(record[name], options)):
        raise BadField(
            name, f"{excerpt(record[name])} names none of the options {', '.join(options)}"
        )
    explanation = next((record[n] for n in EXPLANATIONS if record.get(n)), "")
    return Exam(
        text_of(record[question], question),
        options,
        letters,
        text_of(explanation, "explanation"),
        text_of(record.get("context"), "context"),
        text_of(record.get("system"), "system"),
    )


def letters_of(answer: Any, options: dict[str, str]) -> str:
    """The letters that an answer names, in the options' order: of "C", "(C)", "opc", "ABD",
    "A、B、D", ["A", "D"], or of an option's whole text, with its letter or without. "" if it is not
    certain: it names none, or can be read in two ways, as a number can (from 0 or from 1?)."""
    if isinstance(answer, list):
        parts = [letters_of(part, options) for part in answer]
        found = "".join(parts)
        return _sorted(found, options) if all(parts) else ""
    if not isinstance(answer, str) or answer.strip().isdigit():
        return ""
    text = answer.strip()
    readings = {_bare(text, options)}
    readings |= {k for k, option in options.items() if option.strip().lower() == text.lower()}
    if (match := MARK.match(text)) and options.get(match[1], "").strip() == text[match.end() :]:
        readings.add(match[1])
    readings -= {""}
    return readings.pop() if len(readings) == 1 else ""


def _bare(text: str, options: dict[str, str]) -> str:
    if match := COLUMN.fullmatch(text):
        return _sorted((match[1] or match[2]).upper(), options)
    if re.fullmatch(r"\W*[a-j]\W*", text):
        text = text.upper()
    if not re.fullmatch(r"[\W_]*[A-J](?:[\W_]*[A-J])*[\W_]*", text):
        return ""
    return _sorted(re.sub(r"[\W_]", "", text), options)


def _sorted(letters: str, options: dict[str, str]) -> str:
    """The letters in order; "" if one is no option's or stands twice."""
    known = set(letters) <= set(options) and len(set(letters)) == len(letters)
    return "".join(sorted(letters)) if known else ""
