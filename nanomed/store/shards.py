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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

FILES = {
    "tokens": "tokens.u32",
    "borders": "borders.npy",
    "keys": "keys.npy",
    "source": "source.npy",
}

DTYPES = {
    "tokens": np.dtype("<u4"),
    "borders": np.dtype("<i8"),
    "keys": np.dtype("<u8"),
    "source": np.dtype("<i8"),
}


def file_of(shard: int, array: str) -> str:
    return f"shard-{shard:05d}.{FILES[array]}"


class Shard:
    """Documents gathered in memory until they are written."""

    def __init__(self):
        self.ids: list[np.ndarray] = []  # [documents][tokens] uint32
        self.keys: list[int] = []
        self.source: list[tuple[int, int]] = []
        self.n_tokens = 0

    def add(self, ids: np.ndarray, key: int, file: int, record: int) -> None:
        self.ids.append(ids)
        self.keys.append(key)
        self.source.append((file, record))
        self.n_tokens += len(ids)

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Its arrays, in the order of the documents' keys. Returns what the manifest says."""
        keys = np.array(self.keys, DTYPES["keys"])
        order = np.argsort(keys, kind="stable")
        lengths = np.array([len(ids) for ids in self.ids], DTYPES["borders"])[order]
        content = {
            "tokens": (self.ids[i].astype(DTYPES["tokens"]).tobytes() for i in order),
            "borders": [_npy(np.concatenate(([0], np.cumsum(lengths))))],
            "keys": [_npy(keys[order])],
            "source": [_npy(np.array(self.source, DTYPES["source"])[order])],
        }
        return {
            "tokens": self.n_tokens,
            "documents": len(order),
            "files": {
                file_of(number, array): _write(folder / file_of(number, array), chunks)
                for array, chunks in content.items()
            },
        }


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
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
