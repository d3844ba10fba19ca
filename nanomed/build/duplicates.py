"""Exact and near duplicates, in any number of shards, without any document in memory for long.

    keys       of each shard's documents                   keys(shard)
    pairs      of documents that have a key in common      pairs(part of all shards' keys)
    n-grams    of the documents that are in a pair         grams(shard)
    edges      pairs, and how alike they are, exactly      edges(shard)
    gone       which document goes, and for which one      gone()

Exact duplicates have one key, the hash of the text, and need only keys, pairs and gone. Near
duplicates have 14, from MinHash, and are compared n-gram by n-gram before one of them goes.

MinHash: of each of 8 rows, a hash function of its own sends every n-gram of a document into one of
14 bands and keeps each band's smallest value. The 8 values of a band are hashed into its key. Two
documents of which a share s of the n-grams is common (Jaccard) agree in a value with probability s,
in a key with s^8, and in at least one of 14 keys with 1-(1-s^8)^14: .21 at .6, .56 at .7, .92 at
.8, 1.00 at .9. A row costs one hash for each n-gram, not one for each band (Dahlgaard, Knudsen and
Thorup, Fast similarity sketching, FOCS 2017; here once for each row, so that rows are independent).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from nanomed.build.files import whole
from nanomed.build.pipeline import Build
from nanomed.build.shards import Doc, Finding, Judge, Tally, batched, read_shard
from nanomed.build.text import U64, Ragged, constants, mix, ngrams, tokens

BANDS, ROWS, N = 14, 8, 5  # N tokens in an n-gram
ROUNDS = 12 + BANDS  # of sending n-grams into bands; most texts have filled all after one or two
EMPTY = 2**32 - 1
PART = 1 << 22  # keys of a band that one task sorts: 64 MB


# ---------------------------------------------------------------- keys of texts


def exact_keys(texts: Sequence[str]) -> np.ndarray:
    """[texts,1,2] uint64: a hash of 128 bits of each text without the spaces around it."""
    digests = [hashlib.blake2b(t.strip().encode(), digest_size=16).digest() for t in texts]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 1, 2)


def near_keys(texts: Sequence[str]) -> np.ndarray:
    """[texts,BANDS,1] uint64. A text without any token has 0 everywhere."""
    grams = ngrams(tokens(texts), N)
    rows = signatures(grams).astype(U64) * constants(ROWS, 4)[:, None]
    keys = mix(rows.sum(0)).reshape(-1, BANDS, 1)
    keys[grams.lengths == 0] = 0
    return keys


def signatures(grams: Ragged) -> np.ndarray:
    """[ROWS, texts*BANDS] uint32: the smallest value of each row in each band of each text."""
    values, base = grams.values, np.repeat(np.arange(len(grams)) * BANDS, grams.lengths)
    least = np.full((ROWS, len(grams) * BANDS), EMPTY, np.uint32)
    for round, factors in enumerate(constants(ROUNDS * ROWS // 2, 3).reshape(ROUNDS, -1)):
        found = np.full_like(least, EMPTY) if round else least
        for k, factor in enumerate(factors):  # a hash of 64 bits serves two rows
            hashed = mix(values * factor)
            for row, half in ((2 * k, hashed >> U64(32)), (2 * k + 1, hashed & U64(EMPTY))):
                band = half * U64(BANDS) >> U64(32)
                if round >= ROUNDS - BANDS:  # at the end every band gets its turn
                    band[:] = round - ROUNDS + BANDS
                np.minimum.at(found[row], base + band.astype(np.int64), half.astype(np.uint32))
        if round:  # counts only where nothing was before
            np.copyto(least, found, where=least == EMPTY)
        unfilled = (least == EMPTY).any(0).reshape(-1, BANDS).any(1)
        goes_on = unfilled[base // BANDS]
        values, base = values[goes_on], base[goes_on]
        if not len(values):
            break
    return least


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted sets of n-grams."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def survivors(edges: np.ndarray) -> np.ndarray:
    """edges (EDGE): pairs of documents that are alike. The numbers of those by which a document
    goes: the first of its pairs whose earlier document stays. So it goes only for one that it is
    like itself, never for a neighbour's neighbour."""
    order = np.lexsort((edges["earlier"], edges["later"]))
    gone: set[int] = set()
    found = []
    columns = (edges[name][order].tolist() for name in ("earlier", "later"))
    for k, earlier, later in zip(order, *columns, strict=True):
        if later not in gone and earlier not in gone:
            gone.add(later)
            found.append(k)
    return np.array(found, np.int64)


