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


def test_committed_files_are_what_the_generator_makes():
    for name, records in pool.files().items():
        assert read(name) == records, f"{name} is stale: run python samples/pool.py"


def test_a_third_of_the_chats_is_of_no_use():
    made = read("pool.jsonl.gz")
    planted = Counter(r["planted"] for r in made)
    assert planted["good"] == 2 * pool.BAD == len(made) - pool.BAD
    assert set(planted) == set(pool.QUALITY)
    first = Counter(r["planted"] == "good" for r in made[:1600])  # paper.sh's "unselected"
    assert 0.63 < first[True] / 1600 < 0.70
    good = {json.dumps(json.loads(x)["messages"]) for x in (ROOT / "samples/sft.jsonl").open()}
    for r in made:
        assert (json.dumps(r["messages"]) in good) == (r["planted"] == "good"), r


def test_labels_say_what_was_planted():
    firsts = {json.dumps(r["messages"][:2]): r["planted"] for r in read("pool.jsonl.gz")}
    labels = read("pool_labels.jsonl.gz")
    assert len(labels) == pool.LABELLED * 3 * pool.BAD
    right = [r["quality"] == pool.QUALITY[firsts[json.dumps(r["messages"])]] for r in labels]
    assert sum(right) / len(right) > 0.98  # two chats may begin with the same words
    assert {r["complexity"] for r in labels} == {3, 4}
