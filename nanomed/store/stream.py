"""A store of documents: its files, and streams of its tokens that are never in memory.

    shard-00000.tokens.u32     the documents' ids, one after another, uint32 little-endian
    shard-00000.borders.npy    [n+1] int64: document d is tokens borders[d] to borders[d+1]
    shard-00000.keys.npy       [n] uint64, rising: which side of a split a document stands on
    shard-00000.source.npy     [n,2] int64: the file's number and the record's in it
    shard-00000.json           counts and hashes, and where in the files the next shard begins
    manifest.json              all of that together; a folder with one is a finished store

A shard's JSON comes after its arrays and the manifest comes last, each by a rename: what has its
JSON is whole. Nothing in them depends on the time, the machine or the number of processes.

Within a shard documents stand in the order of their split keys, so what any fraction holds out is
each shard's beginning:

    shard 0   | held out |  to train on            |
    shard 1   | held out   |  to train on        |         (the border: a binary search per shard)

A Part is one side of it, shard after shard, as one stream of tokens.
"""

import json
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanomed.config import InputError
from nanomed.store.cache import digest, limit_of
from nanomed.store.tokenising import RENDERED
from nanomed.store.versions import check_versions

DTYPES = {"tokens": "<u4", "borders": "<i8", "keys": "<u8", "source": "<i8"}


def file_of(shard: int, name: str) -> str:
    return f"shard-{shard:05d}.{name}.{'u32' if name == 'tokens' else 'npy'}"


def files_of(shards: list[dict]) -> dict[str, dict]:
    """Size and hash of each of their files, by name."""
    return {name: facts for shard in shards for name, facts in shard["files"].items()}


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

    def made_by(self, plan: dict) -> "Documents":
        """Itself. Raises InputError unless its ids are those that the plan's tokenizer, template
        and code make."""
        rendered = RENDERED in self.manifest["report"]["changed"]  # else the template has no part
        for name in ("tokenizer", "document_end", *["template"] * rendered):
            if self.manifest.get(name) != plan[name]:
                raise InputError(f"{self.folder} was tokenised with another {name} than this run's")
        wanted = {part: n for part, n in plan["versions"].items() if rendered or part != "chats"}
        check_versions(str(self.folder), self.manifest.get("versions", {}), wanted)
        return self

    def split(self, fraction: float) -> tuple["Part", "Part"]:
        """(to train on, held out): a document is held out if its key is below the fraction's share
        of all keys. Either part may be empty."""
        limit, shards = limit_of(fraction), self.manifest["shards"]
        borders = [int(np.searchsorted(self._map(s, "keys"), limit)) for s in range(len(shards))]
        # [shards,2] documents and tokens before each shard's border, and before its end
        cuts = np.array([(n, self._map(s, "borders")[n]) for s, n in enumerate(borders)], np.int64)
        ends = np.array([(shard["documents"], shard["tokens"]) for shard in shards], np.int64)
        return Part(self, cuts, ends), Part(self, np.zeros_like(cuts), cuts)

    def where(self, document: int) -> tuple[str, int]:
        """The file, and the record's number in it, that a document was read from."""
        shard = int(np.searchsorted(self.starts, document, "right")) - 1
        place = document - int(self.starts[shard])
        file, record = self._map(shard, "source").reshape(-1, 2)[place]
        return self.manifest["sources"][file]["path"], int(record)

    def pieces(self, shard: int, start: int, stop: int) -> Iterator[Piece]:
        """Those of a shard's documents in its tokens [start, stop)."""
        borders, tokens = (self._map(shard, array) for array in ("borders", "tokens"))
        first = int(np.searchsorted(borders, start, "right")) - 1
        last = int(np.searchsorted(borders, stop, "left"))
        ids = tokens[start : stop + 1].astype(np.int64)  # and one more, which may follow
        edges = pairwise(borders[first : last + 1].tolist())
        for document, (low, high) in enumerate(edges, first + int(self.starts[shard])):
            a, b = max(low, start), min(high, stop)
            last_label = int(ids[b - start]) if b < high else -100
            yield Piece(ids[a - start : b - start], last_label, document)

    @property
    def keys(self) -> np.ndarray:
        """[documents] uint64, which decide what a split holds out; 8 bytes of memory for each."""
        return np.concatenate([self._map(s, "keys") for s in range(len(self.manifest["shards"]))])

    def _map(self, shard: int, array: str) -> np.ndarray:
        """Mapped anew each time, so that what a process has read does not stay in its memory."""
        with open(self.folder / file_of(shard, array), "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # In an .npy file bytes 8 and 9 say how long the header is that begins behind them.
        header = 0 if array == "tokens" else 10 + int.from_bytes(mapped[8:10], "little")
        return np.frombuffer(mapped, DTYPES[array], offset=header)


class Part:
    """Some documents of a store as one stream of tokens: of each shard those from first to last."""

    def __init__(self, store: Documents, first: np.ndarray, last: np.ndarray):
        """first, last: [shards,2] documents and tokens before the part's begin and its end."""
        self.store = store
        self.begins = first[:, 1]  # [shards] the first token in each
        self.n_documents, self.n_tokens = (last - first).sum(0).tolist()
        self.offsets = np.cumsum([0, *(last - first)[:, 1]])  # [shards+1] tokens before each shard

    def read(self, start: int, stop: int) -> list[Piece]:
        """The pieces of documents in tokens [start, stop) of the stream, in its order. Raises
        IndexError beyond the stream's ends."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.n_tokens}")
        return [piece for span in self._spans(start, stop) for piece in self.store.pieces(*span)]

    def n_ends(self, start: int, stop: int) -> int:
        """How many documents have their last token in [start, stop) of the stream: so many of its
        tokens have no successor to learn."""
        n = 0
        for shard, *span in self._spans(start, stop):
            before, after = np.searchsorted(self.store._map(shard, "borders"), span, "right")
            n += int(after - before)
        return n

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, from which of its tokens, to which) of tokens [start, stop) of the stream."""
        shard = int(np.searchsorted(self.offsets, start, "right")) - 1
        while start < stop:
            shift = int(self.begins[shard] - self.offsets[shard])
            end = min(stop, int(self.offsets[shard + 1]))
            if start < end:  # else none of this shard's documents is in the part
                yield shard, start + shift, end + shift
            start, shard = end, shard + 1


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


def verify(folder: Path) -> Documents:
    """Reads the whole store and compares every file's hash. Raises InputError."""
    store = Documents(folder)
    files = files_of(store.manifest["shards"])
    size = sum(facts["size"] for facts in files.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
        for name, facts in files.items():
            if digest(folder / name) != facts["sha256"]:
                raise InputError(
                    f"{folder / name} is not what was written, its hash differs: copy it again or "
                    "tokenise the files again"
                )
            bar.update(facts["size"])
    return store
