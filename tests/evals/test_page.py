"""The page: the paper's numbers beside ours, with n and error, and what changed."""

import json
import re

import pytest

import evaluate
from nanomed.config import InputError
from nanomed.evals.benchmarks import read_items
from nanomed.evals.compare import compare
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
    row = re.search(rf"<tr><td>{re.escape(name)}</td>(.*?)</tr>", tables, re.S)
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1], re.S)


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
    dots = text.split("Figures 4 and 5")[0].count("<circle")
    assert dots == 2 * 8  # for each task and group of both
    assert f"From {done} to {other}" in text
    assert "<script" not in text and "http" not in text


def test_items_that_were_right_and_are_wrong_now(done, model, data, tmp_path):  # noqa: F811
    other = tmp_path / "second"
    evaluate.score(argv(write_folder(tmp_path / "m", seed=4), data, other))
    lost = compare(done, other)["medqa_4options"]["only_a"]
    assert lost
    text = page([done, other], data)
    assert f"medqa_4options: {len(lost)} right before, now wrong" in text
    sides = [{i["id"]: i for i in read_items(folder)} for folder in (done, other)]
    for name in lost:
        right, before, _, now, _, asked = cells(text, name)
        assert right == before == "ABCD"[sides[0][name]["gold"]] != now
        assert asked.startswith("Question: ") and asked.endswith("Answer:")
    assert "Question: " not in page([done, other])  # no text unless the folder of texts is named


def test_a_task_with_subjects_has_their_dots(tmp_path):
    part = {"n": 4, "acc": 0.5, "stderr": 0.1, "acc_norm": 0.5, "stderr_norm": 0.1}
    whole = {"chance": 0.25, "macro": 0.5, "majority": {"choice": "A", "acc": 0.3}}
    subjects = {"Surgery": part, "<Anatomy>": part}
    medmcqa = part | whole | {"letters": {"A": [1, 2]}, "shots": 3, "subjects": subjects}
    text = page([write(tmp_path / "x", {"medmcqa": medmcqa})])
    group = part | whole | {"letters": {}, "shots": 3, "tasks": ["x", "y"]}
    errors = {"x": {"stderr": 0.3}, "y": {"stderr": 0.4}}
    cmb = {"n": 4, "official": {"acc": 0.5, "stderr": 0.1, "class_macro": 0.4}}
    shown = page([write(tmp_path / "g", {"mmlu_med": group, "cmb": cmb} | errors)])
    assert cells(shown, "cmb")[2] == "50.00 ± 10.00 (n 4)"  # micro, as the table says
    assert cells(shown, "mmlu_med")[2] == "50.00 ± 25.00 (n 4)"  # of a mean of two means
    assert "medmcqa by subject" in text and "Surgery (4)" in text and "&lt;Anatomy&gt; (4)" in text


def test_judgements_beside_the_papers(tmp_path):
    found = evaluate.judging.turn_results(
        judged_as({a: [4.5, 4.0] for a in evaluate.judging.ASPECTS}, [4, 2])
    ) | {"set": "cmb-clin"}
    pairs = {"n": 3, "unread": 1, "win": 1, "tie": 1, "loss": 1, "orders_disagree": 1 / 3}
    pairs |= {"first_seat_wins": 0.5, "longer_wins": None, "win_interval": [0.06, 0.79]}
    text = page([write(tmp_path / "t", {"turns": found}), write(tmp_path / "p", {"pairs": pairs})])
    bars = text.split("Figures 4 and 5")[1].split("</svg>")[0]
    assert bars.count("<rect") == 3 * (4 + 1) and bars.count("<line") == 1  # ours has an interval
    assert 'width="262.1"' in bars and "<title>62.4%" in bars  # of 420 pixels
    _, other, clin = text.split("Figures 6 and 7")
    assert other.count("<svg") == clin.count("<svg") == 4
    assert clin.count(f"<title>{tmp_path / 't'}</title></polyline>") == 4  # ours is of this set
    assert f"{tmp_path / 't'}</title>" not in other
    ours = cells(text, f"{tmp_path / 't'}, fluency")
    assert ours[0] == "4.333" and ours[2:4] == ["4.500 (n 4)", "4.000 (n 2)"]
    unread = judged_as({a: [4.5, 0, 4.0] for a in evaluate.judging.ASPECTS}, [4, 0, 2])
    found = evaluate.judging.turn_results(unread) | {"set": "cmb-clin"}
    second = cells(page([write(tmp_path / "u", {"turns": found})]), f"{tmp_path / 'u'}, fluency")
    assert second[2:5] == ["4.500 (n 4)", "", "4.000 (n 2)"]  # nothing of round 2 was read
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


def test_answers_that_are_judged_elsewhere_have_no_numbers(tmp_path):
    """report evals/* meets them, too."""
    (tmp_path / "sft-huatuo-gold").mkdir()
    config = {"files": {}, "set": "huatuo", "history": "gold"}
    (tmp_path / "sft-huatuo-gold/config.json").write_text(json.dumps(config))
    text = page([tmp_path / "sft-huatuo-gold"])
    assert text.count(str(tmp_path / "sft-huatuo-gold")) == 1  # in the table of what was run


def test_a_folder_without_results(tmp_path):
    with pytest.raises(InputError, match="holds no finished evaluation"):
        page([tmp_path])
