"""Stores of documents for the tests: files for them, and what is in one."""

import json
from itertools import pairwise
from pathlib import Path

from nanomed import store
from tests.conftest import ROOT

SAMPLES = [str(ROOT / f"samples/cpt_{name}.jsonl") for name in ("medical", "general")]


def write(path: Path, records: list) -> str:
    records = [{"text": r} if isinstance(r, str) else r for r in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def in_shard(built: store.Documents, shard: int) -> list[list[int]]:
    """A shard's documents, as its arrays say."""
    tokens = built._map(shard, "tokens").tolist()
    return [tokens[a:b] for a, b in pairwise(built._map(shard, "borders").tolist())]


def everything(built: store.Documents) -> list[list[int]]:
    """All documents in the order of the files."""
    found = []
    for shard in range(len(built.manifest["shards"])):
        source = built._map(shard, "source").reshape(-1, 2).tolist()
        found += zip(source, in_shard(built, shard), strict=True)
    return [ids for _, ids in sorted(found, key=lambda pair: pair[0])]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
