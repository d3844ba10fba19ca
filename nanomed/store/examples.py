"""The store of chats and of preference pairs.

A store is a folder: tokens and trained flags one after another, the segments' borders, and for
each example where it came from. It is written once, by one process, under a key of everything that
its content depends on; a second launch finds it and starts at once.
"""

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from nanomed.config import InputError
from nanomed.records import Chat, PreferencePair, read_chats, read_pairs
from nanomed.store.cache import PROBED, cached, digest, group_key, progress
from nanomed.store.tally import Tally, report_of
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

    def encode(chat: Chat) -> tuple[list[Encoded], int]:
        chat.notes += encoder.notes((text for _, text in chat.turns), chat.system)
        ids, trained, cut = encoder.chat(chat, seq_len)
        return ([(ids, trained)] if ids else []), cut

    return _open("chats", files, read_chats, encode, encoder, seq_len, allow_drop, fields)


def pairs(
    files: list[str], encoder: Encoder, seq_len: int, allow_drop: float, fields: Sequence[str] = ()
) -> Store:
    """The same of preference pairs: two segments each, the chosen answer first."""

    def encode(pair: PreferencePair) -> tuple[list[Encoded], int]:
        said = (*(text for _, text in pair.turns), pair.chosen, pair.rejected)
        pair.notes += encoder.notes(said, pair.system)
        return encoder.pair(pair, seq_len)

    return _open("pairs", files, read_pairs, encode, encoder, seq_len, allow_drop, fields)


def _open(kind, files, read, encode, encoder, seq_len, allow_drop, fields) -> Store:
    parts = [
        kind,
        *map(digest, files),
        json.dumps([files, list(fields)]),
        encoder.tokenizer.fingerprint(),
        encoder.template.to_json(),
        str(seq_len),
        json.dumps(versions(encoder, kind)),
        *(_first_ids(path, fields, read, encode) for path in files),
    ]
    write = partial(_write, kind, files, fields, read, encode, seq_len)
    store = Store(cached(kind, parts, write))
    if len(store.tokens) != store.meta["tokens"] or len(store.trained) != store.meta["tokens"]:
        raise InputError(f"{store.folder} is damaged; delete it and start again")
    _check_drops(store.meta["report"], seq_len, allow_drop)
    return store


def _first_ids(path: str, fields: Sequence[str], read, encode) -> str:
    """A hash of what a file's first records become: a line that somebody changes to try it takes
    effect, though it has raised no number of VERSIONS."""
    found = hashlib.sha256()
    for _, example, _ in islice(read(path, fields), PROBED):
        segments = [] if example.dropped else encode(example)[0]
        found.update(repr((example.group, segments)).encode())
    return found.hexdigest()


def _check_drops(report: dict, seq_len: int, allow_drop: float) -> None:
    total, dropped = report["examples"], sum(report["dropped"].values())
    if dropped > allow_drop * total or dropped == total:
        causes = ", ".join(f"{n} {cause}" for cause, n in report["dropped"].items())
        raise InputError(
            f"{dropped} of {total} examples in {', '.join(report['files'])} cannot be kept "
            f"({causes}); raise --seq_len (now {seq_len}), mend the data, or allow it with "
            "--allow_drop"
        )


def _write(
    kind: str, files: list[str], fields: Sequence[str], read, encode, seq_len: int, folder: Path
) -> None:
    """`read` gives the records of a file, `encode` a record's segments; none if it is too long."""
    writer = Writer(folder, files, segments_per_example=2 if kind == "pairs" else 1)
    writer.meta["fields"] = list(fields)
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)  # (file, source)
    with progress(files) as bar:
        for number, path in enumerate(files):
            before = 0
            for record, example, n_bytes in read(path, fields):
                segments, cut = ([], 0) if example.dropped else encode(example)
                # A segment's first token has no predecessor, so it is never a label.
                n_trained = sum(sum(trained[1:]) for _, trained in segments)
                if segments:
                    divisor = 1 if kind == "pairs" else n_trained
                    label = getattr(example, "kind", "") or example.source
                    writer.add(segments, divisor, number, record, example.group, label)
                n_tokens = sum(len(ids) for ids, _ in segments)
                tallies[path, example.source].count(example, n_tokens, n_trained, cut)
                bar.update(n_bytes - before)
                before = n_bytes
    report = report_of(files, tallies)
    _check_drops(report, seq_len, allow_drop=1.0)  # an empty store is of no use to anybody
    writer.close(report)
