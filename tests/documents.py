"""Documents in memory, with the interface of nanomed.store.Documents, and slices of them."""

import itertools
from fractions import Fraction

import numpy as np

from nanomed.batches.slices import Slices, Source
from nanomed.store import Piece


class MemoryPart:
    def __init__(self, documents: list[list[int]]):
        self.documents = documents
        self.n_tokens, self.n_documents = sum(map(len, documents)), len(documents)
        self.flat = [(d, k) for d, ids in enumerate(documents) for k in range(len(ids))]

    def read(self, start: int, stop: int) -> list[Piece]:
        pieces = []
        for d, places in itertools.groupby(self.flat[start:stop], key=lambda place: place[0]):
            places = [k for _, k in places]
            first, last, ids = places[0], places[-1] + 1, self.documents[d]
            last_label = ids[last] if last < len(ids) else -100
            pieces.append(Piece(np.array(ids[first:last]), last_label, d))
        return pieces

    def n_ends(self, start: int, stop: int) -> int:
        return sum(k == len(self.documents[d]) - 1 for d, k in self.flat[start:stop])


class MemoryDocuments:
    def __init__(self, name: str, train: list[list[int]], val: list[list[int]]):
        self.name, self.train, self.val = name, MemoryPart(train), MemoryPart(val)
        self.manifest = {"sha256": str((train, val)), "report": {}}

    def where(self, document: int) -> tuple[str, int]:
        return f"{self.name}.jsonl", document + 1


def slices_of(
    sources: list[list[list[int]]],
    seq_len: int,
    weights: list[Fraction] | None = None,
    val: list[list[list[int]]] | None = None,
    passes: int = 1,
) -> Slices:
    """Of the documents of each source; `val` has each one's held-out documents."""
    found = []
    for s, train in enumerate(sources):
        stored = MemoryDocuments(f"source{s}", train, val[s] if val else [])
        weight = weights and weights[s]
        found.append(Source(stored.name, stored.name, stored, stored.train, stored.val, weight))
    return Slices(found, seq_len, seed=3, passes=passes)


def random_documents(n: int, seed: int, longest: int = 60, vocab_size: int = 97) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(vocab_size, size=k).tolist() for k in rng.integers(1, longest, n)]
