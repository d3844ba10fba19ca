"""Preference pairs of two kinds (Aquila-Med, 2.4): two answers to the same turns.

Objective: a question whose right option is known. Chosen is that option, rejected is one of the
others, each of them equally likely. Subjective: a model's answer against the one that the chat has,
compared by a judge in both orders; a pair is kept only where both orders say the same.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from nanomed.config import InputError
from nanomed.records import BadField, Chat, chats_of, read_records
from nanomed.records.exams import Exam, asked, exam_of, options_of, wording_for
from nanomed.records.option_chats import OPTION, as_item
from nanomed.records.shapes import group_of

# An option that speaks of others by their letters or their places cannot stand elsewhere.
REFERS = re.compile(
    r"以上|上述|以下|前三|[A-J]\s*[和与及、,+]\s*[A-J]|\b(above|both|[A-J] and [A-J])\b",
    re.IGNORECASE,
)
LONGER_WINS = 0.65  # of the pairs: from there on the judge may only like what is long


def exams_in(
    paths: Sequence[str], fields: Sequence[str], all_are: bool
) -> Iterator[tuple[str, int, Exam | None, str, str]]:
    """(file, record, question, group, why it is None) of each record that has options. A chat whose
    question lists its options counts as one. `all_are`: any other record is an error. Raises
    InputError naming file, record and field."""
    for path in paths:
        for number, record, _ in read_records(path, fields):
            try:
                exam = _exam_of(record, all_are)
            except BadField as bad:
                raise InputError(f"{path}, record {number}: {bad}") from None
            if exam is None:
                continue
            group = group_of(record, exam.question)
            texts = {exam.options[letter].strip() for letter in exam.answers}
            right = sum(text.strip() in texts for text in exam.options.values())
            several = "several_answers" if right > 1 else ""  # or one that stands twice
            yield path, number, None if several else exam, group, several


def _exam_of(record: Any, must_be: bool) -> Exam | None:
    try:
        if exam := isinstance(record, dict) and exam_of(record):
            return exam
    except BadField:  # not certain which option is right: a chat all the same
        if must_be:
            raise
    chat = chats_of(record)[0]
    item = None if chat.dropped or len(chat.turns) != 2 else as_item(chat)
    if not item and must_be:
        raise BadField("(record)", "no question with options, one of which is right")
    if not item:
        return None
    text = chat.turns[0][1]
    first = OPTION.search(text).start()
    options = options_of({"options": text[first:].strip()})
    return Exam(text[:first].strip(), options, item.letter, system=chat.system)


def objective(exam: Exam, place: int, seed: int) -> tuple[dict[str, Any], str]:
    """(the pair, the letters of its chosen and rejected side). `place`, the number of questions
    with as many options before it, moves the right option so that all letters are right equally
    often; where an option refers to others all stay in their places."""
    letters, gold = list(exam.options), exam.answers
    if not any(map(REFERS.search, exam.options.values())):
        to = letters[place % len(letters)]
        options = exam.options | {to: exam.options[gold], gold: exam.options[to]}
        exam, gold = replace(exam, options=options, answers=to), to
    digest = hashlib.blake2b(f"{seed} {exam.question}".encode(), digest_size=8).digest()
    wrong = [letter for letter in letters if letter != gold]
    wrong = wrong[int.from_bytes(digest, "big") % len(wrong)]
    words = wording_for(exam)
    chosen, rejected = (
        words.answer.format(letters=letter, texts=exam.options[letter]) for letter in (gold, wrong)
    )
    question = Chat([("user", asked(exam, words))], exam.system)
    return pair_of(question, chosen, rejected, "objective"), gold + wrong


def pair_of(prompt: Chat, chosen: str, rejected: str, kind: str) -> dict[str, Any]:
    """As train_dpo.py reads it."""
    turns = [{"role": role, "content": text} for role, text in prompt.turns]
    system = {"system": prompt.system} if prompt.system else {}
    return {"prompt": turns, "chosen": chosen, "rejected": rejected, "kind": kind} | system


def letters_table(letters: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each letter is chosen, and how often rejected."""
    chosen, rejected = (Counter(pair[i] for pair in letters) for i in (0, 1))
    return {"chosen": dict(sorted(chosen.items())), "rejected": dict(sorted(rejected.items()))}
