"""Documents in slices: the data set of continued pre-training.

Each source's documents stand one after another and are cut every seq_len tokens. An example is a
slice, its segments are the pieces of documents in it. Two sources, D and F, seq_len 4:

    D, to train on    d d d d | d E d d | d d E         examples 0, 1, 2; the last one is shorter
    F, to train on    f E f f | f f E f | f E           examples 3, 4, 5
    D, held out       d d E                             example 6

A piece is a segment of its own: it sees nothing of its document before the cut. Its last label is
the token after the cut, so every token but each document's first is learned once.
"""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from nanomed import store
from nanomed.batches.loader import Loader, split_remark
from nanomed.batches.mixture import Mixture, check_weights, path_and_weight
from nanomed.config import CPT, InputError
from nanomed.store import Documents, Part
from nanomed.text.segment import Segment
from nanomed.text.template import Encoder


@dataclass(frozen=True)
class Source:
    """One entry of --data or --val_data."""

    name: str
    path: str
    documents: Documents
    train: Part
    val: Part
    weight: Fraction | None = None


def read(c: CPT, encoder: Encoder) -> "Slices":
    """Files are tokenised now or found in the cache; a store is opened. Raises InputError."""
    weighted = [path_and_weight(entry) for entry in c.data]
    check_weights(c.data, [weight for _, weight in weighted])
    entries = [*weighted, *((path, None) for path in c.val_data)]
    sources = []
    for name, (path, weight) in zip(names_of([path for path, _ in entries]), entries, strict=True):
        documents = store.documents([path], encoder, c.fields)
        train, val = documents.split(0.0 if c.val_data else c.val_fraction)
        if len(sources) >= len(c.data):  # held out whole
            train, val = val, train
        elif train.n_tokens == 0:
            raise InputError(
                f"--val_fraction {c.val_fraction} leaves no document of {path} to train on; "
                "give more data, another fraction, or a file of its own with --val_data"
            )
        sources.append(Source(name, path, documents, train, val, weight))
    if c.val_fraction and not any(source.val.n_tokens for source in sources):
        raise InputError(
            f"--val_fraction {c.val_fraction} of {', '.join(c.data)} holds out no document; give "
            "more data, another fraction, or a file of its own with --val_data"
        )
    return Slices(sources, c.seq_len, c.seed, 0 if c.repeat else c.epochs)


def names_of(paths: list[str]) -> list[str]:
    """Short names for metrics: the file's without its endings, or the whole path where two files
    would share one. Raises InputError for a path that is given twice."""
    given = [*map(Path, paths)]  # store/ is store
    if twice := [path for i, path in enumerate(given) if path in given[:i]]:
        raise InputError(f"--data and --val_data: {twice[0]} is given twice; --epochs repeats data")
    short = [Path(path).name.split(".")[0] for path in paths]
    unique = [name and short.count(name) == 1 for name in short]
    whole = [path.strip("/").replace("/", "-") for path in paths]
    return [s if one else w for s, one, w in zip(short, unique, whole, strict=True)]


