"""Two models on the same items."""

import json

import pytest

import evaluate
from nanomed.config import InputError
from nanomed.evals.compare import compare
from nanomed.evals.stats import sign_test
from tests.evals.test_requests import write_lines

MMLU = ["anatomy", "clinical_knowledge", "college_biology"]
MMLU += ["college_medicine", "medical_genetics", "professional_medicine"]


def write(folder, right: dict[str, list[bool]], digest: str = "same"):
    lines = [
        {"id": f"{task}/{i}", "pred": 0 if ok else 1, "gold": 0}
        for task, verdicts in right.items()
        for i, ok in enumerate(verdicts)
    ]
    write_lines(folder / "items.jsonl", lines)
    config = {"requests": dict.fromkeys(right, digest)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text("{}")
    return folder


def test_items_are_paired_by_task_and_group(tmp_path):
    first = {f"mmlu_{name}": [True, True, False, False] for name in MMLU} | {"medmcqa": [True] * 9}
    second = {f"mmlu_{name}": [True, False, True, True] for name in MMLU} | {"pubmedqa": [True]}
    found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second))
    assert set(found) == {*(f"mmlu_{name}" for name in MMLU), "mmlu_med"}
    one, group = found["mmlu_anatomy"], found["mmlu_med"]
    assert one["acc"] == [0.5, 0.75] and one["difference"] == 0.25
    assert one["only_a"] == ["mmlu_anatomy/1"]
    assert one["only_b"] == ["mmlu_anatomy/2", "mmlu_anatomy/3"]
    assert one["p"] == sign_test(2, 1) == 1.0
    assert group["n"] == 24 and group["p"] == sign_test(12, 6)
    low, high = group["interval"]
    assert -0.1 < low < group["difference"] < high < 0.6


def test_the_table_and_the_ids(tmp_path, capsys):
    a = write(tmp_path / "a", {"medmcqa": [True] * 30 + [False] * 10})
    b = write(tmp_path / "b", {"medmcqa": [True] * 38 + [False] * 2})
    evaluate.compare([str(a), str(b)])
    shown = capsys.readouterr().out
    assert "75.00%" in shown and "95.00%" in shown and "+20.00" in shown and "0.00781" in shown
    evaluate.compare([str(a), str(b), "--json"])
    assert len(json.loads(capsys.readouterr().out)["medmcqa"]["only_b"]) == 8


def test_what_was_asked_differently_is_no_pair(tmp_path):
    a = write(tmp_path / "a", {"medmcqa": [True]})
    with pytest.raises(InputError, match="asked different things in medmcqa"):
        compare(a, write(tmp_path / "b", {"medmcqa": [True]}, "3 shots"))
    with pytest.raises(InputError, match="no task in common"):
        compare(a, write(tmp_path / "c", {"pubmedqa": [True]}))
    (a / "results.json").unlink()
    with pytest.raises(InputError, match="no finished evaluation"):
        compare(a, a)
