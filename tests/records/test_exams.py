"""Exam questions in the layouts of public files: which letter is whose, which is right, and how an
item is put into words."""

import json

import pytest

from nanomed.records import BadField, Chat, chats_of
from nanomed.records.exams import Exam, Wording, asked, exam_of, letters_of, options_of, render
from nanomed.records.option_chats import as_item

DRUGS = {"A": "amlodipine", "B": "valsartan", "C": "metoprolol"}
LINES = "(A) amlodipine\n(B) valsartan\n(C) metoprolol"


@pytest.mark.parametrize(
    "record",
    [
        {"options": DRUGS},
        {"option": {"A": "amlodipine", "B": "valsartan", "C": "metoprolol", "D": "", "E": None}},
        {"options": {"c": "metoprolol", "a": "amlodipine", "b": "valsartan"}},
        {"choices": ["amlodipine", "valsartan", "metoprolol"]},
        {"choices": ["A. amlodipine", "B．valsartan", "C、metoprolol"]},
        {"choices": {"text": [*DRUGS.values()], "label": ["A", "B", "C"]}},
        {"options": [{"key": k, "value": v} for k, v in DRUGS.items()]},
        {"option": LINES},
        {"options": "A amlodipine\nB valsartan\nC metoprolol\n"},
        DRUGS,
        {"opa": "amlodipine", "opb": "valsartan", "opc": "metoprolol", "opd": ""},
        {f"option_{k.lower()}": v for k, v in DRUGS.items()},
    ],
)
def test_options_in_every_layout(record):
    assert options_of({"question": "Which is a beta blocker?"} | record) == DRUGS


@pytest.mark.parametrize(
    "record",
    [
        {"options": ["only one"]},
        {"options": {"A": "a", "C": "c"}},  # one is missing
        {"options": {"A": "a", "B": ["b"]}},
        {"options": "amlodipine, valsartan"},
        {"choices": ["x"] * 11},
        {"options": [{"key": "A", "value": "a", "more": 1}, {"key": "B"}]},
    ],
)
def test_options_that_are_not_clear_are_refused(record):
    with pytest.raises(BadField, match="not clear as options"):
        options_of(record)


@pytest.mark.parametrize(
    "record", [{"question": "a"}, {"A": "x"}, {"B": "x", "C": "y"}, {"a": "x"}]
)
def test_what_has_no_options(record):
    assert options_of(record) is None and exam_of(record) is None


@pytest.mark.parametrize(
    "record",
    [
        {"question": [], "A": None, "answer": False, "options": []},
        {"A": [], "answer_idx": [], "options": [], "instruction": None},
    ],
)
def test_an_exam_whose_fields_are_all_empty_is_refused_by_name(record):
    """Found by the long fuzz."""
    with pytest.raises(BadField, match=r"field '(question|answer_idx)': an empty list"):
        chats_of(record)


@pytest.mark.parametrize(
    "answer, letters",
    [
        *[(text, "C") for text in ("C", "c", "(C)", "C.", "opc", "metoprolol", "C. metoprolol")],
        *[(text, "AC") for text in ("AC", "CA", "A,C", "A、C", "A/C", ["A", "C"])],
        (" B ", "B"),
        *[
            (text, "")
            for text in ("D", "AA", "aspirin", "", "1", 2, None, "A fever", "C. valsartan")
        ],
    ],
)
def test_the_letters_an_answer_names(answer, letters):
    assert letters_of(answer, DRUGS) == letters


def test_an_answer_that_can_be_read_in_two_ways_names_nothing():
    """Blood groups: AB is the third option, or the first two."""
    groups = {"A": "A", "B": "B", "C": "AB", "D": "O"}
    assert letters_of("AB", groups) == "" and letters_of("C", groups) == "C"
    assert letters_of("B", groups) == "B"  # both readings are the same option


def test_a_record_as_a_chat_in_its_language():
    record = {"question": "以下哪些属于诱因", "answer": "ABD", "explanation": "休息不是。"}
    record["option"] = {"A": "感染", "B": "快速输液", "C": "休息", "D": "房颤", "E": ""}
    assert render(exam_of(record)).turns == [
        ("user", "以下哪些属于诱因\nA. 感染\nB. 快速输液\nC. 休息\nD. 房颤"),
        ("assistant", "A、B、D。感染；快速输液；房颤\n休息不是。"),
    ]
    english = {"question": "Which is one?", "answer": "C", "context": "Beta blockers.", **DRUGS}
    chat = render(exam_of(english | {"system": "Be brief."}))
    question = "Beta blockers.\nWhich is one?\nA. amlodipine\nB. valsartan\nC. metoprolol"
    assert chat.turns == [("user", question), ("assistant", "C. metoprolol")]
    assert chat.system == "Be brief."


def test_a_wording_is_data():
    words = Wording("{question}\n{options}\nAnswer:", "{letter}) {text}", "{letters}", options=" ")
    exam = Exam("Which {one}?", DRUGS, "B")
    assert asked(exam, words) == "Which {one}?\nA) amlodipine B) valsartan C) metoprolol\nAnswer:"
    assert render(exam, words).turns[1] == ("assistant", "B")


@pytest.mark.parametrize("answer", ["D", 2, "2", "the third one"])
def test_an_uncertain_answer_is_refused(answer):
    with pytest.raises(BadField, match="which of its options A, B, C is right"):
        exam_of({"question": "Which?", "choices": [*DRUGS.values()], "answer": answer})


def test_real_exam_files(shared_data):
    for name in ("cmexam", "cmb-single", "medqa-mcmle"):
        path = shared_data / f"benchmarks/apollo/test/{name}.jsonl"
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        exams = [exam_of(record | {"answer": record["anwer"]}) for record in records]
        assert len(exams) >= 2000 and all(set(e.answers) <= set(e.options) for e in exams)


# ---------------------------------------------------------------- chats with options

QUESTION = "下列哪项正确？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"


@pytest.mark.parametrize(
    "question, answer, letter",
    [
        (QUESTION, "B。乙。", "B"),
        (QUESTION, "D", "D"),
        (QUESTION, "C. 丙", "C"),
        (QUESTION, "A fever is common", None),  # an article, not a letter
        (QUESTION, "乙", None),
        ("头痛怎么办？", "B。", None),
    ],
)
def test_what_is_an_exam_question(question, answer, letter):
    item = as_item(Chat([("user", question), ("assistant", answer)]))
    assert (item.letter if item else None) == letter
    if item:
        assert item.n_options == 4 and item.chat.turns == [("user", question)]