class Slices:
    """Slice i of all sources' slices: first those to train on, source after source, then those
    held out. Nothing in memory grows with their number. `passes` is how often a mixture may go
    through a source; 0: as often as it takes."""

    def __init__(self, sources: list[Source], seq_len: int, seed: int = 0, passes: int = 1):
        self.sources, self.seq_len = sources, seq_len
        self.names = [source.name for source in sources]
        # Spans: [2 x sources] each source's stream to train on, then each one's held-out stream.
        self.streams = [source.train for source in sources] + [source.val for source in sources]
        self.n_tokens = np.array([part.n_tokens for part in self.streams])
        counts = (-(-self.n_tokens // seq_len)).tolist()
        self.first = np.array([0, *accumulate(counts)])  # [spans+1] the number of its first slice
        self.source = np.array([*range(len(sources))] * 2)  # [spans]
        n_train = int(self.first[len(sources)])
        self.train, self.val = range(n_train), range(n_train, len(self))
        self.mixture = None
        if weighted := [source for source in sources if source.weight]:
            n, weights = len(weighted), [source.weight for source in weighted]
            self.mixture = Mixture(self.names[:n], counts[:n], weights, seed, passes)
        hashes = [source.documents.manifest["sha256"] for source in sources]
        self.meta = {"sha256": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()}

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, i: int) -> list[Segment]:
        pieces = self._pieces(i)
        return [Segment(p.ids, np.ones(len(p.ids), bool), p.last_label) for p in pieces]

    def lengths_of(self, examples: np.ndarray) -> np.ndarray:
        span, start = self._place(examples)
        return np.minimum(self.seq_len, self.n_tokens[span] - start)

    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        """Labels: all tokens but the documents' last ones."""
        span, start = self._place(examples)
        stop = start + self.lengths_of(examples)
        places = zip(span.tolist(), start.tolist(), stop.tolist(), strict=True)
        ends = [self.streams[k].n_ends(*tokens) for k, *tokens in places]
        return stop - start - np.array(ends, np.int64)

    def source_of(self, examples: np.ndarray) -> np.ndarray:
        """The index of each one's source."""
        return self.source[self._place(examples)[0]]

    def documents_in(self, i: int) -> list[tuple[str, int]]:
        """The file, and the record's number in it, of each document that has a piece in slice i."""
        documents = self.sources[int(self.source_of(np.array([i]))[0])].documents
        return [documents.where(piece.document) for piece in self._pieces(i)]

    def _pieces(self, i: int) -> list[store.Piece]:
        (span,), (start,) = self._place(np.array([i]))
        part = self.streams[span]
        return part.read(int(start), min(int(start) + self.seq_len, part.n_tokens))

    def _place(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each one's span, and its first token in that stream."""
        span = np.searchsorted(self.first, examples, "right") - 1
        return span, (examples - self.first[span]) * self.seq_len


def report(loader: Loader) -> dict:
    """What data_report.json says: each source, and how many times the run sees its slices."""
    data: Slices = loader.data
    n_slices = np.diff(data.first).reshape(2, -1).tolist()
    total = sum(source.weight or 0 for source in data.sources)
    sources = zip(data.sources, seen(loader), *n_slices, strict=True)
    return {
        "seq_len": data.seq_len,
        "sha256": data.meta["sha256"],
        "sources": {
            source.name: {
                "path": source.path,
                "weight": float(source.weight / total) if source.weight else None,
                "seen": times,
                "train": _counts(source.train, n_train),
                "held_out": _counts(source.val, n_val),
                "read": source.documents.manifest["report"],
            }
            for source, times, n_train, n_val in sources
        },
    }


def split_remarks(data: Slices, fraction: float) -> list[str]:
    """Of each source, the warning of split_remark() if there is one."""
    return [
        line
        for s in data.sources
        for line in split_remark(f"documents of {s.name}", s.documents, s.val.n_documents, fraction)
    ]


def _counts(part: Part, n_slices: int) -> dict[str, int]:
    return {"documents": part.n_documents, "tokens": part.n_tokens, "slices": n_slices}


def seen(loader: Loader) -> list[float]:
    """How many times the whole run sees each source's slices to train on."""
    data: Slices = loader.data
    n_slices = np.diff(data.first)[: len(data.sources)].tolist()
    if loader.mixture:
        counts = loader.mixture.counts(loader.n_steps * loader.batch_size)
        counts += [0] * (len(n_slices) - len(counts))  # of --val_data
        return [count / max(1, n) for count, n in zip(counts, n_slices, strict=True)]
    epochs, steps = divmod(loader.n_steps, loader.steps_per_epoch)
    passes = epochs + min(1.0, steps * loader.batch_size / len(loader.train))
    return [passes if n else 0.0 for n in n_slices]
