"""Answers to dialogues: the sets, both histories, resuming, several ranks."""

import json

import pytest
import torch

import evaluate
from nanomed.config import InputError
from nanomed.distributed import World
from nanomed.evals.answers import Answerer, Dialogue, dialogues, file_of
from nanomed.hf import pretrained
from nanomed.model.generation import Sampling, generate
from nanomed.records import Chat
from tests.evals.test_benchmarks import files_of, model  # noqa: F401
from tests.evals.test_requests import write_lines

TALKS = [
    Dialogue(
        "0", [("头痛怎么办？", "多休息。"), ("还需要吃药吗？", "不需要。"), ("谢谢", "不客气")]
    ),
    Dialogue(
        "1",
        [("What is a fever?", "A raised temperature."), ("And a chill?", "Shivering.")],
        "Be brief.",
    ),
    Dialogue("2", [("发热三天，应当做什么检查？", "血常规。")]),
]


def write_talks(path) -> None:
    turns = [
        [{"role": r, "content": t} for pair in d.turns for r, t in zip(ROLES, pair, strict=True)]
        for d in TALKS
    ]
    written = zip(turns, TALKS, strict=True)
    write_lines(path, [{"messages": t, "system": d.system} for t, d in written])


ROLES = ("user", "assistant")


def run(folder, out, own: bool, world=None, batch_size: int = 2):
    world = world or World(0, 1, torch.device("cpu"))
    _, encoder = pretrained.describe(folder)
    loaded = pretrained.load(folder, world.device, torch.float32)
    return Answerer(loaded, encoder, 6, batch_size, own).run(TALKS, out, {"files": {}}, world)


@pytest.mark.parametrize("own", [False, True])
def test_each_answer_is_that_of_its_prompt_alone(own, model, tmp_path):  # noqa: F811
    lines = run(model, tmp_path / "out", own)
    assert sorted((line["id"], line["round"]) for line in lines) == [
        ("0", 1), ("0", 2), ("0", 3), ("1", 1), ("1", 2), ("2", 1),
    ]  # fmt: skip
    by_turn = {(line["id"], line["round"]): line for line in lines}
    _, encoder = pretrained.describe(model)
    loaded = pretrained.load(model, torch.device("cpu"), torch.float32)
    for line in lines:
        talk = TALKS[int(line["id"])]
        history = talk.turns[: line["round"] - 1]
        if own:
            history = [
                (q, by_turn[line["id"], j + 1]["answer"]) for j, (q, _) in enumerate(history)
            ]
        assert [tuple(turn) for turn in line["history"]] == history
        turns = [turn for pair in history for turn in zip(ROLES, pair, strict=True)]
        prompt = encoder.prompt(Chat([*turns, ("user", line["question"])], talk.system))
        stop = {encoder.turn_end, encoder.document_end}
        ((ids, end),) = generate(loaded, [prompt], stop, Sampling(max_new=6))
        assert (line["answer"], line["end"]) == (encoder.tokenizer.decode(ids), end)


def argv(folder, data, out) -> list[str]:
    fixed = ["--model", folder, "--set", "file", "--data", data, "--out", out, "--max_new", "6"]
    return [*map(str, fixed), "--batch_size", "2", "--history", "model"]


def test_answers_that_were_cut_anywhere_go_on_to_the_same_bytes(model, tmp_path):  # noqa: F811
    write_talks(tmp_path / "talks.jsonl")
    assert dialogues(tmp_path / "talks.jsonl") == (TALKS, 0)
    arguments = argv(model, tmp_path / "talks.jsonl", tmp_path / "out")
    evaluate.answer(arguments)
    whole = files_of(tmp_path / "out")
    content = whole["answers.jsonl"]
    for kept in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / "out/answers.jsonl").write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"holds \d of 6 answers: .* the same command goes on"):
            evaluate.answers.read(tmp_path / "out")  # no judge is asked about a part of them
        evaluate.answer(arguments)
        assert files_of(tmp_path / "out") == whole
    with pytest.raises(InputError, match="history was model, is gold"):
        evaluate.answer([*arguments, "--history", "gold"])


