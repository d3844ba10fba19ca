"""Benchmarks in both layouts, and files that cannot be scored."""

import csv
import json
import shutil

import pytest

from nanomed.config import InputError
from nanomed.evals.items import load
from nanomed.evals.tasks import tasks as all_tasks
from tests.conftest import ROOT
from tests.evals.test_requests import write_lines

ABCD = {"A": "one", "B": "two", "C": "three", "D": "four"}
QUESTION = 'Which, "of these",\nis it? '
EXPLAINED = {"subject_name": "Surgery", "exp": None}
OPS = dict(zip(("opa", "opb", "opc", "opd"), ABCD.values(), strict=True))
ENDINGS = {f"ending{i}": text for i, text in enumerate(ABCD.values())}
APOLLO = {
    "question": QUESTION,
    "option": "\n".join(f"({k}) {v}" for k, v in ABCD.items()),
    "anwer": "(C)",
    "source": "x",
}
MEDQA = {"question": QUESTION, "options": ABCD, "answer": "three", "answer_idx": "C"}


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _rows(*names: str) -> list[list[str]]:
    """Of a csv file with a header, whose first column is a number."""
    return [["", *names], ["0", QUESTION, *ABCD.values(), "C"]]


# task, file, its content (records or rows), split
LAYOUTS = [
    (
        "mmlu_anatomy",
        "cais/mmlu/anatomy/test.jsonl",
        [{"question": QUESTION, "choices": [*ABCD.values()], "answer": 2, "subject": "anatomy"}],
    ),
    ("mmlu_anatomy", "data/test/anatomy_test.csv", [[QUESTION, *ABCD.values(), "C"]]),
    (
        "ceval-valid_physician",
        "ceval/ceval-exam/physician/val.jsonl",
        [{"id": 0, "question": QUESTION, **ABCD, "answer": "C", "explanation": ""}],
    ),
    ("ceval-valid_physician", "val/physician_val.csv", _rows("question", *ABCD, "answer")),
    (
        "cmmlu_genetics",
        "haonan-li/cmmlu/genetics/test.jsonl",
        [{"Question": QUESTION, **ABCD, "Answer": "C"}],
    ),
    ("cmmlu_genetics", "cmmlu/test/genetics.csv", _rows("Question", *ABCD, "Answer")),
    (
        "medqa_4options",
        "GBaker/MedQA-USMLE-4-options-hf/test.jsonl",
        [{"id": "1", "sent1": QUESTION, "sent2": "", **ENDINGS, "label": 2}],
    ),
    ("medqa_4options", "US/4_options/phrases_no_exclude_test.jsonl", [MEDQA]),
    ("medqa_4options", "apollo/test/medqa-usmle.jsonl", [APOLLO]),
    (
        "medmcqa",
        "openlifescienceai/medmcqa/validation.jsonl",
        [{"question": QUESTION, **OPS, "cop": 2, **EXPLAINED}],
    ),
    ("medmcqa", "medmcqa/dev.json", [{"question": QUESTION, **OPS, "cop": 3, **EXPLAINED}]),
    ("medmcqa", "apollo/test/medmcqa.jsonl", [APOLLO]),
    (
        "careqa_en",
        "HPAI-BSC/CareQA/CareQA_en/test.jsonl",
        [{"question": QUESTION, **{f"op{i}": v for i, v in enumerate(ABCD.values(), 1)}, "cop": 3}],
    ),
    (
        "cmexam",
        "CMExam/data/test_with_annotations.csv",
        [
            ["Question", "Options", "Answer", "Explanation"],
            [QUESTION, "\n".join(f"{k} {v}" for k, v in ABCD.items()), "C", "so"],
        ],
    ),
    ("cmexam", "apollo/test/cmexam.jsonl", [APOLLO]),
    ("mcmle", "questions/Mainland/4_options/test.jsonl", [MEDQA]),
    ("cmb_single", "apollo/test/cmb-single.jsonl", [APOLLO]),
]


def put(folder, name: str, content: list | bytes) -> None:
    if isinstance(content, bytes):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(content)
        return
    (write_csv if name.endswith(".csv") else write_lines)(folder / name, content)


def read(task: str, folder):
    task = all_tasks()[task]
    return load(task.layouts, folder, task.subject, task.split)


