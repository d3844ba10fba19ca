"""A file of every format, at most 5 records each, with the normal form that reading must give."""

import gzip
import json
from collections.abc import Iterator, Sequence

from nanomed.records import DOCUMENT, Document, examples_of, read_records, texts_in

U, A = "user", "assistant"
QA = [(U, "问"), (A, "答")]
RAW = "text continued without a template"


def turns(*texts: str) -> list[tuple[str, str]]:
    return [((U, A)[i % 2], text) for i, text in enumerate(texts)]


def gpt(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def openai(*texts: str) -> list[dict]:
    return [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(texts)]


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def jsonl(*records: dict) -> bytes:
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()


def array(*records: dict) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def document_of(record: dict) -> Document:
    return examples_of(record, DOCUMENT)[0]


def read_documents(path: str, fields: Sequence[str] = ()) -> Iterator[tuple[int, Document, int]]:
    """As pre-training reads a file."""
    for number, record, n_bytes in read_records(path, fields):
        for document in texts_in(path, number, record):
            yield number, document, n_bytes


# name -> (file name, its bytes, for each chat: its turns and whatever else is not the default)
CHATS = {
    "alpaca": (
        "a.json",
        array(
            {"instruction": "问", "input": "", "output": "答"},
            {"instruction": "问", "input": "细", "output": "答", "history": None},
            {"instruction": "丙", "input": None, "output": "丁", "history": []},
            {"instruction": "丙", "output": "丁", "history": [["问", "答"]], "system": "医"},
        ),
        [
            (QA, {}),
            (turns("问\n细", "答"), {}),
            (turns("丙", "丁"), {}),
            (turns("问", "答", "丙", "丁"), {"system": "医"}),
        ],
    ),
    "AquilaMed-Instruct": (
        "medical_train_all_v1.json",
        array(
            {"instruction": "问：头痛？", "input": "", "output": "答：休息", "source": "Huatuo"},
            {"instruction": "问", "output": "答", "kind": "single_turn_QA_ch"},
        ),
        [
            (
                turns("问：头痛？", "答：休息"),
                {"source": "Huatuo", "notes": ["text begins with 问： or 答：, kept"]},
            ),
            (QA, {"source": "single_turn_QA_ch"}),
        ],
    ),
    "ShareGPT": (
        "a.jsonl",
        jsonl(
            {"conversations": gpt("问", "答"), "id": 7, "system": "医"},
            {"conversations": [{"from": "gpt", "value": "迎"}, *gpt("问", "答", "谢")]},
            {"conversations": [{"from": "human", "value": "喂"}, *gpt("问", "答")]},
            {
                "conversations": [
                    {"from": "human", "value": "查"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "42"},
                    {"from": "gpt", "value": "答"},
                ],
                "tools": "[{name}]",
            },
            {"conversations": [*gpt("问", "答"), {"from": "system", "value": "医"}]},
        ),
        [
            (QA, {"system": "医"}),
            (
                QA,
                {
                    "notes": [
                        "assistant turn before the first question dropped",
                        "user turn after the last answer dropped",
                    ]
                },
            ),
            ([(U, "喂"), *QA], {}),
            (
                turns("查", "{}", "42", "答"),
                {
                    "notes": [
                        "function_call turn read as the assistant's",
                        "observation turn read as the user's",
                    ],
                    "unread": ["tools"],
                },
            ),
            (QA, {"dropped": "system turn in the middle"}),
        ],
    ),
    "OpenAI messages": (
        "a.jsonl",
        jsonl(
            {"messages": [{"role": "system", "content": "医"}, *openai("问", "答")]},
            {
                "messages": [
                    {"role": U, "content": [part("问"), part("题")]},
                    {"role": A, "content": "答"},
                ]
            },
            {
                "messages": [
                    {"role": U, "content": "问"},
                    {"role": A, "content": None, "tool_calls": [{"name": "search"}]},
                    {"role": "tool", "content": "42"},
                    {"role": A, "content": "答"},
                ]
            },
        ),
        [
            (QA, {"system": "医"}),
            (turns("问题", "答"), {}),
            (
                turns("问", "", "42", "答"),
                {
                    "dropped": "empty answer",
                    "notes": ["tool turn read as the user's"],
                    "unread": ["messages[].tool_calls"],
                },
            ),
        ],
    ),
    "TRL prompt and completion": (
        "a.jsonl",
        jsonl(
            {"prompt": "天是", "completion": "蓝的"},
            {"prompt": openai("一", "二", "问"), "completion": [{"role": A, "content": "答"}]},
            {"prompt": [{"role": A, "content": "迎"}, *openai("问")], "completion": "答"},
        ),
        [
            (turns("天是", "蓝的"), {"raw": True, "notes": [RAW]}),
            (turns("一", "二", "问", "答"), {"untrained": {0, 1, 2}}),
            (
                QA,
                {
                    "untrained": {0},
                    "notes": ["assistant turn before the first question dropped"],
                },
            ),
        ],
    ),
    "Aquila2 / FlagAI": (
        "convo.jsonl",
        jsonl({"id": "x", "conversations": gpt("问", "答"), "instruction": "医"}),
        [(QA, {"system": "医"})],
    ),
    "Huatuo encyclopedia": (
        "train_datasets.jsonl",
        jsonl(
            {"questions": ["问", "另问"], "answers": ["答"]},
            {"questions": [["问"], ["另问"]], "answers": [["答"]]},
        ),
        [(QA, {}), (turns("另问", "答"), {})] * 2,
    ),
    "Huatuo lists": (
        "huatuo.json",
        array({"id": "", "instruction": ["问"], "input": "", "output": ["答"]}),
        [(QA, {})],
    ),
    "Huatuo26M-Lite": (
        "format_data.jsonl",
        jsonl({"id": 1, "question": "问", "answer": "答", "score": 4, "label": "内科"}),
        [(QA, {})],
    ),
    "HuatuoGPT": (
        "a.jsonl",
        jsonl({"data": ["问：头痛？", "答：休息", "问：多久？", "答：三天"]}),
        [(turns("头痛？", "休息", "多久？", "三天"), {})],
    ),
    "问 and 答": ("medical_corpus_zh.txt", jsonl({"问": "问", "答": "答"}), [(QA, {})]),
    "Toyhom CSV": (
        "内科.csv",
        (
            "department,title,ask,answer\r\n"
            '心血管科,能吃桂圆吗,"冠心病,能吃桂圆吗？",可以\r\n'
            '内科,怎么办,"发热\n三天",多饮水\r\n'
            "内科,怎么办,无,休息\r\n"
        ).encode("gb18030"),
        [
            (turns("冠心病,能吃桂圆吗？", "可以"), {}),
            (turns("怎么办\n发热\n三天", "多饮水"), {}),
            (turns("怎么办", "休息"), {}),
        ],
    ),
}

# for each pair: its turns, chosen, rejected, and whatever else is not the default
PAIRS = {
    "AquilaMed-RL": (
        "med_train_dpo_v1.json",
        array(
            {"instruction": "问", "input": "", "output": ["好", "坏"]},
            {"instruction": "", "input": "问", "output": ["好", "坏"]},
            {"instruction": "问", "input": "细", "output": ["好", "好 "]},
            {"instruction": "问", "output": ["好", " "], "kind": "objective", "group": "g"},
        ),
        [
            ([(U, "问")], "好", "坏", {}),
            ([(U, "问")], "好", "坏", {}),
            ([(U, "问\n细")], "好", "好 ", {"dropped": "chosen and rejected are the same"}),
            (
                [(U, "问")],
                "好",
                " ",
                {
                    "dropped": "empty answer",
                    "kind": "objective",
                    "source": "objective",
                    "group": "g",
                },
            ),
        ],
    ),
    "ShareGPT preference": (
        "a.jsonl",
        jsonl(
            {
                "conversations": gpt("一", "二", "问"),
                "chosen": {"from": "gpt", "value": "好"},
                "rejected": {"from": "gpt", "value": "坏"},
            }
        ),
        [(turns("一", "二", "问"), "好", "坏", {})],
    ),
    "MedicalGPT": (
        "dpo_zh_500.jsonl",
        jsonl(
            {"conversations": gpt("问"), "chosen": "好", "rejected": "坏", "system": "医"},
            {
                "system": "",
                "history": [["一", "二"]],
                "question": "问",
                "response_chosen": "好",
                "response_rejected": "坏",
            },
        ),
        [
            ([(U, "问")], "好", "坏", {"system": "医"}),
            (turns("一", "二", "问"), "好", "坏", {}),
        ],
    ),
    "TRL texts": (
        "a.jsonl",
        jsonl({"prompt": "天是", "chosen": "蓝的", "rejected": "绿的"}),
        [([(U, "天是")], "蓝的", "绿的", {"raw": True, "notes": [RAW]})],
    ),
    "TRL lists": (
        "a.jsonl",
        jsonl(
            {
                "prompt": [{"role": "system", "content": "医"}, *openai("问")],
                "chosen": [{"role": A, "content": "好"}],
                "rejected": [{"role": A, "content": "坏"}],
            },
            {"chosen": openai("问", "二", "三", "好"), "rejected": openai("问", "二", "三", "坏")},
            {"prompt": "问", "chosen": openai("问", "好"), "rejected": openai("问", "坏")},
            {"chosen": openai("问", "好", "一", "二"), "rejected": openai("问", "坏")},
        ),
        [
            ([(U, "问")], "好", "坏", {"system": "医"}),
            (turns("问", "二", "三"), "好", "坏", {}),
            ([(U, "问")], "好", "坏", {}),
            ([(U, "问")], "二", "坏", {"dropped": "answers of several turns"}),
        ],
    ),
    "Alpaca comparison": (
        "a.json",
        array({"instruction": "问", "input": "细", "chosen": "好", "rejected": "坏"}),
        [([(U, "问\n细")], "好", "坏", {})],
    ),
}

# for each document: its text, language, and whatever else is not the default
DOCUMENTS = {
    "CPT JSONL": (
        "a.jsonl",
        jsonl({"text": "糖尿病", "source": "书"}, {"text": " "}),
        [("糖尿病", "zh", {"source": "书"}), (" ", "other", {"dropped": "empty text"})],
    ),
    "plain text": ("a.txt", "糖尿病 diabetes\n\n[1] gout\n".encode(), [
        ("糖尿病 diabetes", "zh", {}),
        ("[1] gout", "en", {}),
    ]),
    "plain text in GB18030": ("a.txt.gz", gzip.compress("糖尿病是什么？\n".encode("gb18030")), [
        ("糖尿病是什么？", "zh", {}),
    ]),
    "IndustryCorpus": (
        "rank_0.jsonl.gz",
        gzip.compress(jsonl({"content": "痛风", "id": 3, "alnum_ratio": 0.9, "quality": [1]})),
        [("痛风", "zh", {})],
    ),
}  # fmt: skip
