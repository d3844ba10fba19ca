"""The store of chats and of preference pairs.

A store is a folder: tokens and trained flags one after another, the segments' borders, and for
each example where it came from. It is written once, by one process, under a key of everything that
its content depends on; a second launch finds it and starts at once.
"""

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanomed.config import InputError
from nanomed.records import Chat, read_chats, read_pairs
from nanomed.store.cache import cached, digest, group_key, hash_of_first, progress
from nanomed.store.tally import Facts, Tally, among, report_of
from nanomed.store.versions import versions
from nanomed.text.segment import Segment
from nanomed.text.template import Encoded, Encoder


class Store:
    """Examples in memory-mapped files. store[i] is the example's segments. Raises InputError for
    one that is cut off."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self._open()
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise InputError(f"{folder} is damaged ({error}); delete it and start again") from None

    def _open(self) -> None:
        folder = self.folder
        self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
        for name, n_bytes in (("tokens.u32", 4), ("trained.u8", 1)):
            if (folder / name).stat().st_size != n_bytes * self.meta["tokens"]:
                raise ValueError(f"{name} is not as long as it was")
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


def chats(
    files: list[str], encoder: Encoder, seq_len: int, allow_drop: float, fields: Sequence[str] = ()
) -> Store:
    """The store of the chats in `files`, tokenised now or found in the cache; `fields` are those
    of --fields.

    Raises InputError for a file that cannot be read, and if more than the share `allow_drop` of
    the chats could not be kept."""
    return _Reading("chats", files, encoder, seq_len, fields).store(allow_drop)


def pairs(
    files: list[str], encoder: Encoder, seq_len: int, allow_drop: float, fields: Sequence[str] = ()
) -> Store:
    """The same of preference pairs: two segments each, the chosen answer first."""
    return _Reading("pairs", files, encoder, seq_len, fields).store(allow_drop)


@dataclass
class _Reading:
    """All that a store's content depends on."""

    kind: str
    files: list[str]
    encoder: Encoder
    seq_len: int
    fields: Sequence[str]

    def store(self, allow_drop: float) -> Store:
        found = Store(cached(self.kind, self.key(), self.write))
        self.check_drops(found.meta["report"], allow_drop)
        return found

    def key(self) -> list[str]:
        return [
            self.kind,
            *map(digest, self.files),
            json.dumps([self.files, list(self.fields)]),
            self.encoder.tokenizer.fingerprint(),
            self.encoder.template.to_json(),
            str(self.seq_len),
            json.dumps(versions(self.encoder, self.kind)),
            *(hash_of_first((e.group, s) for _, e, s, *_ in self.read(p)) for p in self.files),
        ]

    def read(self, path: str) -> Iterator[tuple[int, Chat, list[Encoded], int, int]]:
        """(record number, example, its segments, turns cut, bytes read so far) of each example of a
        file; one that is dropped or too long has no segment."""
        reader = read_pairs if self.kind == "pairs" else read_chats
        for record, example, n_bytes in reader(path, self.fields):
            if example.dropped:
                segments, cut = [], 0
            elif self.kind == "pairs":
                segments, cut = self.encoder.pair(example, self.seq_len)
            else:
                ids, trained, cut = self.encoder.chat(example, self.seq_len)
                segments = [(ids, trained)] if ids else []
            yield record, example, segments, cut, n_bytes

    def write(self, folder: Path) -> None:
        """The whole store; memory does not grow with its tokens."""
        borders, kinds = array("q", [0]), {}
        rows = array("Q")  # of each example: file, record, key, divisor, kind
        content = hashlib.sha256()  # what a resumed run must find again
        tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)  # (file, source)
        sources: dict[str, set[str]] = defaultdict(set)  # of each file those told apart
        with (
            progress(self.files) as reached,
            open(folder / "tokens.u32", "wb") as tokens,
            open(folder / "trained.u8", "wb") as trained,
        ):
            for file, path in enumerate(self.files):
                for record, example, segments, cut, n_bytes in self.read(path):
                    before = borders[-1]
                    for ids, flags in segments:
                        written = array("I", ids).tobytes(), bytes(flags)
                        tokens.write(written[0])
                        trained.write(written[1])
                        content.update(b"%d " % len(ids) + b"".join(written))
                        borders.append(borders[-1] + len(ids))
                    # A segment's first token has no predecessor, so it is never a label.
                    n_labels = sum(sum(flags[1:]) for _, flags in segments)
                    if segments:
                        divisor = 1 if self.kind == "pairs" else n_labels
                        named = getattr(example, "kind", "") or example.source
                        kind = kinds.setdefault(among(kinds, named), len(kinds))
                        rows.extend((file, record, group_key(example.group), divisor, kind))
                    facts = Facts.of(example, self.encoder)
                    source = among(sources[path], example.source)
                    sources[path].add(source)
                    tally = tallies[path, source]
                    tally.count(facts, borders[-1] - before, n_labels, cut)
                    reached(file, n_bytes)
        report = report_of(self.files, tallies)
        self.check_drops(report, allow_drop=1.0)  # an empty store is of no use to anybody
        table = np.array(rows).reshape(-1, 5)
        np.save(folder / "borders.npy", np.array(borders))
        np.save(folder / "source.npy", table[:, :2].astype(np.int64))
        np.save(folder / "keys.npy", table[:, 2])
        np.save(folder / "divisors.npy", table[:, 3].astype(np.int64))
        np.save(folder / "kinds.npy", table[:, 4].astype(np.int64))
        meta = {"files": self.files, "segments_per_example": 2 if self.kind == "pairs" else 1}
        meta |= {"fields": list(self.fields), "tokens": borders[-1], "kinds": list(kinds)}
        meta |= {"report": report, "sha256": content.hexdigest()}
        (folder / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=2), "utf-8")

    def check_drops(self, report: dict, allow_drop: float) -> None:
        total, dropped = report["examples"], sum(report["dropped"].values())
        if dropped > allow_drop * total or dropped == total:
            causes = ", ".join(f"{n} {cause}" for cause, n in report["dropped"].items())
            raise InputError(
                f"{dropped} of {total} examples in {', '.join(report['files'])} cannot be kept "
                f"({causes}); raise --seq_len (now {self.seq_len}), mend the data, or allow it "
                "with --allow_drop"
            )
