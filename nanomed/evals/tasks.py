"""The tasks of tasks.toml, and the groups that their accuracies are summed up in."""

import functools
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanomed.config import InputError, nearest
from nanomed.evals.items import Layout
from nanomed.records.exams import Wording

FILE = Path(__file__).with_name("tasks.toml")


@dataclass(frozen=True)
class Task:
    name: str
    layouts: tuple[Layout, ...]
    split: str
    pool: str
    question: str = ""  # "": in the wording of training
    description: str = ""
    subject: str = ""
    strips: bool = False
    shots: str = "drawn"
    scored: str = "letters"

    @property
    def wording(self) -> Wording | None:
        if not self.question:
            return None
        return Wording(self.question, "{letter}. {text}", "{letters}", context="{context}\n")


@functools.cache
def tasks() -> dict[str, Task]:
    """By name, in the order of the file."""
    found = {}
    with open(FILE, "rb") as file:
        for name, block in tomllib.load(file).items():
            layouts = tuple(Layout(**layout) for layout in block.pop("layouts"))
            head = block.pop("description", "")
            for subject, words in block.pop("subjects", {"": ""}).items():
                task = Task(
                    name.format(subject=subject),
                    layouts,
                    subject=subject,
                    description=head.format(name=words),
                    **block,
                )
                found[task.name] = task
    return found


@functools.cache
def groups() -> dict[str, list[str]]:
    mmlu, ceval, cmmlu = (
        [name for name in tasks() if name.startswith(start)]
        for start in ("mmlu_", "ceval-valid_", "cmmlu_")
    )
    return {
        "mmlu_med": mmlu[:6],  # the paper's, and lm-eval's in multimedqa
        "mmlu_med_nine": mmlu,
        "ceval_med": ceval,
        "cmmlu_med": cmmlu,
        "multimedqa": [*mmlu[:6], "medqa_4options", "medmcqa", "pubmedqa"],
    }


def named(names: Iterable[str]) -> list[Task]:
    """The tasks of names of tasks and groups, each once; "paper" is those of the paper's Table 1,
    over which nobody averages. They come in the order of the file: an evaluation that goes on
    counts its lines, so names in another order must not move them. Raises InputError for an
    unknown name."""
    paper = [*groups()["multimedqa"][:6], *groups()["ceval_med"], *groups()["multimedqa"][6:]]
    known = groups() | {"paper": paper} | {name: [name] for name in tasks()}
    chosen = set()
    for name in names:
        if name not in known:
            raise InputError(f"no task {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        chosen |= {*known[name]}
    return [task for name, task in tasks().items() if name in chosen]
