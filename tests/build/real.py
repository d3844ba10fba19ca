"""Real medical and general texts, by source. Tests that use them skip where they are absent."""

import csv
import functools
import json
import os
import re
from pathlib import Path

import pytest

MEDICAL = (
    "huatuo zh",
    "chats zh",
    "pubmed en",
    "cmtmedqa zh",
    "fever zh",
    "medqa en",
    "medmcqa en",
)
GENERAL = (
    *("alpaca zh", "alpaca en", "c4 en", "titles zh", "cold zh", "sharegpt zh", "dpo zh", "dpo en"),
    "wiki en",
)


def real_model_folder() -> Path:
    """Of a pretrained model, with which slow tests measure. Skips where there is none."""
    named = os.environ.get("NANOMED_REAL_MODEL")
    folder = Path(named or Path.home() / ".cache/nanomed/smollm2-135m")
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip("no real model: docs/real_model.md makes one, NANOMED_REAL_MODEL names it")
    return folder


def joined(value) -> str:
    if isinstance(value, list):
        return " ".join(map(joined, value))
    return value if isinstance(value, str) else ""


def turns(record: dict) -> str:
    return " ".join(turn["value"] for turn in record["conversations"])


@functools.cache
def sources(data: Path) -> dict[str, list[str]]:
    """The texts of each, in its file's order."""
    general = data / "general"

    def array(name: str) -> list:
        return json.loads((data / name).read_text("utf-8"))

    def lines(name: str) -> list:
        return [json.loads(line) for line in (data / name).read_text("utf-8").splitlines()]

    def alpaca(name: str) -> list[str]:
        fields = ("instruction", "input", "output")
        return ["".join(joined(r[f]) for f in fields) for r in array(name)]

    articles = (general / "lf_wiki_demo.txt").read_text("utf-8").splitlines()
    titles = (general / "thuc_test.txt").read_text("utf-8")
    asked = ("history", "instruction", "instruct", "output")
    with (general / "cold_dev.csv").open(encoding="utf-8-sig") as file:
        cold = [row["TEXT"] for row in csv.DictReader(file)]
    return {
        "huatuo zh": [joined(r["instruction"]) + " " + joined(r["output"])
                      for r in array("huatuo26m_single_turn.json")],
        "chats zh": [turns(r) for r in lines("medical_sft_sharegpt.jsonl")],
        "pubmed en": [" ".join(r["CONTEXTS"]) for r in array("pubmedqa_labeled.json").values()],
        "cmtmedqa zh": [" ".join(joined(r.get(f)) for f in asked)
                        for r in array("cmtmedqa_multi_turn.json")],
        "fever zh": [t.strip() for t in (general / "fever.txt").open() if len(t) > 40],
        "medqa en": [r["question"] for r in lines("general/ma_medqa_test.jsonl")],
        "medmcqa en": [r["question"] + " " + " ".join(map(str, r["options"].values()))
                       for r in lines("general/ma_medmcqa_test.jsonl")],
        "alpaca zh": alpaca("general/lf_alpaca_zh_demo.json"),
        "alpaca en": alpaca("general/lf_alpaca_en_demo.json"),
        "c4 en": [r["text"] for r in lines("general/lf_c4_demo.jsonl")],
        "titles zh": re.findall("(?m)^(.*)\t", titles)[:1500],
        "cold zh": cold[:1000],
        "sharegpt zh": [turns(r) for r in lines("general/sharegpt_zh_1K_format.jsonl")],
        "dpo zh": [turns(r) + r["chosen"] for r in lines("preference_sharegpt.jsonl")],
        "dpo en": [turns(r) + joined(r["chosen"].get("value"))
                   for r in array("general/lf_dpo_en_demo.json")],
        "wiki en": [a[i : i + 800] for a in articles for i in range(0, len(a) - 800, 800)],
    }  # fmt: skip
