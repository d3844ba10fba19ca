"""Documents in shards: read from files, then kept or dropped, stage by stage, each with a reason.

    OUT/plan.json                     the settings, files and code that the result depends on
    OUT/0-read/00003-002.jsonl.gz     a shard: records as they came, and in "nanomed" what is known
    OUT/2-rules/00017.jsonl.gz        of a shard what the rules keep
    OUT/2-rules/00017.dropped.jsonl   the others, a line each: file, record, reason, value, limit
    OUT/2-rules/00017.done.json       the shard's mark and counts, written last
    OUT/final/00000.jsonl.gz          what all stages keep

A document's id is file << 32 | record: its place in the input, which no number of shards changes.
"""

import gzip
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, zip_longest
from math import log2
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nanomed.build import text
from nanomed.build.files import line_of, make_private, whole
from nanomed.config import InputError
from nanomed.records import Chat, chats_of, read_records, texts_in
from nanomed.records.shapes import blank, language, source_of

GROUP = 64 << 20  # bytes of files that are read, and written at the end, by one task
SOURCES = 100  # of a file; documents of all others count as its folder's
NEAR, BINS = 20, 40  # examples on either side of a limit; bars of a histogram
# Values that are no shares between 0 and 1: (the histogram's end, whether its bars grow).
SCALES = {
    "length": (1e6, True),
    "toxic": (1e3, True),
    "private": (1e3, True),
    "quality": (6, False),
    "score": (36, False),  # of a chat, complexity x quality
    "repeated_turns": (2, False),  # Context Relevance, and its lower limit
    "unrelated_turns": (2, False),  # the upper one
    "answer_loss": (10, False),  # nats per token
    "share": (1e6, True),
}


class Finding(NamedTuple):
    """What a stage found of a document. The first that does not keep it is the reason it goes."""

    name: str
    value: float
    limit: float
    keeps: bool
    more: dict[str, Any] = {}  # noqa: RUF012  what the dropped one's line says beside that
    aside: bool = False  # the dropped one is written to a file of its own too


@dataclass
class Doc:
    id: int
    record: dict[str, Any]  # as it stands in the file
    text: str
    known: dict[str, Any]  # source, lang, tokens, and every value that was found
    findings: list[Finding] = field(default_factory=list)


Judge = Callable[[list[Doc]], None]  # appends its findings to each of a batch of documents


# ---------------------------------------------------------------- records


def text_of(path: str, number: int, record: Any, chats: bool = False) -> str:
    """A document's text; of a chat's record, and with `chats` of any, all turns: what is learned of
    it. Raises InputError as texts_in does."""
    if text := _own_text(record, chats):
        return text
    found = chats_of(record) if chats else texts_in(path, number, record)
    return "\n".join(text for one in found for text in one.texts())


def systems_of(record: Any, chats: bool = False) -> list[str]:
    """The system texts of a record that text_of() has read: not in its text, but kept with it."""
    if _own_text(record, chats):
        return []
    found = chats_of(record) if chats else texts_in("", 0, record)
    return [one.system for one in found if isinstance(one, Chat)]


def _own_text(record: Any, chats: bool) -> str:
    """A document's, "" of a chat's record."""
    if chats or not isinstance(record, dict):
        return ""
    text = record.get("text") or record.get("content")
    return text if isinstance(text, str) else ""


def read_documents(
    files: list[str], numbers: list[int], fields: list[str], chats: bool = False
) -> Iterator[Doc]:
    """The documents of files[n] for n in numbers; `fields` as --fields has them. Raises InputError
    naming file, record and field. `chats`: all records are chats, and known to be ones."""
    for n in numbers:
        folder, sources = Path(files[n]).parent.name, set()
        for number, record, _ in read_records(files[n], fields):
            found = text_of(files[n], number, record, chats)
            try:
                found.encode()
            except UnicodeEncodeError:  # its own error names the field
                texts_in(files[n], number, record)
            lang, source = record.get("lang"), source_of(record).replace("\t", " ")
            if source and len(sources) < SOURCES:  # a file may name each document's address
                sources.add(source)
            known = {
                "source": source if source in sources else folder,
                "lang": lang if lang in ("zh", "en") else language(found),
            } | ({"chat": True} if chats else {})
            yield Doc(n << 32 | number, record, found, known)


