"""The multiple-choice tasks, one line each: where the items are, how they are put into words.

Names, texts and shots are those of lm-eval 0.4.13 where it has the task. CMExam, MCMLE and
CMB's single-answer questions are not in lm-eval: their wording is CMMLU's.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from nanomed.config import InputError, nearest
from nanomed.evals.items import (
    Source,
    columns,
    listed,
    pubmedqa,
    pubmedqa_records,
    without_header,
)
from nanomed.records.exams import Wording


@dataclass(frozen=True)
class Task:
    name: str
    sources: tuple[Source, ...]  # the layouts in which its items are found
    split: str  # of the items
    pool: str  # the split that shots are taken from
    wording: Wording | None  # None: that of the item's language, as in training
    description: str = ""  # stands before the shots
    subject: str = ""
    strips: bool = False  # white space around the question goes
    first_shots: bool = False  # the shots are the pool's first; else each item draws its own
    by_text: bool = False  # the options' texts are scored, not their letters


def _words(question: str) -> Wording:
    return Wording(question, "{letter}. {text}", "{letters}", context="{context}\n")


ENGLISH, CHINESE = _words("{question}\n{options}\nAnswer:"), _words("{question}\n{options}\n答案：")
MEDQA = _words("Question: {question}\n{options}\nAnswer:")
CHOICES = _words("Question: {question}\nChoices:\n{options}\nAnswer:")
PUBMEDQA = _words("Abstract: {context}Question: {question}\nAnswer:")

ABCD = ["A", "B", "C", "D"]
_MMLU_ROW = without_header("question", *ABCD, "answer")
MMLU = (
    Source("cais/mmlu/{subject}", columns("question", "choices", "answer", first=0)),
    Source("**/{subject}_{split}.csv", columns("question", ABCD, "answer"), records=_MMLU_ROW),
)
CEVAL = (
    Source("ceval/ceval-exam/{subject}", columns("question", ABCD, "answer")),
    Source("**/{subject}_{split}.csv", columns("question", ABCD, "answer")),
)
CMMLU = (
    Source("haonan-li/cmmlu/{subject}", columns("Question", ABCD, "Answer")),
    Source("**/{split}/{subject}.csv", columns("Question", ABCD, "Answer")),
)
OP = ["opa", "opb", "opc", "opd"]


def _apollo(name: str, **splits: str) -> Source:
    """FreedomIntelligence/Apollo's copies, all in one layout: test, and dev for the shots."""
    return Source(f"**/{{split}}/{name}.jsonl", listed, splits or {"train": "dev"})


MEDMCQA_KEY = ("question", OP, "cop")
SOURCES = {
    "medqa_4options": (
        Source(
            "GBaker/MedQA-USMLE-4-options-hf",
            columns("sent1", [f"ending{i}" for i in range(4)], "label", first=0),
        ),
        Source("**/4_options/phrases_no_exclude_{split}.jsonl", listed),
        _apollo("medqa-usmle"),
    ),
    "medmcqa": (
        Source("openlifescienceai/medmcqa", columns(*MEDMCQA_KEY, first=0), subject="subject_name"),
        Source(
            "**/medmcqa/{split}.json",
            columns(*MEDMCQA_KEY, first=1),
            {"validation": "dev"},
            "subject_name",
        ),
        _apollo("medmcqa", validation="test", train="dev"),
    ),
    "pubmedqa": (
        Source("bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source", pubmedqa),
        Source("**/ori_pqal.json", pubmedqa, records=pubmedqa_records),
        Source("**/pubmedqa_labeled.json", pubmedqa, records=pubmedqa_records),
    ),
    "careqa_en": (
        Source(
            "HPAI-BSC/CareQA/CareQA_en",
            columns("question", [f"op{i}" for i in range(1, 5)], "cop", first=1),
            subject="category",
        ),
    ),
    "cmexam": (
        Source("**/[Cc][Mm][Ee]xam*/**/{split}*.csv", listed, subject="Medical Discipline"),
        _apollo("cmexam"),
    ),
    "mcmle": (Source("**/Mainland/4_options/{split}.jsonl", listed), _apollo("medqa-mcmle")),
    "cmb_single": (_apollo("cmb-single"),),
}

