"""samples/pool.jsonl.gz, which paper.sh chooses its chats from."""

import gzip
import json
import sys
from collections import Counter

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "samples"))
import pool


def read(name: str) -> list[dict]:
    lines = gzip.decompress((ROOT / "samples" / name).read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


def answers(record: dict) -> list[str]:
    return [turn["content"] for turn in record["messages"][1::2]]


def test_committed_files_are_what_the_generator_makes():
    for name, records in pool.files().items():
        assert read(name) == records, f"{name} is stale: run python samples/pool.py"


def test_a_third_of_the_chats_is_of_no_use():
    made = read("pool.jsonl.gz")
    planted = Counter(r["category"] for r in made)
    assert planted["good"] == 2 * pool.BAD == len(made) - pool.BAD
    assert set(planted) == set(pool.QUALITY)
    first = Counter(r["category"] == "good" for r in made[:2100])  # paper.sh's "unselected"
    assert 0.63 < first[True] / 2100 < 0.70
    whole = {answer for r in made if r["category"] == "good" for answer in answers(r)}
    for r in made:  # what is left of a dialogue's long answer may be a whole short one
        if r["category"] == "evasive" or (r["category"] == "cut" and r["kind"] != "multi_turn_zh"):
            assert not whole & set(answers(r)), r


def test_labels_say_what_was_planted():
    firsts = {json.dumps(r["messages"][:2]): r["category"] for r in read("pool.jsonl.gz")}
    labels = read("pool_labels.jsonl.gz")
    assert len(labels) == round(pool.LABELLED * len(read("pool.jsonl.gz")))
    right = [r["quality"] == pool.QUALITY[firsts[json.dumps(r["messages"])]] for r in labels]
    assert sum(right) / len(right) > 0.98  # two chats may begin with the same words
    assert {r["complexity"] for r in labels} == {3, 4}