def read_shard(path: Path) -> Iterator[Doc]:
    """The documents that a stage kept."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                known = record.pop("nanomed")
                found = text_of(str(path), 0, record, known.get("chat", False))
                yield Doc(known.pop("id"), record, found, known)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): remove the folder {path.parent}") from None


def batched(
    docs: Iterable[Any],
    size_of: Callable[[Any], int] = lambda doc: len(doc.text),
    enough: int = text.AT_ONCE,
) -> Iterator[list[Any]]:
    """Documents together until their sizes, by default in characters, are enough."""
    batch, size = [], 0
    for doc in docs:
        batch.append(doc)
        size += size_of(doc)
        if size >= enough:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def begin(docs: list[Doc]) -> None:
    """The stage `read`: drops what has no text and counts tokens."""
    for doc, n in zip(docs, text.tokens([d.text for d in docs]).lengths.tolist(), strict=True):
        doc.known["tokens"] = n
        filled = not blank(doc.text)
        doc.findings.append(Finding("empty", float(not filled), 0.0, filled))


# ---------------------------------------------------------------- writing


def packed(file: BinaryIO) -> gzip.GzipFile:
    """Without the time: the same content gives the same bytes."""
    return gzip.GzipFile("", "wb", 1, file, mtime=0)


@dataclass
class Tally:
    """What a stage did with a shard, or with all of them."""

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> documents
    flow: dict[str, list[int]] = field(default_factory=dict)  # SIZES kept, by "source\tlanguage"
    bins: dict[str, list[int]] = field(default_factory=dict)  # by "value\tlanguage"
    limits: dict[str, float] = field(default_factory=dict)  # by "value\tlanguage"
    touched: dict[str, list[int]] = field(default_factory=dict)  # documents, dropped; by benchmark
    near: dict[str, list] = field(default_factory=dict)  # by "value\tlanguage\tside": examples
    not_run: str = ""  # why, of a stage that is left out

    @property
    def kept(self) -> int:
        return self.read - sum(self.dropped.values())

    def count(self, doc: Doc, drop: Finding | None, file: str, show_text: bool) -> None:
        self.read += 1
        lang = doc.known["lang"]
        if drop:
            self.dropped[drop.name] = self.dropped.get(drop.name, 0) + 1
        else:
            size = [1, len(doc.text.encode()), doc.known["tokens"]]
            _add(self.flow, f"{doc.known['source']}\t{lang}", size)
        for found in doc.findings:
            high, grows = SCALES.get(found.name, (1.0, False))
            share = log2(1 + found.value) / log2(1 + high) if grows else found.value / high
            bar = [0] * BINS
            bar[int(min(BINS - 1, max(0.0, share * BINS)))] = 1
            key = f"{found.name}\t{lang}"
            _add(self.bins, key, bar)
            self.limits[key] = min(found.limit, self.limits.get(key, found.limit))
            shown = doc.text[:200] + "…" * (len(doc.text) > 200) if show_text else ""
            if benchmark := found.more.get("benchmark"):
                _add(self.touched, benchmark, [1, int(found is drop)])
            side = self.near.setdefault(f"{key}\t{'kept' if found.keeps else 'dropped'}", [])
            distance = round(abs(found.value - found.limit), 6)
            side.append([distance, lottery(doc.id), file, doc.id & 0xFFFFFFFF, found.value, shown])
            if len(side) > 4 * NEAR:
                side[:] = heapq.nsmallest(NEAR, side)

    @classmethod
    def of(cls, parts: Iterable[dict]) -> "Tally":
        """The sum of several, as their marks hold them."""
        total = cls()
        for part in parts:
            total.read += part["read"]
            for key, limit in part["limits"].items():
                total.limits[key] = min(limit, total.limits.get(key, limit))
            for name in ("flow", "bins", "touched"):
                for key, values in part[name].items():
                    _add(getattr(total, name), key, values)
            total.dropped = dict(Counter(total.dropped) + Counter(part["dropped"]))
            for key, side in part["near"].items():
                total.near[key] = heapq.nsmallest(NEAR, total.near.get(key, []) + side)
        return total


def _add(sums: dict[str, list[int]], key: str, more: list[int]) -> None:
    sums[key] = [a + b for a, b in zip_longest(sums.get(key, []), more, fillvalue=0)]


def lottery(id: int) -> float:
    """A document's number between 0 and 1: chance that is the same in every run."""
    return int(hashlib.blake2b(id.to_bytes(8, "big"), digest_size=6).hexdigest(), 16) / 2**48


