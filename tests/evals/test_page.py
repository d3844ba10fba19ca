"""The page: the paper's numbers beside ours, with n and error, and what changed."""

import json
import re

import pytest

import evaluate
from nanomed.config import InputError
from nanomed.evals.page import page
from tests.evals.test_benchmarks import argv, data, done, model, write_folder  # noqa: F401
from tests.evals.test_judge import judged_as
from tests.evals.test_requests import write_lines


def write(folder, results: dict):
    write_lines(folder / "judgements.jsonl", [])
    (folder / "config.json").write_text(json.dumps({"files": [], "judge_model": "a <judge>"}))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def cells(text: str, name: str) -> list[str]:
    """Of the row whose first cell is `name`; of a folder's, not the one that says what was run."""
    _, tables = text.split("</table>", 1)
    row = re.search(rf"<tr><td>{re.escape(name)}</td>(.*?)</tr>", tables)
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def test_the_papers_tables_beside_ours(done, model, data, tmp_path):  # noqa: F811
    other = tmp_path / "second"
    evaluate.score(argv(write_folder(tmp_path / "m", seed=4), data, other))
    text = page([done, other])
    results = json.loads((done / "results.json").read_text())
    mmlu = cells(text, "mmlu_med")
    assert mmlu[:2] == ["42.91", "49.32"]
    group = results["mmlu_med"]
    assert mmlu[2] == f"{100 * group['macro']:.2f} ± {100 * group['stderr']:.2f} (n 30)"
    assert cells(text, "cmb")[2:] == ["not run", "not run"]
    assert "ours were run with 1 shots, not 3" in text
    assert text.count("<circle") == 2 * 8  # a dot for each task and group of both
    assert f"From {done} to {other}" in text and "now wrong" in text
    assert "<script" not in text and "http" not in text


def test_judgements_beside_the_papers(tmp_path):
    found = evaluate.judging.turn_results(
        judged_as({a: [4.5, 4.0] for a in evaluate.judging.ASPECTS}, [4, 2])
    )
    pairs = {"n": 3, "unread": 1, "win": 1, "tie": 1, "loss": 1, "orders_disagree": 1 / 3}
    pairs |= {"first_seat_wins": 0.5, "longer_wins": None}
    text = page([write(tmp_path / "t", {"turns": found}), write(tmp_path / "p", {"pairs": pairs})])
    ours = cells(text, f"{tmp_path / 't'}, fluency")
    assert ours[0] == "4.333" and ours[2:4] == ["4.500 (n 4)", "4.000 (n 2)"]
    assert cells(text, "chat against the reference (paper)")[:4] == ["500", "62.4", "26.8", "10.8"]
    assert cells(text, str(tmp_path / "p")) == [
        "3",
        "33.3",
        "33.3",
        "33.3",
        "33.3",
        "50.0",
        "",
        "1",
    ]
    assert "a &lt;judge&gt;" in text


def test_a_folder_without_results(tmp_path):
    with pytest.raises(InputError, match="holds no finished evaluation"):
        page([tmp_path])
