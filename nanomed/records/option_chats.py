"""Chats that ask a question with options and are answered by one letter."""

import re
from dataclasses import dataclass

from nanomed.records.exams import letters_of
from nanomed.records.shapes import Chat

OPTION = re.compile(r"^\s*([A-H])\s*[.．、:：)）]", re.MULTILINE)
LETTER = re.compile(r"[A-H]([^A-Za-z0-9\s]|\s*$)")  # "B", "B。..." and not "A fever ..."
SEVERAL = re.compile(r"[A-H]\s*([、,，;；/&+和及与或]|and\b|or\b)\s*[A-H](?![A-Za-z0-9])")


@dataclass(frozen=True)
class Item:
    chat: Chat  # ends with the question
    letter: str
    n_options: int


def as_item(chat: Chat) -> Item | None:
    """None unless the last question lists options and the answer begins with the letter of one;
    an answer that names several cannot be judged by its first letter."""
    letters = OPTION.findall(chat.turns[-2][1]) if len(chat.turns) > 1 else []
    answer = chat.turns[-1][1].strip()
    if len(letters) < 2 or answer[:1] not in letters or not LETTER.match(answer):
        return None
    named = letters_of(answer.splitlines()[0], dict.fromkeys(letters, ""))
    if len(named) > 1 or SEVERAL.match(answer) or len(OPTION.findall(answer)) > 1:
        return None
    return Item(Chat(chat.turns[:-1], chat.system), answer[0], len(letters))