MMLU_SIX = ["anatomy", "clinical_knowledge", "college_biology", "college_medicine"]
MMLU_SIX += ["medical_genetics", "professional_medicine"]
MMLU_NAMES = {
    subject: subject.replace("_", " ")
    for subject in (*MMLU_SIX, "nutrition", "virology", "human_aging")
}
CEVAL_NAMES = {
    "basic_medicine": "基础医学",
    "clinical_medicine": "临床医学",
    "physician": "医师资格",
    "veterinary_medicine": "兽医学",
}
CMMLU_NAMES = {
    "anatomy": "解剖学",
    "clinical_knowledge": "临床知识",
    "college_medical_statistics": "大学医学统计",
    "college_medicine": "大学医学",
    "genetics": "遗传学",
    "nutrition": "营养学",
    "professional_medicine": "专业医学",
    "traditional_chinese_medicine": "中医中药",
    "virology": "病毒学",
}
SAMPLES = (Source("**/exam.jsonl", listed),)

_MMLU_HEAD = "The following are multiple choice questions (with answers) about {}.\n\n"
_CEVAL_HEAD = "以下是中国关于{}的单项选择题，请选出其中的正确答案。\n\n"
_CMMLU_HEAD = "以下是关于{}的单项选择题，请直接给出正确答案的选项。\n\n"


def _subjects(
    prefix: str, names: dict[str, str], sources: tuple, split: str, wording: Wording, head: str
) -> list[Task]:
    """A task for each subject, whose shots are the first items of dev."""
    return [
        Task(
            prefix + subject, sources, split, "dev", wording, head.format(name), subject, True, True
        )
        for subject, name in names.items()
    ]


_ALL = [
    *_subjects("mmlu_", MMLU_NAMES, MMLU, "test", ENGLISH, _MMLU_HEAD),
    *_subjects("ceval-valid_", CEVAL_NAMES, CEVAL, "val", CHINESE, _CEVAL_HEAD),
    *_subjects("cmmlu_", CMMLU_NAMES, CMMLU, "test", CHINESE, _CMMLU_HEAD),
    Task("medqa_4options", SOURCES["medqa_4options"], "test", "train", MEDQA),
    Task("medmcqa", SOURCES["medmcqa"], "validation", "train", CHOICES),
    Task("pubmedqa", SOURCES["pubmedqa"], "test", "train", PUBMEDQA, by_text=True),
    Task("careqa_en", SOURCES["careqa_en"], "test", "test", CHOICES),
    *(
        Task(name, SOURCES[name], "test", "train", CHINESE, strips=True)
        for name in ("cmexam", "mcmle", "cmb_single")
    ),
    Task("samples_exam", SAMPLES, "test", "test", None),
    Task("samples_exam_texts", SAMPLES, "test", "test", None, by_text=True),
]
TASKS = {task.name: task for task in _ALL}

_ENGLISH_SETS = ["medqa_4options", "medmcqa", "pubmedqa"]
GROUPS = {
    "mmlu_med": [f"mmlu_{subject}" for subject in MMLU_SIX],
    "mmlu_med_nine": [f"mmlu_{subject}" for subject in MMLU_NAMES],
    "ceval_med": [f"ceval-valid_{subject}" for subject in CEVAL_NAMES],
    "cmmlu_med": [f"cmmlu_{subject}" for subject in CMMLU_NAMES],
    "multimedqa": [*(f"mmlu_{subject}" for subject in MMLU_SIX), *_ENGLISH_SETS],  # lm-eval's
}
# The benchmarks of the paper's Table 1. It is no group: nobody averages over it.
PAPER = [*GROUPS["mmlu_med"], *GROUPS["ceval_med"], *_ENGLISH_SETS]


def named(names: Iterable[str]) -> list[Task]:
    """The tasks of names of tasks and groups, each once. Raises InputError for an unknown one."""
    known = GROUPS | {"paper": PAPER} | {name: [name] for name in TASKS}
    chosen = []
    for name in names:
        if name not in known:
            raise InputError(f"no task {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        chosen += known[name]
    return [TASKS[name] for name in dict.fromkeys(chosen)]
