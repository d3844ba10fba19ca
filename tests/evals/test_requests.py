"""What a model is asked, to the byte: contexts, continuations and shots as lm-eval has them."""

import dataclasses
import json

import pytest

import evaluate
from nanomed.config import InputError
from nanomed.evals import tasks
from nanomed.evals.requests import requests_of
from nanomed.evals.tasks import tasks as all_tasks
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests/evals/golden.json").read_text(encoding="utf-8"))["tasks"]
RECORDED = ROOT.parent / "shared/golden/lm_eval"


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_golden(golden: dict, folder) -> None:
    for split, records in golden["splits"].items():
        write_lines(folder / golden["folder"] / f"{split}.jsonl", records)


def differences(request, item: dict) -> list[str]:
    target = item["target"]
    gold = request.gold if isinstance(target, int) else request.choices[request.gold]
    ours = {"context": request.context, "continuations": request.continuations}
    ours |= {"shots": request.shots, "target": gold}
    return [name for name, value in ours.items() if value != item[name]]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g['task']}-{g['shots']}shot")
def test_requests_are_equal_to_what_lm_eval_recorded(golden, tmp_path):
    write_golden(golden, tmp_path)
    requests, _ = requests_of(all_tasks()[golden["task"]], tmp_path, golden["shots"])
    for i, item in golden["items"].items():
        assert differences(requests[int(i)], item) == []
    if golden["all_shots"]:
        assert [request.shots for request in requests] == golden["all_shots"]


def test_lm_eval_lets_an_item_be_its_own_shot_where_there_is_only_a_test_split(tmp_path):
    (careqa,) = [golden for golden in GOLDEN if golden["task"] == "careqa_en"]
    write_golden(careqa, tmp_path)
    requests, _ = requests_of(all_tasks()["careqa_en"], tmp_path, 3)
    assert [request.id for request in requests if request.leaked] == ["careqa_en/21"]


def test_every_recorded_request():
    if not RECORDED.exists():
        pytest.skip("../shared/golden/lm_eval is absent")
    n = 0
    for file in sorted(RECORDED.glob("*shot.json")):
        recorded = json.loads(file.read_text(encoding="utf-8"))
        task = all_tasks()[recorded["task"]]
        requests, _ = requests_of(task, RECORDED / "data", recorded["num_fewshot"])
        pairs = zip(requests, recorded["items"], strict=True)
        assert [
            differences(request, item) for request, item in pairs if differences(request, item)
        ] == []
        n += len(requests)
    assert n == 293


def test_a_missing_strip_and_another_separator_would_be_seen(tmp_path):
    mmlu = GOLDEN[0]
    write_golden(mmlu, tmp_path)
    task = all_tasks()[mmlu["task"]]
    for wrong in (
        dataclasses.replace(task, strips=False),
        dataclasses.replace(task, question=task.question.replace("\n", "\n\n")),
        dataclasses.replace(task, shots="drawn"),
    ):
        requests, _ = requests_of(wrong, tmp_path, mmlu["shots"])
        assert any(differences(requests[int(i)], item) for i, item in mmlu["items"].items())


def test_in_a_chat_the_description_is_the_system_text(tmp_path):
    mmlu = GOLDEN[0]
    write_golden(mmlu, tmp_path)
    task = all_tasks()[mmlu["task"]]
    plain, _ = requests_of(task, tmp_path, 3)
    chat, _ = requests_of(task, tmp_path, 3, "chat")
    for a, b in zip(plain, chat, strict=True):
        assert a.context == b.chat.system + b.context and b.chat.system == task.description
        assert b.continuations == ["A", "B", "C", "D"] and a.shots == b.shots


def test_more_shots_than_there_are(tmp_path):
    write_golden(GOLDEN[0], tmp_path)
    with pytest.raises(InputError, match="--shots 6: mmlu_professional_medicine has only 5 items"):
        requests_of(all_tasks()["mmlu_professional_medicine"], tmp_path, 6)
    with pytest.raises(InputError, match="--shots -1: "):
        requests_of(all_tasks()["mmlu_professional_medicine"], tmp_path, -1)


def test_names_of_tasks():
    assert len(tasks.named(["paper"])) == 6 + 4 + 3
    assert tasks.named(["medmcqa", "multimedqa"]) == tasks.named(["multimedqa", "medmcqa"])
    assert len(tasks.named(["medmcqa", "multimedqa"])) == 9
    with pytest.raises(InputError, match="no task 'medmcq'; did you mean medmcqa"):
        tasks.named(["medmcq"])


def test_show_prints_one_json_line_for_each_item(tmp_path, capsys):
    write_golden(GOLDEN[2], tmp_path)
    argv = ["medqa_4options", "--data", str(tmp_path), "--shots", "3"]
    evaluate.show([*argv, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 32 and set(lines[0]) == {"id", "context", "continuations", "shots", "gold"}
    assert lines[1]["context"] == GOLDEN[2]["items"]["1"]["context"]
    evaluate.show([*argv, "-n", "1"])
    shown = capsys.readouterr().out
    assert "Answer:⟦·A⟧ ⟦·B⟧ ⟦·C⟧ ⟦·D⟧" in shown and "medqa_4options/1" not in shown


def test_the_samples_exam_in_both_languages():
    requests, split = requests_of(all_tasks()["samples_exam"], ROOT / "samples", 0, "chat")
    assert len(requests) > 100 and split.set_aside == 0
    texts, _ = requests_of(all_tasks()["samples_exam_texts"], ROOT / "samples", 0, "chat")
    assert texts[0].context == requests[0].context
    assert texts[0].choices == list(texts[0].item.exam.options.values())
