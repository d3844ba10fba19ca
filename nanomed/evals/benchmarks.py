"""Benchmarks by likelihood, from requests to a folder of results that goes on after a kill.

OUT/config.json     what the numbers depend on; another run may not go on in this folder
OUT/items.jsonl     one line for each item, in the order of tasks and items
OUT/results.json    by task and group: n, acc, acc_norm, stderr and what to hold them against
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from nanomed.build.files import read_lines
from nanomed.evals.folder import going_on, short_hash
from nanomed.evals.items import Split
from nanomed.evals.requests import Request
from nanomed.evals.stats import mean, pooled_stderr, stderr
from nanomed.evals.tasks import groups
from nanomed.model.scoring import Encoded, Plan, Scorer
from nanomed.records.exams import LETTERS
from nanomed.store.cache import digest


@dataclass(frozen=True)
class Prepared:
    """A task that is ready to be scored."""

    name: str
    requests: list[Request]
    encoded: list[Encoded]
    plan: Plan
    split: Split


def asked(tasks: Sequence[Prepared], data: Path) -> dict[str, Any]:
    """What the numbers depend on besides the model: files, and all that is asked and counts as
    right."""
    texts = {task.name: "".join(r.to_json() for r in task.requests) for task in tasks}
    return {
        "files": {
            str(path.relative_to(data)): digest(path) for task in tasks for path in task.split.files
        },
        "requests": {name: short_hash(text.encode()) for name, text in texts.items()},
    }


def score(tasks: Sequence[Prepared], scorer: Scorer, out: Path) -> None:
    """Fills OUT/items.jsonl, from where an earlier call was stopped. Every rank calls it."""
    ends = list(accumulate(len(row) for task in tasks for row in task.plan.rows))
    with going_on(out / "items.jsonl", ends, "item", scorer.world.is_main) as (done, write):
        for task in tasks:
            rows = task.plan.rows
            first, done = min(done, len(rows)), max(0, done - len(rows))
            scored = scorer.run(task.encoded, task.plan, first)
            for numbers, row in zip(rows[first:], scored, strict=True):
                write([_line(task, i, logps) for i, logps in zip(numbers, row, strict=True)])


def _line(task: Prepared, number: int, logps: list[float]) -> dict[str, Any]:
    request, encoded = task.requests[number], task.encoded[number]
    pairs = zip(logps, request.choices, strict=True)
    per_character = [logp / max(1, len(text)) for logp, text in pairs]
    asks = len(logps) > 1  # else there is nothing to choose: a held-out chat
    return {
        "id": request.id,
        "subject": request.item.subject,
        "shots": request.shots,
        "logprobs": logps,
        "pred": _largest(logps) if asks else None,
        "pred_norm": _largest(per_character) if asks else None,
        "gold": request.gold if asks else None,
        "n_tokens": encoded.n_tokens,
        "truncated": max(0, encoded.truncated),
    }


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: (values[i], -i))  # the first one wins a tie


def read_items(out: Path) -> list[dict]:
    return read_lines(out / "items.jsonl")


def results(tasks: Sequence[Prepared], items: Sequence[dict]) -> dict[str, dict]:
    """By task, and by each group of which all tasks are there."""
    found, by_id = {}, {item["id"]: item for item in items}
    for task in tasks:
        mine = [by_id[request.id] for request in task.requests]
        if mine[0]["gold"] is None:
            found[task.name] = _loss(mine)
            continue
        alike = len({tuple(request.choices) for request in task.requests}) < 10  # letters, yes/no
        subjects: dict[str, list[dict]] = {}
        for item in mine:
            subjects.setdefault(item["subject"] or task.name, []).append(item)
        by_subject = {name: _accuracy(part) for name, part in sorted(subjects.items())}
        found[task.name] = _summary(task.requests, mine) | {
            "macro": mean([part["acc"] for part in by_subject.values()]),
            "subjects": by_subject,
            "tokens_per_choice": sorted({tuple(item["n_tokens"]) for item in mine})
            if alike
            else [],
            "truncated": sum(item["truncated"] > 0 for item in mine),
            "set_aside": task.split.set_aside,
            "in_own_shots": sum(request.leaked for request in task.requests),
        }
    for name, members in groups().items():
        if set(members) <= set(found):
            parts = [found[member] for member in members]
            requests = [r for task in tasks if task.name in members for r in task.requests]
            found[name] = _of_group(members, parts, requests, by_id)
    return found


def _of_group(
    members: list[str], parts: list[dict], requests: Sequence[Request], by_id: dict[str, dict]
) -> dict[str, Any]:
    """Micro, as lm-eval: every item counts once. Macro: every task does. Distinct: items with the
    same question and options, which MMLU's subjects share, count once."""
    distinct = {}
    for request in requests:
        exam = request.item.exam
        distinct.setdefault((exam.question, *exam.options.values()), by_id[request.id])
    sizes = [part["n"] for part in parts]
    pooled = {
        key: pooled_stderr(sizes, [part[key] for part in parts])
        for key in ("stderr", "stderr_norm")
    }
    return (
        _summary(requests, [by_id[r.id] for r in requests])
        | pooled
        | {
            "macro": mean([part["acc"] for part in parts]),
            "distinct": _accuracy(list(distinct.values())),
            "tasks": members,
        }
    )


