"""The store of chats and of preference pairs.

A store is a folder: tokens and trained flags one after another, the segments' borders, and for
each example where it came from. It is written once, by one process, under a key of everything that
its content depends on; a second launch finds it and starts at once.
"""

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nanomed.config import InputError
from nanomed.records import Chat, PreferencePair, read_chats, read_pairs
from nanomed.store.cache import cached, digest, group_key, hash_of_first, progress
from nanomed.store.tally import Facts, Tally, report_of
from nanomed.store.versions import versions
from nanomed.text.segment import Segment
from nanomed.text.template import Encoded, Encoder


class Store:
    """Examples in memory-mapped files. store[i] is the example's segments."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
        self.tokens = np.memmap(folder / "tokens.u32", np.uint32, "r")
        self.trained = np.memmap(folder / "trained.u8", np.bool_, "r")
        self.borders = np.load(folder / "borders.npy", mmap_mode="r")  # [segments+1]
        self.source = np.load(folder / "source.npy", mmap_mode="r")  # [n,2] file, record
        self.keys = np.load(folder / "keys.npy", mmap_mode="r")  # [n] uint64, see group_key
        # [n] what each example adds to its step's divisor: a chat its labels, a pair 1
        self.divisors = np.load(folder / "divisors.npy", mmap_mode="r")
        self.kinds = np.load(folder / "kinds.npy", mmap_mode="r")  # [n], of meta["kinds"]
        self.per_example = self.meta["segments_per_example"]
        self.lengths = np.diff(self.borders[:: self.per_example])  # [n] tokens

    def __len__(self) -> int:
        return len(self.keys)

    def lengths_of(self, examples: np.ndarray) -> np.ndarray:
        return self.lengths[examples]

    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        return self.divisors[examples]

    def __getitem__(self, i: int) -> list[Segment]:
        segments = range(i * self.per_example, (i + 1) * self.per_example)
        spans = [slice(self.borders[s], self.borders[s + 1]) for s in segments]
        return [Segment(self.tokens[s].astype(np.int64), self.trained[s]) for s in spans]

    def where(self, i: int) -> tuple[str, int]:
        """The file, and the record's number in it, that example i was read from."""
        file, record = self.source[i]
        return self.meta["files"][file], int(record)


class Writer:
    """Appends examples to a store under construction; memory does not grow with the tokens."""

    def __init__(self, folder: Path, files: list[str], segments_per_example: int = 1):
        self.folder = folder
        self.meta = {"files": files, "segments_per_example": segments_per_example}
        self.tokens = open(folder / "tokens.u32", "wb")
        self.trained = open(folder / "trained.u8", "wb")
        self.borders, self.source = array("q", [0]), array("q")
        self.keys, self.divisors, self.kinds = array("Q"), array("q"), array("q")
        self.hash = hashlib.sha256()  # of the content: what a resumed run must find again
        self.names: dict[str, int] = {}

    def add(
        self, segments: list[Encoded], divisor: int, file: int, record: int, group: str, kind: str
    ) -> None:
        for ids, trained in segments:
            content = [array("I", ids).tobytes(), bytes(trained)]
            self.tokens.write(content[0])
            self.trained.write(content[1])
            self.hash.update(b"%d " % len(ids) + b"".join(content))
            self.borders.append(self.borders[-1] + len(ids))
        self.source.extend((file, record))
        self.keys.append(group_key(group))
        self.divisors.append(divisor)
        self.kinds.append(self.names.setdefault(kind, len(self.names)))

    def close(self, report: dict) -> None:
        self.tokens.close()
        self.trained.close()
        np.save(self.folder / "borders.npy", np.array(self.borders, np.int64))
        np.save(self.folder / "source.npy", np.array(self.source, np.int64).reshape(-1, 2))
        np.save(self.folder / "keys.npy", np.array(self.keys, np.uint64))
        np.save(self.folder / "divisors.npy", np.array(self.divisors, np.int64))
        np.save(self.folder / "kinds.npy", np.array(self.kinds, np.int64))
        self.meta |= {"tokens": self.borders[-1], "kinds": list(self.names), "report": report}
        self.meta["sha256"] = self.hash.hexdigest()
        content = json.dumps(self.meta, ensure_ascii=False, indent=2)
        (self.folder / "meta.json").write_text(content, "utf-8")


