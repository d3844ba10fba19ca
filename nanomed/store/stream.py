"""A store of documents, opened: streams of tokens that are never in memory.

A store is a folder of shards (nanomed/store/shards.py has the layout). Within a shard documents
stand in the order of their split keys, so what any fraction holds out is each shard's beginning:

    shard 0   | held out |  to train on            |
    shard 1   | held out   |  to train on        |         (the border: a binary search per shard)

A Part is one side of it, shard after shard, as one stream of tokens.
"""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanomed.config import InputError
from nanomed.store.shards import file_of


class Piece(NamedTuple):
    """Some tokens of one document."""

    ids: np.ndarray  # [n] int64
    follows: int  # the token after the last one in the same document, or -100
    begins: bool  # whether ids[0] is the document's first token
    shard: int
    document: int  # its number in the shard


class Documents:
    """A finished store. Opening it reads the manifest and the files' sizes, no token."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)

    def split(self, fraction: float) -> tuple["Part", "Part"]:
        """(to train on, held out): a document is held out if its key is below the fraction's share
        of all keys (nanomed.loader.is_held_out). Either part may be empty."""
        limit = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
        sizes = np.array([s["documents"] for s in self.manifest["shards"]], np.int64)
        cuts = np.array(
            [np.searchsorted(self._load(s, "keys"), limit) for s in range(len(sizes))], np.int64
        )
        return Part(self, cuts, sizes), Part(self, np.zeros_like(cuts), cuts)

    def where(self, shard: int, document: int) -> tuple[str, int]:
        """The file, and the record's number in it, that a document was read from."""
        file, record = self._load(shard, "source")[document]
        return self.manifest["sources"][file]["path"], int(record)

    def _load(self, shard: int, array: str) -> np.ndarray:
        """Mapped anew each time: what a process has read does not stay in its memory."""
        path = self.folder / file_of(shard, array)
        if array == "tokens":
            return np.memmap(path, "<u4", "r")
        return np.load(path, mmap_mode="r")


class Part:
    """Some documents of a store as one stream of tokens: of each shard those from first to last."""

    def __init__(self, store: Documents, first: np.ndarray, last: np.ndarray):
        self.store, self.first = store, first  # [shards]
        spans = [_span(store, s, *ends) for s, ends in enumerate(zip(first, last, strict=True))]
        begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
        self.begins = begins  # [shards] the first token of the part in each shard
        self.offsets = np.concatenate(([0], np.cumsum(ends - begins)))  # [shards+1] in the stream
        self.documents = np.concatenate(([0], np.cumsum(last - first)))  # [shards+1] before each

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_documents(self) -> int:
        return int(self.documents[-1])

    def read(self, start: int, stop: int) -> list[Piece]:
        """The pieces of documents in tokens [start, stop) of the stream, in its order. Raises
        IndexError beyond the stream's ends."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.n_tokens}")
        pieces: list[Piece] = []
        shard = self._shard_at(start)
        while start < stop:
            end = min(stop, int(self.offsets[shard + 1]))
            pieces += self._read_shard(shard, start, end)
            start, shard = end, shard + 1
        return pieces

    def _read_shard(self, shard: int, start: int, stop: int) -> list[Piece]:
        if start == stop:
            return []
        borders, tokens = (self.store._load(shard, array) for array in ("borders", "tokens"))
        start, stop = (int(x - self.offsets[shard] + self.begins[shard]) for x in (start, stop))
        first = int(np.searchsorted(borders, start, "right")) - 1
        last = int(np.searchsorted(borders, stop, "left"))
        edges = borders[first : last + 1].tolist()
        ids = tokens[start : stop + 1].astype(np.int64)  # and one more, which may follow
        pieces = []
        for document, (low, high) in enumerate(pairwise(edges), first):
            a, b = max(low, start), min(high, stop)
            follows = int(ids[b - start]) if b < high else -100
            pieces.append(Piece(ids[a - start : b - start], follows, a == low, shard, document))
        return pieces

    def n_ends(self, start: int, stop: int) -> int:
        """How many documents have their last token in [start, stop) of the stream: so many of its
        tokens have no successor to learn."""
        return self._ends_before(stop) - self._ends_before(start)

    def _ends_before(self, position: int) -> int:
        shard = self._shard_at(position)
        if shard == len(self.begins):
            return self.n_documents
        token = position - self.offsets[shard] + self.begins[shard]
        ended = np.searchsorted(self.store._load(shard, "borders"), token, "right") - 1
        return int(self.documents[shard] + ended - self.first[shard])

    def _shard_at(self, position: int) -> int:
        return int(np.searchsorted(self.offsets, position, "right")) - 1


def _span(store: Documents, shard: int, first: int, last: int) -> tuple[int, int]:
    """The tokens of a shard's documents from first to last."""
    borders = store._load(shard, "borders")
    return int(borders[first]), int(borders[last])


# ---------------------------------------------------------------- checks


def read_manifest(folder: Path) -> dict:
    """Checked against the files' sizes. Raises InputError, naming what is wrong."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {n: f for shard in manifest["shards"] for n, f in shard["files"].items()}
        whole = sum(shard["tokens"] for shard in manifest["shards"]) == manifest["tokens"]
        expected = {name: facts["size"] for name, facts in files.items()}
    except FileNotFoundError:
        begun = (folder / "unfinished.json").exists()
        raise InputError(
            f"{folder} is not a finished store, it has no manifest.json; "
            + ("run the command that began it again" if begun else "python -m nanomed.store")
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); tokenise the files again") from None
    if not whole:
        raise InputError(f"{path} is damaged (the shards' tokens); tokenise the files again")
    found = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    for name, size in expected.items():
        if found.get(name) != size:
            has = f"has {found[name]:,} bytes" if name in found else "is missing"
            raise InputError(
                f"{folder / name} {has}, the manifest says {size:,}: the store is damaged; copy it "
                "again or tokenise the files again"
            )
    return manifest


def check(store: Documents, identity: dict) -> None:
    """Raises InputError unless the store was written with this tokenizer, template and code."""
    found = store.manifest
    if found.get("tokenizer") != identity["tokenizer"]:
        raise InputError(f"{store.folder} was tokenised with another tokenizer than this run's")
    for name in ("document_end", "template"):
        if found.get(name) != identity[name]:
            raise InputError(f"{store.folder} was tokenised with another {name} than this run's")
    code = found.get("code") or {}
    if changed := [name for name in identity["code"] if code.get(name) != identity["code"][name]]:
        raise InputError(
            f"{store.folder} was written by another version of nanomed ({', '.join(changed)} "
            "changed); tokenise the files again"
        )
