"""CMB-Exam: the published reading and score, a strict reading beside them, and the key."""

import json
import random

import pytest

import evaluate
from nanomed.config import InputError
from nanomed.evals import cmb
from tests.evals.test_benchmarks import model  # noqa: F401

# What CMB's own match_choice() and extract_ans() made of each text (for a single-answer question,
# for one with several), run apart from this code; and what is right.
READ = [
    ("答案是D。", "D", "D", "D"),
    ("答案：B", "B", "B", "B"),
    ("正确答案是 C", "C", "C", "C"),
    ("D. 原发性肺结核", "D", "D", "D"),
    ("选D。A项错误。", "D", "DA", "D"),
    ("Answer: D", "A", "AD", "D"),
    ("The correct answer is C", "C", "C", "C"),
    ("根据CT和ECG,应选B", "C", "CECGB", "B"),
    ("答案是维生素D缺乏,选A。", "D", "DA", "A"),
    ("答案:B", "B", "B", "B"),
    ("正确选项应该是E。", "E", "E", "E"),
    ("答案是 A. CT检查", "A", "A", "A"),
    ("A项不对，不选A，应选C", "A", "AAC", "C"),
    ("答案是A，更正：答案是B。", "A", "AB", "B"),
    ("CT检查", "C", "C", ""),
    ("我选 b", "", "", ""),
    ("", "", "", ""),
]


@pytest.mark.parametrize("text, single, several, right", READ)
def test_both_readings_of_an_answer(text, single, several, right):
    assert cmb.official(text, False)[0] == single
    assert cmb.official(text, True)[0] == several
    assert cmb.strict(text, False)[0] == right


@pytest.mark.parametrize(
    "text, letters", [("答案为ABD。", "ABD"), ("答案是C和A。", "AC"), ("DB", "BD"), ("AAB", "AB")]
)
def test_several_letters(text, letters):
    assert cmb.strict(text, True)[0] == letters
    assert cmb.strict(text, False) == ("", "none")  # one was asked for


def test_which_rule_was_used_is_said():
    assert cmb.official("答案是D。", False)[1] == "statement"
    assert cmb.official("D", False)[1] == "any letter"
    assert [cmb.strict(t, False)[1] for t in ("选D", "D", "?")] == [
        "statement",
        "begins with it",
        "none",
    ]


def score(key: dict, letters: dict) -> dict:
    lines = [{"id": i, "answer": f"答案是{a}。" if a else ""} for i, a in letters.items()]
    return cmb.results(lines, key)


def test_the_scores_of_the_official_key(shared_data):
    """The figures are what CMB's score.py printed for these sheets of its key."""
    path = shared_data / "benchmarks/cmb/CMB-test-choice-answer.json"
    key = {str(entry["id"]): entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    perfect = {i: entry["answer"] for i, entry in key.items()}
    found = score(key, perfect)["official"]
    assert len(key) == 11_200 and len(found["classes"]) == 28 and len(found["types"]) == 6
    assert found["acc"] == found["class_macro"] == 1.0
    ascending = score(key, {i: "".join(sorted(a)) for i, a in perfect.items()})
    assert ascending["official"]["types"]["药师考试"] == 0.99875  # four keys are EB, EC, DB, CA
    assert ascending["official"]["acc"] == pytest.approx(0.9996428571)
    assert ascending["strict"]["acc"] == 1.0  # sets
    only_a = score(key, dict.fromkeys(key, "A"))["official"]
    types = [0.1485, 0.154375, 0.185, 0.1875, 0.158125, 0.144375]
    assert list(only_a["types"].values()) == pytest.approx(types)


def test_score_is_the_mean_of_classes():
    def entry(exam_class: str, answer: str, kind: str = "单项选择题") -> dict:
        named = {"exam_type": "t", "exam_class": exam_class, "question_type": kind}
        return named | {"answer": answer}

    key = {"1": entry("a", "A"), "2": entry("a", "B"), "3": entry("b", "CD", cmb.SEVERAL)}
    found = score(key, {"1": "A", "2": "C", "3": "DC"})
    assert found["official"]["acc"] == pytest.approx(1 / 3)
    assert found["official"]["class_macro"] == 0.25 and found["official"]["types"] == {"t": 0.25}
    assert found["strict"]["class_macro"] == 0.75  # DC is the set CD
    assert found["strict"]["several_answers"] == {"n": 1, "acc": 1.0}


def write(folder, n: int = 5, **changes):
    """(questions, key) of n items; `changes` are of the second entry of the key."""
    rng = random.Random(0)
    named = {"exam_type": "医师考试", "exam_class": "执业医师", "question_type": "单项选择题"}
    asked = [
        {
            "id": i,
            **named,
            "question": f"第{i}题",
            "option": {"A": "甲", "B": "乙丙", "C": "", "D": " "},
        }
        for i in range(1, n + 1)
    ]
    key = [{"id": i, **named, "answer": rng.choice("AB")} for i in range(1, n + 1)]
    key[1] |= changes
    paths = folder / "questions.json", folder / "key.json"
    for path, content in zip(paths, (asked, [e for e in key if e["id"]]), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return paths


def test_the_question_as_it_is_asked(tmp_path):
    """An option of one character stands there; an empty one and a blank one do not."""
    asked, key = cmb.questions(*write(tmp_path))
    assert asked[0].turns == [
        (
            "以下是中国医师考试中执业医师考试的一道单项选择题，不需要做任何分析和解释，直接输出答案选项。"
            "\n第1题\nA. 甲\nB. 乙丙",
            key["1"]["answer"],
        )
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "NULL"}, "record 2: field 'answer': 'NULL' is no key"),
        ({"answer": ""}, "record 2: field 'answer' is missing"),
        ({"id": 1}, "record 2: field 'id': 1 stands there twice"),
        ({"id": 9}, "has no answer to id 2"),
        (
            {"exam_class": "护士"},
            "'exam_class' is '执业医师', but '护士' in .*do not belong together",
        ),
    ],
)
def test_a_key_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        cmb.questions(*write(tmp_path, **changes))


@pytest.mark.parametrize("field, value", [("option", ["甲"]), ("option", None), ("question", None)])
def test_a_question_that_cannot_be_asked_is_refused(field, value, tmp_path):
    data, key = write(tmp_path)
    records = json.loads(data.read_text(encoding="utf-8"))
    records[1][field] = value
    data.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(InputError, match=r"record 2: fields 'question', a text, and 'option'"):
        cmb.questions(data, key)


def test_a_question_that_is_asked_twice_is_refused(tmp_path):
    data, key = write(tmp_path)
    records = json.loads(data.read_text(encoding="utf-8"))
    data.write_text(json.dumps([*records, records[1]], ensure_ascii=False), encoding="utf-8")
    with pytest.raises(InputError, match=r"asks 6 questions, .* answers 5; .* asked twice: 2"):
        cmb.questions(data, key)


def test_from_questions_to_both_scores(model, tmp_path, capsys):  # noqa: F811
    data, key = write(tmp_path)
    arguments = ["--model", str(model), "--data", str(data), "--key", str(key), "--max_new", "4"]
    evaluate.exam([*arguments, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/results.json").read_text())["cmb"]
    lines = (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert found["n"] == len(lines) == 5 and sum(found["strict"]["rules"].values()) == 5
    assert "official" in capsys.readouterr().out