def _summary(requests: Sequence[Request], items: Sequence[dict]) -> dict[str, Any]:
    """The accuracy, and what it must be held against. `letters` has for each choice how often it
    was chosen and how often it is right."""
    names = [request.choices for request in requests]
    if len({tuple(choices) for choices in names}) > len("ABCDEFG"):  # texts of each item's own
        names = [LETTERS[: len(choices)] for choices in names]
    pairs = list(zip(names, items, strict=True))
    gold = Counter(choices[item["gold"]] for choices, item in pairs)
    pred = Counter(choices[item["pred"]] for choices, item in pairs)
    commonest = max(gold, key=gold.get)
    return _accuracy(items) | {
        "chance": mean([1 / len(choices) for choices in names]),
        "majority": {"choice": commonest, "acc": gold[commonest] / len(items)},
        "letters": {name: [pred[name], gold[name]] for name in sorted({*gold, *pred})},
        "shots": len(items[0]["shots"]),
        "protocol": "chat" if requests[0].chat else "plain",
    }


def _loss(items: Sequence[dict]) -> dict[str, float]:
    """Of texts, in nats for each token; the standard error is that of a ratio over whole texts."""
    sums = [(-item["logprobs"][0], item["n_tokens"][0]) for item in items]
    tokens = sum(n for _, n in sums)
    loss = sum(nll for nll, _ in sums) / tokens
    per_text = stderr([nll - loss * n for nll, n in sums])
    return {
        "n": len(items),
        "tokens": tokens,
        "loss": loss,
        "stderr": per_text * len(items) / tokens,
        "perplexity": math.exp(loss),
    }


def _accuracy(items: Sequence[dict]) -> dict[str, float]:
    right = [item["pred"] == item["gold"] for item in items]
    norm = [item["pred_norm"] == item["gold"] for item in items]
    return {
        "n": len(items),
        "acc": mean(right),
        "acc_norm": mean(norm),
        "stderr": stderr(right),
        "stderr_norm": stderr(norm),
    }


def warnings(results: dict[str, dict]) -> list[str]:
    """What a reader of these accuracies must know, each with the tasks that it is true of."""
    said: dict[str, list[str]] = {}
    for name, r in results.items():
        uneven = [counts for counts in r.get("tokens_per_choice", []) if len(set(counts)) > 1]
        facts = {
            "choices have different numbers of tokens: a sum over tokens can hardly choose the "
            "longer ones, so this measures the tokenizer": uneven[0] if uneven else 0,
            "items that stand, answered, among their own shots": r.get("in_own_shots"),
            "inputs that were too long and cut on the left": r.get("truncated"),
            "items with several right letters, which are not scored": r.get("set_aside"),
        }
        for fact, value in facts.items():
            if value:
                said.setdefault(fact, []).append(f"{name} {value}")
    return [f"WARNING: {fact}: {', '.join(names)}" for fact, names in said.items()]
