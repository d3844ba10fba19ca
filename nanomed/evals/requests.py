"""From items to what a model is asked: a context and its continuations, as text.

Everything here is a function of the item and its place in its split, never of how many items are
scored, in which order or on how many ranks.
"""

import dataclasses
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanomed.config import InputError
from nanomed.evals.items import Item, Split, load
from nanomed.evals.tasks import Task
from nanomed.records import Chat
from nanomed.records.exams import asked, wording_for

SHOT_SEED = 1234  # lm-eval's
PROTOCOLS = ("plain", "chat")


@dataclass(frozen=True)
class Request:
    id: str  # TASK/number of the item in its split
    context: str  # what stands before the continuations
    continuations: list[str]
    shots: list[int]  # the pool's items that stand, answered, in the context
    gold: int  # which continuation is right
    item: Item
    choices: list[str]  # the continuations without the space before them
    chat: Chat | None = None  # protocol chat: what is asked; its last turn is the context
    leaked: bool = False  # the item is among its own shots

    def to_json(self) -> str:
        shown = ("id", "context", "continuations", "shots", "gold")
        values = {name: getattr(self, name) for name in shown}
        if self.chat and self.chat.system:
            values["system"] = self.chat.system
        if self.chat and len(self.chat.turns) > 1:
            values["history"] = self.chat.turns[:-1]
        return json.dumps(values, ensure_ascii=False)


def all_requests(
    tasks: Iterable[Task], data: Path, n_shots: int, protocol: str
) -> list[tuple[Task, list[Request], Split]]:
    """All that the tasks ask. Raises InputError for all of them together whose data are missing or
    wrong, with the tasks that could be run."""
    found, problems = [], []
    for task in tasks:
        try:
            found.append((task, *requests_of(task, data, n_shots, protocol)))
        except InputError as error:
            problems.append(f"{task.name}: {error}")
    if problems and found:
        problems.append(f"without them: --tasks {' '.join(task.name for task, _, _ in found)}")
    if problems:
        raise InputError("\n".join(problems))
    return found


def requests_of(
    task: Task, data: Path, n_shots: int, protocol: str = "plain"
) -> tuple[list[Request], Split]:
    """A task's requests in the order of its items, and the split that they are of.

    Protocol "plain" continues a text: description, shots and item, plainly joined, as lm-eval does
    by default. "chat" puts the same into a chat as lm-eval's --apply_chat_template does: the
    description as the system text, shots and item as one user's turn; the answer then begins
    without a space."""
    split = load(task.layouts, data, task.subject, task.split)
    pool = split
    if n_shots and task.pool != task.split:
        pool = load(task.layouts, data, task.subject, task.pool)
    space = "" if protocol == "chat" else " "
    requests = []
    for i, shots in enumerate(_shots(task, len(split.items), len(pool.items), n_shots)):
        item = split.items[i]
        examples = [pool.items[k] for k in shots]
        answered = [f"{_asked(task, e)} {_choices(task, e)[_gold(e)]}\n\n" for e in examples]
        text, choices = "".join([*answered, _asked(task, item)]), _choices(task, item)
        requests.append(
            Request(
                f"{task.name}/{i}",
                text if protocol == "chat" else task.description + text,
                [space + choice for choice in choices],
                shots,
                _gold(item),
                item,
                choices,
                Chat([("user", text)], task.description) if protocol == "chat" else None,
                item.exam in [example.exam for example in examples],
            )
        )
    return requests, split


def _shots(task: Task, n_items: int, n_pool: int, n_shots: int) -> Iterator[list[int]]:
    """Which of the pool each item gets. Where they are drawn, each draw depends on those before it,
    so all of them are made here, whatever part of the items is scored, and by whom."""
    if not 0 <= n_shots <= n_pool:
        raise InputError(
            f"--shots {n_shots}: {task.name} has only {n_pool} items to take them from"
        )
    rng = random.Random(SHOT_SEED)
    for _ in range(n_items):
        first = task.shots == "first" or n_shots == 0
        yield list(range(n_shots)) if first else rng.sample(range(n_pool), n_shots)


def _asked(task: Task, item: Item) -> str:
    exam = item.exam
    if task.strips:
        exam = dataclasses.replace(exam, question=exam.question.strip())
    return asked(exam, task.wording or wording_for(exam))


def _choices(task: Task, item: Item) -> list[str]:
    return list(item.exam.options.values() if task.scored == "texts" else item.exam.options)


def _gold(item: Item) -> int:
    return list(item.exam.options).index(item.exam.answers)
