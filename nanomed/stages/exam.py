"""The share of right letters on held-out option questions, beside chance."""

import math
import re
from dataclasses import dataclass

from nanomed.batches.loader import Loader
from nanomed.model.decoder import Aquila
from nanomed.model.generation import greedy_in_lockstep
from nanomed.records import Chat
from nanomed.records.exams import letters_of
from nanomed.run.log import RunFolder
from nanomed.run.progress import progress
from nanomed.stages.answers import held_out_chats
from nanomed.text.template import Encoder

OPTION = re.compile(r"^\s*([A-H])\s*[.．、:：)）]", re.MULTILINE)
LETTER = re.compile(r"[A-H]([^A-Za-z0-9\s]|\s*$)")  # "B", "B。..." and not "A fever ..."
SEVERAL = re.compile(r"[A-H]\s*([、,，;；/&+和及与或]|and\b|or\b)\s*[A-H](?![A-Za-z0-9])")
AT_ONCE = 32  # questions in one batch


@dataclass(frozen=True)
class Item:
    chat: Chat  # ends with the question
    letter: str
    n_options: int


def show_exam(model: Aquila, encoder: Encoder, loader: Loader, run: RunFolder) -> None:
    """Prints the share for the held-out option chats, if there are any. Every rank calls it."""
    if items := held_out_items(loader):
        right = n_right(model, encoder, items)
        run.print("right letters of held-out option questions (greedy, the answer's first letter):")
        run.print(f"  {summary(right, [item.n_options for item in items])}")
        run.print()


def summary(right: int, options: list[int]) -> str:
    n = len(options)
    chance = sum(1 / k for k in options) / n
    error = math.sqrt(chance * (1 - chance) / n)
    return f"{right} of {n} = {right / n:.0%}; chance is {chance:.0%}, give or take {error:.0%}"


def n_right(model: Aquila, encoder: Encoder, items: list[Item]) -> int:
    right = 0
    with progress(len(items), "question", "exam") as bar:
        for start in range(0, len(items), AT_ONCE):
            part = items[start : start + AT_ONCE]
            prompts = [encoder.prompt(item.chat) for item in part]
            answers = greedy_in_lockstep(model, prompts, set(), max_new=1)
            for item, ids in zip(part, answers, strict=True):
                right += encoder.tokenizer.decode(ids).strip()[:1] == item.letter
            bar.update(len(part))
    return right


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