# ---------------------------------------------------------------- tasks

EDGE = np.dtype([("earlier", "<i8"), ("later", "<i8"), ("jaccard", "<f8")])


def find(build: Build, folder: Path, shards: list[Path], tally: Tally, least: float = 0.0) -> Judge:
    """A stage: runs the tasks of a search among the documents that the tally counts; the judge that
    drops what it finds. `least`: the smallest Jaccard of near duplicates; 0: exact ones."""
    bits = max(0, (tally.kept // PART).bit_length())
    search = Search(folder, shards, build.files, least, bits)
    run, n, starts = build.runner.run, len(shards), [2**63 - 1]
    for said in reversed(run(folder / "keys", search.keys, n)):
        starts.insert(0, starts[0] if said["first"] is None else said["first"])
    search = replace(search, starts=starts)
    run(folder / "pairs", search.pairs, (BANDS if least else 1) << bits)
    if least:
        run(folder / "grams", search.grams, n)
    run(folder / "edges", search.edges, n)
    run(folder / "gone", search.gone, 1)
    return search.drop


@dataclass(frozen=True)
class Search:
    """The tasks of one search, and where their files are."""

    folder: Path
    shards: list[Path]
    files: list[str]
    least: float
    part_bits: int  # a task sorts the keys whose first bits are the same
    starts: list[int] = field(default_factory=list)  # each shard's smallest id, and the end

    def path(self, kind: str, i: int) -> Path:
        return self.folder / kind.split(".")[0] / f"{i:05d}.{kind}.npy"

    def keys(self, i: int) -> dict[str, int]:
        """Of a shard [bands, documents, columns]: a key's columns and the id, sorted per band."""
        keys_of, rows, first = near_keys if self.least else exact_keys, [], None
        for docs in batched(read_shard(self.shards[i])):
            first = docs[0].id if first is None else first
            keys = keys_of([doc.text for doc in docs])  # [documents, bands, columns]
            ids = np.array([doc.id for doc in docs], U64)[:, None, None]
            rows.append(np.concatenate((keys, np.broadcast_to(ids, (*keys.shape[:2], 1))), 2))
        found = np.concatenate(rows or [np.zeros((0, BANDS, 3), U64)]).swapaxes(0, 1)
        _save(self.path("keys", i), np.stack([_sorted(band) for band in found]))
        return {"first": first}

    def pairs(self, j: int) -> dict[str, int]:
        """In one band, in one part of the keys: each document with the first that has its key, and
        with the one before it. So a key that n documents share gives 2n pairs, not n * n."""
        band, part = j >> self.part_bits, j & ((1 << self.part_bits) - 1)
        low, high = (U64(((part + k) << (64 - self.part_bits)) - k) for k in (0, 1))
        found = []
        for i in range(len(self.shards)):
            keys = np.load(self.path("keys", i), mmap_mode="r")[band]
            start, stop = (np.searchsorted(keys[:, 0], *at) for at in ((low,), (high, "right")))
            found.append(keys[start:stop])
        rows = _sorted(np.concatenate([part for part in found if len(part)] or [found[0]]))
        rows = rows[rows[:, :-1].any(1)]  # a text without tokens has no key
        ids = rows[:, -1].astype(np.int64)
        same = np.zeros(len(rows), bool)
        same[1:] = (rows[1:, :-1] == rows[:-1, :-1]).all(1)
        begin = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
        later = np.flatnonzero(same)
        both = np.concatenate(
            [np.stack((ids[later], ids[at]), 1) for at in (begin[later], later - 1)]
        )
        both = np.unique(both, axis=0)  # sorted by the later one
        _save(self.path("pairs", j), both)
        _save(self.path("pairs.members", j), np.unique(both))
        return {"pairs": len(both)}

    def grams(self, i: int) -> dict[str, int]:
        """The sets of n-grams of a shard's documents that are in any pair."""
        wanted = set(self._of_shard(i, "pairs.members").tolist())
        ids, sets = [], [np.zeros(0, U64)]
        for docs in batched(read_shard(self.shards[i])) if wanted else ():
            docs = [doc for doc in docs if doc.id in wanted]
            found = ngrams(tokens([doc.text for doc in docs]), N)
            ids += [doc.id for doc in docs]
            sets += [np.unique(found[k]) for k in range(len(docs))]
        _save(self.path("grams", i), np.concatenate(sets))
        _save(self.path("grams.ids", i), np.array(ids, np.int64))
        _save(self.path("grams.borders", i), np.cumsum([len(values) for values in sets]))
        return {"documents": len(ids)}

    def edges(self, i: int) -> dict[str, int]:
        """The pairs whose later document is in a shard, and how alike they are."""
        pairs = np.unique(self._of_shard(i, "pairs"), axis=0)
        edges = np.ones(len(pairs), EDGE)
        edges["later"], edges["earlier"] = pairs.T
        if self.least:
            shard = np.searchsorted(self.starts, edges["earlier"], "right") - 1
            mine = self._sets(i, edges["later"])
            for s in np.unique(shard):
                at = np.flatnonzero(shard == s)
                theirs = self._sets(s, edges["earlier"][at])
                edges["jaccard"][at] = [jaccard(mine(k), theirs(n)) for n, k in enumerate(at)]
        _save(self.path("edges", i), edges)
        return {"alike": int((edges["jaccard"] >= self.least).sum())}

    def gone(self, _: int) -> dict[str, int]:
        """Who goes, and for whom; of a document that stays, the one that it is most like."""
        edges = np.concatenate([np.load(self.path("edges", i)) for i in range(len(self.shards))])
        alike = edges[edges["jaccard"] >= self.least]
        goes = alike[survivors(alike)]
        stays = edges[~np.isin(edges["later"], goes["later"])]
        stays = stays[np.lexsort((stays["jaccard"], stays["later"]))]
        stays = stays[
            np.append(np.diff(stays["later"]) > 0, [True] * (len(stays) > 0)).astype(bool)
        ]
        table = np.concatenate((goes, stays))
        order = np.argsort(table["later"])
        _save(self.path("gone", 0), table[order])
        _save(self.path("gone.goes", 0), (np.arange(len(table)) < len(goes))[order])
        kept, times = np.unique(goes["earlier"], return_counts=True)
        largest = np.argsort(-times, kind="stable")[:10]
        groups = [[*self._place(int(kept[k])), int(times[k])] for k in largest]
        return {"goes": len(goes), "largest": groups}

    def drop(self, docs: list[Doc]) -> None:
        """The judge."""
        table, goes = _table(self.path("gone", 0)), _table(self.path("gone.goes", 0))
        name = "near_duplicate" if self.least else "exact_duplicate"
        at = np.searchsorted(table["later"], [doc.id for doc in docs])
        for doc, k in zip(docs, at.tolist(), strict=True):
            if k < len(table) and table["later"][k] == doc.id:
                other, alike = int(table["earlier"][k]), float(table["jaccard"][k])
                kept = dict(zip(("file", "record"), self._place(other), strict=True))
                limit = self.least or 1.0
                doc.findings.append(Finding(name, alike, limit, not goes[k], {"survivor": kept}))

    def _place(self, id: int) -> tuple[str, int]:
        return self.files[id >> 32], id & 0xFFFFFFFF

    def _of_shard(self, i: int, kind: str) -> np.ndarray:
        """Rows of all parts' files whose first column is an id in a shard."""
        found = []
        for j in range((BANDS if self.least else 1) << self.part_bits):
            rows = np.load(self.path(kind, j), mmap_mode="r")
            ids = rows[:, 0] if rows.ndim == 2 else rows
            first, last = np.searchsorted(ids, self.starts[i : i + 2])
            found.append(rows[first:last])
        return np.concatenate(found)

    def _sets(self, i: int, ids: np.ndarray) -> Callable[[int], np.ndarray]:
        """k -> the set of the document ids[k] of a shard."""
        values, known, borders = (
            np.load(self.path(kind, i), mmap_mode="r")
            for kind in ("grams", "grams.ids", "grams.borders")
        )
        at = np.searchsorted(known, ids)
        return lambda k: values[borders[at[k]] : borders[at[k] + 1]]


def _sorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[::-1])]


def _save(path: Path, values: np.ndarray) -> None:
    with whole(path) as file:
        np.save(file, values)


@cache
def _table(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")
