"""Benchmarks' own files, written in the layout in which lm-eval downloads them."""

import json
from pathlib import Path

from nanomed.evals.items import Item, Layout, load
from nanomed.evals.tasks import tasks

WORKER = str(Path(__file__).with_name("lm_eval_worker.py"))


def write_downloaded(name: str, data: Path, out: Path, limit: int = 0) -> tuple[int, int]:
    """A task's items and the pool of its shots, from the benchmark's own files into the layout that
    lm-eval asks for; with a limit about as many items, evenly spread over the file. Returns their
    number, and of all."""
    task = tasks()[name]
    layout = task.layouts[0]
    folder = out / layout.place.format(subject=task.subject)
    folder.mkdir(parents=True)
    for split in (task.pool, task.split):
        items = load(task.layouts[1:], data, task.subject, split).items
        step = max(1, len(items) // limit) if limit and split == task.split else 1
        lines = [json.dumps(_record(layout, item)) for item in items[::step]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return len(lines), len(items)


def _record(layout: Layout, item: Item) -> dict:
    exam = item.exam
    number = list(exam.options).index(exam.answers)
    if layout.reader == "pubmedqa":
        contexts = {"CONTEXTS": exam.context.split("\n")}
        return {"QUESTION": exam.question, **contexts, "final_decision": exam.options[exam.answers]}
    key = exam.answers if layout.first is None else number + layout.first
    record = {layout.question: exam.question, layout.key: key}
    if isinstance(layout.options, str):
        return record | {layout.options: list(exam.options.values()), "subject": ""}
    return record | dict(zip(layout.options, exam.options.values(), strict=True))
