"""Two models on the same items: what changed, and whether chance alone would do it."""

from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.evals.benchmarks import read_items
from nanomed.evals.folder import finished, settings_of
from nanomed.evals.stats import bootstrap, sign_test
from nanomed.evals.tasks import groups


def compare(a: Path, b: Path) -> dict[str, dict[str, Any]]:
    """By task and group that both folders have: both accuracies, the items that one alone has
    right, the exact McNemar probability, and the difference b - a with its bootstrap interval.
    Raises InputError if they were asked differently."""
    asked = [settings_of(finished(folder)).get("requests", {}) for folder in (a, b)]
    common = [name for name in asked[0] if name in asked[1]]
    for name in common:
        if asked[0][name] != asked[1][name]:
            raise InputError(
                f"{a} and {b} were asked different things in {name} (items, shots or protocol), so "
                "their answers are not pairs; score one of them again with the other's settings"
            )
    if not common:
        raise InputError(f"{a} and {b} have no task in common")
    items = [{item["id"]: item for item in read_items(folder)} for folder in (a, b)]
    wanted = {name: [name] for name in common}
    wanted |= {name: tasks for name, tasks in groups().items() if set(tasks) <= set(common)}
    found = {}
    for name, tasks in wanted.items():
        ids = [i for i in items[0] if i.rpartition("/")[0] in tasks]
        if items[0][ids[0]]["gold"] is None:  # texts, of which none is right or wrong
            continue
        right = [[side[i]["pred"] == side[i]["gold"] for i in ids] for side in items]
        found[name] = _paired(ids, *right)
    return found


def _paired(ids: list[str], a: list[bool], b: list[bool]) -> dict[str, Any]:
    changes = [y - x for x, y in zip(a, b, strict=True)]
    return {
        "n": len(ids),
        "acc": [sum(a) / len(ids), sum(b) / len(ids)],
        "difference": sum(changes) / len(ids),
        "interval": bootstrap(changes),
        "only_a": [i for i, change in zip(ids, changes, strict=True) if change < 0],
        "only_b": [i for i, change in zip(ids, changes, strict=True) if change > 0],
        "p": sign_test(changes.count(1), changes.count(-1)),
    }