def chats(
    files: list[str], encoder: Encoder, seq_len: int, allow_drop: float, fields: Sequence[str] = ()
) -> Store:
    """The store of the chats in `files`, tokenised now or found in the cache; `fields` are those
    of --fields.

    Raises InputError for a file that cannot be read, and if more than the share `allow_drop` of
    the chats could not be kept."""
    return _open("chats", files, encoder, seq_len, allow_drop, fields)


def pairs(
    files: list[str], encoder: Encoder, seq_len: int, allow_drop: float, fields: Sequence[str] = ()
) -> Store:
    """The same of preference pairs: two segments each, the chosen answer first."""
    return _open("pairs", files, encoder, seq_len, allow_drop, fields)


def _open(
    kind: str,
    files: list[str],
    encoder: Encoder,
    seq_len: int,
    allow_drop: float,
    fields: Sequence[str],
) -> Store:
    encoded = partial(_encoded, kind, fields, encoder, seq_len)

    def write(folder: Path) -> None:
        writer = Writer(folder, files, segments_per_example=2 if kind == "pairs" else 1)
        writer.meta["fields"] = list(fields)
        report = _write(writer, files, encoded, encoder)
        _check_drops(report, seq_len, allow_drop=1.0)  # an empty store is of no use to anybody
        writer.close(report)

    parts = [
        kind,
        *map(digest, files),
        json.dumps([files, list(fields)]),
        encoder.tokenizer.fingerprint(),
        encoder.template.to_json(),
        str(seq_len),
        json.dumps(versions(encoder, kind)),
        *(hash_of_first((e.group, segments) for _, e, segments, *_ in encoded(p)) for p in files),
    ]
    store = Store(cached(kind, parts, write))
    if len(store.tokens) != store.meta["tokens"] or len(store.trained) != store.meta["tokens"]:
        raise InputError(f"{store.folder} is damaged; delete it and start again")
    _check_drops(store.meta["report"], seq_len, allow_drop)
    return store


def _encoded(
    kind: str, fields: Sequence[str], encoder: Encoder, seq_len: int, path: str
) -> Iterator[tuple[int, Chat, list[Encoded], int, int]]:
    """(record number, example, its segments, turns cut, bytes read so far) of each example of a
    file; one that is dropped or too long has no segment."""
    read = read_pairs if kind == "pairs" else read_chats
    for record, example, n_bytes in read(path, fields):
        if example.dropped:
            segments, cut = [], 0
        elif kind == "pairs":
            segments, cut = encoder.pair(example, seq_len)
        else:
            ids, trained, cut = encoder.chat(example, seq_len)
            segments = [(ids, trained)] if ids else []
        yield record, example, segments, cut, n_bytes


def _write(writer: Writer, files: list[str], encoded: Callable, encoder: Encoder) -> dict:
    """All examples of the files. Returns the report."""
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)  # (file, source)
    with progress(files) as bar:
        for number, path in enumerate(files):
            before = 0
            for record, example, segments, cut, n_bytes in encoded(path):
                # A segment's first token has no predecessor, so it is never a label.
                n_trained = sum(sum(trained[1:]) for _, trained in segments)
                if segments:
                    divisor = 1 if isinstance(example, PreferencePair) else n_trained
                    label = getattr(example, "kind", "") or example.source
                    writer.add(segments, divisor, number, record, example.group, label)
                n_tokens = sum(len(ids) for ids, _ in segments)
                facts = Facts.of(example, encoder)
                tallies[path, example.source].count(facts, n_tokens, n_trained, cut)
                bar.update(n_bytes - before)
                before = n_bytes
    return report_of(files, tallies)


def _check_drops(report: dict, seq_len: int, allow_drop: float) -> None:
    total, dropped = report["examples"], sum(report["dropped"].values())
    if dropped > allow_drop * total or dropped == total:
        causes = ", ".join(f"{n} {cause}" for cause, n in report["dropped"].items())
        raise InputError(
            f"{dropped} of {total} examples in {', '.join(report['files'])} cannot be kept "
            f"({causes}); raise --seq_len (now {seq_len}), mend the data, or allow it with "
            "--allow_drop"
        )