def write_shard(
    path: Path,
    docs: Iterable[Doc],
    judge: Judge,
    files: list[str],
    show_text: bool = False,
    aside: bool = False,
) -> dict[str, Any]:
    """Judges documents and writes PATH.jsonl.gz, PATH.dropped.jsonl and, if some of the dropped may
    be put aside, PATH.aside.jsonl.gz, each whole or not at all. Returns the tally for the mark."""
    make_private(path.parent)
    tally = Tally()
    with ExitStack() as stack:
        at = lambda end: stack.enter_context(whole(path.with_name(path.name + end)))  # noqa: E731
        dropped = at(".dropped.jsonl")
        kept = stack.enter_context(packed(at(".jsonl.gz")))
        put_aside = stack.enter_context(packed(at(".aside.jsonl.gz"))) if aside else None
        for batch in batched(docs):
            judge(batch)
            for doc in batch:
                drop = next((found for found in doc.findings if not found.keeps), None)
                file, number = files[doc.id >> 32], doc.id & 0xFFFFFFFF
                tally.count(doc, drop, file, show_text)
                doc.known |= {f.name: round(f.value, 4) for f in doc.findings if f.name != "empty"}
                line = line_of({**doc.record, "nanomed": {"id": doc.id, **doc.known}})
                if not drop:
                    kept.write(line)
                    continue
                why = {"reason": drop.name, "value": round(drop.value, 4), "limit": drop.limit}
                shown = {"text": doc.text} if show_text else {}
                place = {"file": file, "record": number}
                dropped.write(line_of({**place, **why, **drop.more, **shown}))
                if drop.aside:
                    put_aside.write(line)
    return asdict(tally)


# ---------------------------------------------------------------- tasks


def groups(files: list[str]) -> list[list[int]]:
    """Numbers of files that are read by one task: large ones alone, small ones together."""
    found, size = [], GROUP
    for n, path in enumerate(files):
        if size >= GROUP:
            found.append([])
            size = 0
        found[-1].append(n)
        size += os.path.getsize(path)
    return found


def read_group(
    g: int, out: Path, files: list[str], fields: list[str], chats: bool, show_text: bool,
    shard_chars: int,
) -> dict[str, Any]:  # fmt: skip
    """Cuts the files of a group into shards. What has its mark already is passed over."""
    docs, k = read_documents(files, groups(files)[g], fields, chats), 0
    while first := next(docs, None):
        shard, name = _shard_of(first, docs, shard_chars), f"{g:05d}-{k:03d}"
        if (out / f"{name}.done.json").exists():
            for _ in shard:
                pass
        else:
            tally = write_shard(out / name, shard, begin, files, show_text)
            with whole(out / f"{name}.done.json") as file:
                file.write(line_of(tally))
        k += 1
    return {"shards": k}


def _shard_of(first: Doc, others: Iterator[Doc], shard_chars: int) -> Iterator[Doc]:
    size = 0
    for doc in chain([first], others):
        yield doc
        size += len(doc.text)
        if size >= shard_chars:
            return


def judge_shard(
    i: int, shards: list[Path], out: Path, judge: Judge, files: list[str], **how: bool
) -> dict[str, Any]:
    return write_shard(out / f"{i:05d}", read_shard(shards[i]), judge, files, **how)
