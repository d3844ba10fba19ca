"""A store of documents, opened: streams of tokens that are never in memory.

A store is a folder of shards (nanomed/store/shards.py has the layout). Within a shard documents
stand in the order of their split keys, so what any fraction holds out is each shard's beginning:

    shard 0   | held out |  to train on            |
    shard 1   | held out   |  to train on        |         (the border: a binary search per shard)

A Part is one side of it, shard after shard, as one stream of tokens.
"""

import json
import mmap
import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanomed.config import InputError
from nanomed.store.cache import digest, limit_of
from nanomed.store.shards import DTYPES, file_of, files_of
from nanomed.store.texts import RENDERED
from nanomed.store.versions import check_versions


class Piece(NamedTuple):
    """Some tokens of one document."""

    ids: np.ndarray  # [n] int64
    last_label: int  # the token after the last one in the same document, or -100
    document: int  # its number in the store


class Documents:
    """A finished store. Opening it reads the manifest and the files' sizes, no token."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        n_documents = [shard["documents"] for shard in self.manifest["shards"]]
        self.starts = np.cumsum([0, *n_documents])  # [shards+1] documents before each shard

    def __len__(self) -> int:
        return int(self.starts[-1])

    def split(self, fraction: float) -> tuple["Part", "Part"]:
        """(to train on, held out): a document is held out if its key is below the fraction's share
        of all keys. Either part may be empty."""
        limit = limit_of(fraction)
        sizes = [(shard["documents"], shard["tokens"]) for shard in self.manifest["shards"]]
        # [shards,2] documents and tokens before each shard's border, and before its end
        cuts = np.array([self._cut(s, limit) for s in range(len(sizes))], np.int64)
        ends = np.array(sizes, np.int64)
        return Part(self, cuts, ends), Part(self, np.zeros_like(cuts), cuts)

    def _cut(self, shard: int, limit: np.uint64) -> tuple[int, int]:
        n = int(np.searchsorted(self._map(shard, "keys"), limit))
        return n, int(self._map(shard, "borders")[n])

    def where(self, document: int) -> tuple[str, int]:
        """The file, and the record's number in it, that a document was read from."""
        shard = int(np.searchsorted(self.starts, document, "right")) - 1
        place = document - int(self.starts[shard])
        file, record = self._map(shard, "source").reshape(-1, 2)[place]
        return self.manifest["sources"][file]["path"], int(record)

    @property
    def keys(self) -> np.ndarray:
        """[documents] uint64, which decide what a split holds out; 8 bytes of memory for each."""
        return np.concatenate([self._map(s, "keys") for s in range(len(self.manifest["shards"]))])

    def _map(self, shard: int, array: str) -> np.ndarray:
        """Mapped anew each time, so that what a process has read does not stay in its memory."""
        n = self.manifest["shards"][shard]["tokens" if array == "tokens" else "documents"]
        count = {"tokens": n, "borders": n + 1, "keys": n, "source": 2 * n}[array]
        dtype = DTYPES[array]
        with open(self.folder / file_of(shard, array), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # An .npy file ends with its values.
        return np.frombuffer(mapped, dtype, offset=len(mapped) - count * dtype.itemsize)


class Part:
    """Some documents of a store as one stream of tokens: of each shard those from first to last."""

    def __init__(self, store: Documents, first: np.ndarray, last: np.ndarray):
        """first, last: [shards,2] documents and tokens before the part's begin and its end."""
        self.store = store
        self.first, self.begins = first.T  # [shards] document and token
        sums = np.concatenate((np.zeros((1, 2), np.int64), np.cumsum(last - first, axis=0)))
        self.documents, self.offsets = sums.T  # [shards+1] before each shard, in the stream

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
        borders, tokens = (self.store._map(shard, array) for array in ("borders", "tokens"))
        start, stop = (int(x - self.offsets[shard] + self.begins[shard]) for x in (start, stop))
        first = int(np.searchsorted(borders, start, "right")) - 1
        last = int(np.searchsorted(borders, stop, "left"))
        edges = borders[first : last + 1].tolist()
        first += int(self.store.starts[shard])
        ids = tokens[start : stop + 1].astype(np.int64)  # and one more, which may follow
        pieces = []
        for document, (low, high) in enumerate(pairwise(edges), first):
            a, b = max(low, start), min(high, stop)
            last_label = int(ids[b - start]) if b < high else -100
            pieces.append(Piece(ids[a - start : b - start], last_label, document))
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
        ended = np.searchsorted(self.store._map(shard, "borders"), token, "right") - 1
        return int(self.documents[shard] + ended - self.first[shard])

    def _shard_at(self, position: int) -> int:
        return int(np.searchsorted(self.offsets, position, "right")) - 1


# ---------------------------------------------------------------- checks


def read_manifest(folder: Path) -> dict:
    """Checked against the files' sizes. Raises InputError, naming what is wrong."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = sum(shard["tokens"] for shard in manifest["shards"]) == manifest["tokens"]
        expected = {name: facts["size"] for name, facts in files_of(manifest["shards"]).items()}
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
    """Raises InputError unless the ids are those that this tokenizer, template and code make."""
    found = store.manifest
    rendered = RENDERED in found["report"]["changed"]  # else the template has no part in it
    for name in ("tokenizer", "document_end", *(["template"] if rendered else [])):
        if found.get(name) != identity[name]:
            raise InputError(f"{store.folder} was tokenised with another {name} than this run's")
    wanted = {p: n for p, n in identity["versions"].items() if rendered or p != "chats"}
    check_versions(str(store.folder), found.get("versions", {}), wanted)


def verify(folder: Path) -> None:
    """Reads the whole store and compares every file's hash. Raises InputError."""
    files = files_of(read_manifest(folder)["shards"])
    size = sum(facts["size"] for facts in files.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
        for name, facts in files.items():
            if digest(folder / name) != facts["sha256"]:
                raise InputError(
                    f"{folder / name} is not what was written, its hash differs: copy it again or "
                    "tokenise the files again"
                )
            bar.update(facts["size"])