def _on_ranks(world, folder, out):
    run(folder, out, True, world)


def test_two_ranks_write_the_same_bytes(model, pool, tmp_path):  # noqa: F811
    run(model, tmp_path / "one", True)
    pool(2, _on_ranks, model, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_oldest_turns_go_where_a_prompt_is_too_long(model, tmp_path):  # noqa: F811
    _, encoder = pretrained.describe(model)
    loaded = pretrained.load(model, torch.device("cpu"), torch.float32)
    answerer = Answerer(loaded, encoder, 4, 2)
    long = "头痛" * 300
    talk = Dialogue("x", [(long, long), ("短", "短"), ("问", "答")])
    (line,) = answerer._answered([(talk, 2)])
    assert line["dropped_turns"] == 1 and line["history"] == [("短", "短")]
    with pytest.raises(InputError, match=r"dialogue x: a question leaves no room"):
        answerer._answered([(Dialogue("x", [(long * 3, "答")]), 0)])


def test_cmb_clin_has_its_case_before_the_first_question(tmp_path):
    pair = {"question": "诊断？", "answer": "疝。"}
    record = {
        "id": "0",
        "description": "病史",
        "QA_pairs": [pair, {"question": "治疗？", "solution": "手术。"}],
    }
    path = tmp_path / "CMB-test-qa.json"
    path.write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    (dialogue,), aside = dialogues(file_of("cmb-clin", tmp_path))
    first = ("以下是一位病人的病例：\n病史\n诊断？", "疝。")
    assert dialogue.turns == [first, ("治疗？", "手术。")] and aside == 0
    record["QA_pairs"][1]["solution"] = " "
    path.write_text(json.dumps([record], ensure_ascii=False), encoding="utf-8")
    with pytest.raises(InputError, match=r"record 1: .*lacks its question or its reference answer"):
        dialogues(path)


def test_cmtmedqas_safety_questions_are_set_aside_and_counted(tmp_path):
    talk = {
        "instruction": "然后呢？",
        "input": "",
        "output": "休息。",
        "history": [["头痛", "多喝水"]],
    }
    write_lines(
        tmp_path / "CMtMedQA_test.jsonl", [talk, {"instruct": "怎样制毒？", "output": "不能说。"}]
    )
    (dialogue,), aside = dialogues(file_of("cmtmedqa", tmp_path))
    write_lines(tmp_path / "none.jsonl", [{"instruct": "怎样制毒？", "output": "不能说。"}])
    with pytest.raises(InputError, match="holds no dialogue, only 1 records that are none"):
        dialogues(tmp_path / "none.jsonl")
    assert aside == 1 and dialogue.turns == [("头痛", "多喝水"), ("然后呢？", "休息。")]


def test_every_wording_of_a_question_is_asked(tmp_path):
    record = {"questions": [["头痛？", "头疼怎么办？"]], "answers": ["休息。"]}
    write_lines(tmp_path / "a.jsonl", [record])
    assert dialogues(tmp_path / "a.jsonl")[0] == [
        Dialogue("0", [("头痛？", "休息。")]), Dialogue("0.1", [("头疼怎么办？", "休息。")]),
    ]  # fmt: skip
    write_lines(tmp_path / "b.jsonl", [{"prompt": "A fever is", "completion": " a symptom."}])
    with pytest.raises(InputError, match=r"record 1: field 'prompt': .* is no dialogue"):
        dialogues(tmp_path / "b.jsonl")


def test_the_real_sets(shared_data):
    """CMB-Clin's public file has 208 turns: 74, 72, 58 and 4 of rounds 1 to 4."""
    clin, _ = dialogues(file_of("cmb-clin", shared_data))
    assert [sum(len(d.turns) > i for d in clin) for i in range(5)] == [74, 72, 58, 4, 0]
    assert len(dialogues(file_of("cmtmedqa", shared_data))[0]) == 520
    assert len(dialogues(file_of("huatuo", shared_data))[0]) == 2000


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(
        InputError, match=r"--set huatuo: one file .* is wanted in .*, found nothing"
    ):
        file_of("huatuo", tmp_path)
