"""A store of documents on disk.

    shard-00000.tokens.u32     the documents' ids, one after another, uint32 little-endian
    shard-00000.borders.npy    [n+1] int64: document d is tokens borders[d] to borders[d+1]
    shard-00000.keys.npy       [n] uint64, rising: which side of a split a document stands on
    shard-00000.source.npy     [n,2] int64: the file's number and the record's in it
    shard-00000.json           counts and hashes, and where in the files the next shard begins
    manifest.json              all of that together; a folder with one is a finished store

A shard's JSON comes after its arrays and the manifest comes last, each by a rename: what has its
JSON is whole. Nothing in them depends on the time, the machine or the number of processes.
"""

import hashlib
import io
import json
import os
from array import array
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nanomed.store.tally import Tally
from nanomed.store.texts import Encoded

DTYPES = {
    "tokens": np.dtype("<u4"),
    "borders": np.dtype("<i8"),
    "keys": np.dtype("<u8"),
    "source": np.dtype("<i8"),
}


def file_of(shard: int, name: str) -> str:
    return f"shard-{shard:05d}.{name}.{'u32' if name == 'tokens' else 'npy'}"


def files_of(shards: list[dict]) -> dict[str, dict]:
    """Size and hash of each of their files, by name."""
    return {name: facts for shard in shards for name, facts in shard["files"].items()}


class Shard:
    """Documents gathered in memory, in one piece that is given back whole, until written."""

    def __init__(self, number: int):
        self.number = number
        self.tokens, self.keys = array("I"), array("Q")
        self.borders, self.source = array("q", [0]), array("q")
        self.tallies: dict[tuple[int, str], Tally] = defaultdict(Tally)  # (file, its source)

    @property
    def n_tokens(self) -> int:
        return self.borders[-1]

    def add(self, text: Encoded, file: int, record: int, source: str) -> None:
        self.tallies[file, source].count(text.facts, text.n_tokens, text.n_tokens - 1)
        if text.n_tokens:
            self.tokens.frombytes(text.ids)
            self.borders.append(len(self.tokens))
            self.keys.append(text.key)
            self.source.extend((file, record))

    def write(self, folder: Path, following: tuple[int, int]) -> None:
        """Its arrays, in the order of the documents' keys, and then its JSON; the next shard begins
        with the record `following`."""
        tokens = np.frombuffer(self.tokens, np.uint32).astype(DTYPES["tokens"], copy=False)
        borders = np.array(self.borders, DTYPES["borders"])
        keys = np.array(self.keys, DTYPES["keys"])
        source = np.array(self.source, DTYPES["source"]).reshape(-1, 2)
        order = np.argsort(keys, kind="stable")
        content = {
            "tokens": (tokens[borders[i] : borders[i + 1]].tobytes() for i in order),
            "borders": [_npy(np.concatenate(([0], np.cumsum(np.diff(borders)[order]))))],
            "keys": [_npy(keys[order])],
            "source": [_npy(source[order])],
        }
        about = {
            "tokens": self.n_tokens,
            "documents": len(order),
            "files": {
                file_of(self.number, name): _write(folder / file_of(self.number, name), chunks)
                for name, chunks in content.items()
                if self.n_tokens  # else all of its records were dropped
            },
            "next": following,
            "tallies": [[*key, vars(tally)] for key, tally in self.tallies.items()],
        }
        write_json(folder / f"shard-{self.number:05d}.json", about)


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _write(path: Path, chunks: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    _write(unfinished, [json.dumps(content, ensure_ascii=False).encode()])
    unfinished.rename(path)


def finished(folder: Path) -> list[dict]:
    """What each shard's JSON says, up to the first shard without one."""
    found: list[dict] = []
    while (path := folder / f"shard-{len(found):05d}.json").exists():
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