@pytest.mark.parametrize(
    "task, name, content", LAYOUTS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_every_layout_gives_the_same_item(task, name, content, tmp_path):
    put(tmp_path, name, content)
    split = read(task, tmp_path)
    (item,) = split.items
    assert (item.exam.question, item.exam.options, item.exam.answers) == (QUESTION, ABCD, "C")
    assert split.files == [tmp_path / name]
    assert item.subject == ("Surgery" if "subject_name" in str(content) else "")


def test_parquet_shards_are_read_in_their_order(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    folder = tmp_path / "cais/mmlu/anatomy"
    folder.mkdir(parents=True)
    for i in range(2):
        rows = {"question": [f"number {i}"], "choices": [[*ABCD.values()]], "answer": [i]}
        parquet.write_table(table(rows), folder / f"test-0000{i}-of-00002.parquet")
    exams = [item.exam for item in read("mmlu_anatomy", tmp_path).items]
    assert [(exam.question, exam.answers) for exam in exams] == [
        ("number 0", "A"),
        ("number 1", "B"),
    ]
    copied = shutil.copytree(folder, tmp_path / "cais/mmlu/anatomy/again")
    with pytest.raises(InputError, match="4 files, where this split has 2; let --data name"):
        read("mmlu_anatomy", tmp_path)
    shutil.rmtree(copied)
    (folder / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"00-of-00002.parquet: 1 files, where this split has 2"):
        read("mmlu_anatomy", tmp_path)


ONE = "openlifescienceai/medmcqa/validation.jsonl"
GOOD = {"question": "q", **OPS, "cop": 0}


@pytest.mark.parametrize(
    "task, name, content, message",
    [
        (
            "medmcqa",
            ONE,
            [GOOD, GOOD | {"cop": 4}],
            "record 2: field 'cop': 4 is no key, which is 0 to 3",
        ),
        ("medmcqa", ONE, [GOOD | {"cop": -1}], "-1 is no key.*give a split with published answers"),
        ("medmcqa", "medmcqa/dev.json", [GOOD], "field 'cop': 0 is no key, which is 1 to 4"),
        (
            "medmcqa",
            ONE,
            [{k: v for k, v in GOOD.items() if k != "opc"}],
            "field 'opc': is missing",
        ),
        ("medmcqa", ONE, [GOOD | {"question": None}], "field 'question': is missing"),
        ("medmcqa", ONE, ["a text"], "record 1: .*expected an object"),
        (
            "mmlu_anatomy",
            "test/anatomy_test.csv",
            [["q", *"wxyz", "E"]],
            "'answer'.*no key, which is A to D",
        ),
        (
            "mmlu_anatomy",
            "test/anatomy_test.csv",
            [["q", *"wxyz"]],
            "record 1: 5 columns, expected 6",
        ),
        (
            "mmlu_anatomy",
            "test/anatomy_test.csv",
            b'q,w,x,y,z,A\nq,"w,x,y,z,A',
            "record 2: unexpected end of data; write the file as CSV in UTF-8",
        ),
        (
            "mmlu_anatomy",
            "test/anatomy_test.csv",
            "甲,乙,丙,丁,戊,A\n".encode("gb18030"),
            "record 1: .*can't decode.*UTF-8",
        ),
        ("medmcqa", ONE, b"", "holds no record: the file is empty"),
        ("mmlu_anatomy", "test/anatomy_test.csv", b"", "no item that one letter answers"),
        (
            "mmlu_anatomy",
            "cais/mmlu/anatomy/test.jsonl",
            [{"question": "q", "choices": "abcd", "answer": 0}],
            "field 'choices': expected a list",
        ),
        ("cmexam", "test/cmexam.jsonl", [APOLLO | {"anwer": ""}], "record 1: field 'answer'"),
        (
            "cmexam",
            "test/cmexam.jsonl",
            [{"question": "q", "anwer": "A"}],
            "field 'options': not in",
        ),
        (
            "pubmedqa",
            "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source/test.jsonl",
            [{"QUESTION": "q", "CONTEXTS": ["c"], "final_decision": "unknown"}],
            "'final_decision': \"unknown\" is none of yes, no, maybe",
        ),
        ("pubmedqa", "ori_pqal.json", [{"1": {"QUESTION": "q"}}], "expected one object of 1,000"),
    ],
)
def test_bad_files_are_refused_with_file_record_field_and_remedy(
    task, name, content, message, tmp_path
):
    put(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as error:
        read(task, tmp_path)
    assert name in str(error.value)


def test_what_was_looked_for_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"none of: cais/mmlu/anatomy/\*\*/test\*, .*anatomy_test.csv"
    ):
        read("mmlu_anatomy", tmp_path)


def test_two_copies_of_a_split_are_not_chosen_between(tmp_path):
    for name in ("a/anatomy_test.csv", "b/anatomy_test.csv"):
        put(tmp_path, name, [["q", *"wxyz", "A"]])
    with pytest.raises(
        InputError, match=r"a/anatomy_test.csv and .*: 2 files, where this split has 1"
    ):
        read("mmlu_anatomy", tmp_path)


def test_questions_with_several_answers_are_set_aside_and_counted(tmp_path):
    put(tmp_path, "test/cmexam.jsonl", [APOLLO, APOLLO | {"anwer": "(A)(C)"}, APOLLO])
    split = read("cmexam", tmp_path)
    assert (len(split.items), split.set_aside) == (2, 1)


def test_pubmedqas_own_split_comes_out_of_the_whole_file(shared_data):
    """Its test half is published as a list of ids; the folds are made in the same way."""
    task = all_tasks()["pubmedqa"]
    test = load(task.layouts, shared_data, "", "test")
    whole = json.loads((shared_data / "pubmedqa_labeled.json").read_text())
    ids = json.loads((shared_data / "pubmedqa_test_ground_truth.json").read_text())
    assert [item.exam.question for item in test.items] == [whole[i]["QUESTION"] for i in ids]
    train = load(task.layouts, shared_data, "", "train")
    questions = {item.exam.question for item in train.items}
    assert len(train.items) == 450 and not questions & {item.exam.question for item in test.items}


def test_real_files_have_as_many_items_as_published(shared_data):
    counts = {
        "mmlu_anatomy": 135,
        "mmlu_professional_medicine": 282,
        "cmmlu_anatomy": 148,
        "medqa_4options": 1273,
        "medmcqa": 4183,
        "pubmedqa": 500,
        "cmexam": 1938,
        "mcmle": 3426,
    }
    assert {name: len(read(name, shared_data).items) for name in counts} == counts


def test_no_benchmark_is_committed():
    """Files of benchmarks may not be passed on; the golden items were written for this project."""
    assert not list(ROOT.glob("**/*_test.csv"))
