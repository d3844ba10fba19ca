"""The share of right letters on held-out option questions, beside chance."""

import math
import re
from dataclasses import dataclass

from nanomed.batches.loader import Loader
from nanomed.model.decoder import Aquila
from nanomed.records import Chat
from nanomed.records.exams import letters_of
from nanomed.run.log import RunFolder
from nanomed.stages.answers import greedy_answers, held_out_chats
from nanomed.text.template import Encoder

OPTION = re.compile(r"^\s*([A-H])\s*[.．、:：)）]", re.MULTILINE)
LETTER = re.compile(r"[A-H]([^A-Za-z0-9\s]|\s*$)")  # "B", "B。..." and not "A fever ..."
SEVERAL = re.compile(r"[A-H]\s*([、,，;；/&+和及与或]|and\b|or\b)\s*[A-H](?![A-Za-z0-9])")


@dataclass(frozen=True)
class Item:
    chat: Chat  # ends with the question
    letter: str
    n_options: int


def show_exam(model: Aquila, encoder: Encoder, loader: Loader, run: RunFolder) -> None:
    """Prints the share for the held-out option chats, if there are any. Every rank calls it."""
    items = held_out_items(loader)
    if not items:
        return
    answers = greedy_answers(model, encoder, [item.chat for item in items], set(), 1, "exam")
    pairs = zip(items, answers, strict=True)
    right, n = sum(text.strip()[:1] == item.letter for item, text in pairs), len(items)
    chance = sum(1 / item.n_options for item in items) / n
    error = math.sqrt(chance * (1 - chance) / n)
    run.print("right letters of held-out option questions (greedy, the answer's first letter):")
    beside = f"chance is {chance:.0%}, give or take {error:.0%}"
    run.print(f"  {right} of {n} = {right / n:.0%}; {beside}")
    run.print()


def held_out_items(loader: Loader) -> list[Item]:
    return [item for _, chat in held_out_chats(loader) if (item := as_item(chat))]


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
