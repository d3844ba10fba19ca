"""Files into a store of documents: in order, shard by shard, and on from the last whole one."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from nanomed import locks
from nanomed.config import InputError
from nanomed.processes import n_cores
from nanomed.records import read_records, texts_in
from nanomed.store.cache import cached, digest, hash_of_first, progress
from nanomed.store.pool import in_order
from nanomed.store.shards import Shard, file_of, finished, write_json
from nanomed.store.stream import Documents, check
from nanomed.store.tally import Facts, Tally, among, report_of
from nanomed.store.texts import Encoded, batches, ids_of
from nanomed.store.versions import check_versions, versions
from nanomed.text.template import Encoder

SHARD_TOKENS = 32 << 20  # at most, 128 MiB; a document longer than that has a shard of its own
SMALL = 8 << 20  # bytes of files that are read before other processes have started


def documents(files: list[str], encoder: Encoder, fields: Sequence[str] = ()) -> Documents:
    """The store of the documents in `files`, tokenised now or found in the cache; or, if `files`
    is one folder, the store that it is. Chats become documents by the template.

    Raises InputError for a file that cannot be read, and for a store that is damaged or not of
    this tokenizer and code."""
    if len(files) == 1 and Path(files[0]).is_dir():
        folder = Path(files[0])
    else:
        plan = _plan(files, encoder, fields, SHARD_TOKENS)
        first = [hash_of_first(_ids_in(path, encoder, fields)) for path in files]
        parts = [json.dumps(plan), *map(digest, files), *first]
        small = sum(map(os.path.getsize, files)) < SMALL
        processes = 1 if small else n_cores()
        write = partial(build, files=files, encoder=encoder, fields=fields, n_processes=processes)
        folder = cached("documents", parts, write)
    store = Documents(folder)
    check(store, _identity(encoder))
    return store


def _ids_in(path: str, encoder: Encoder, fields: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    for number, record, _ in read_records(path, fields):
        for text in texts_in(path, number, record):
            yield text.group, ids_of(text, encoder)


def build(
    folder: Path,
    files: list[str],
    encoder: Encoder,
    fields: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
    n_processes: int = 1,
) -> Documents:
    """Writes the store, or what of it is not written yet. Raises InputError as documents() does,
    and if the folder holds another store or the files have changed since it was begun. The
    number of processes changes nothing in it."""
    plan = _plan(files, encoder, fields, shard_tokens)
    if not (folder / "manifest.json").exists():
        with locks.take(folder / "unfinished.json", patience=0) as begun:
            begun.seek(0)
            _go_on(folder, begun, plan, files)
            _write(folder, files, encoder, plan, n_processes)
    (folder / "unfinished.json").unlink(missing_ok=True)
    store = Documents(folder)
    _same(folder, plan, store.manifest)
    check(store, plan)
    return store


def _write(folder: Path, files: list[str], encoder: Encoder, plan: dict, n_processes: int) -> None:
    hasher = ThreadPoolExecutor(1)  # reads beside the tokenising
    try:
        hashes = hasher.map(digest, files)
        builder = _Builder(folder, files, plan["shard_tokens"])
        builder.run(encoder, plan["fields"], n_processes)
        sources = [
            {"path": path, "size": os.path.getsize(path), "sha256": sha256}
            for path, sha256 in zip(files, hashes, strict=True)
        ]
    finally:
        hasher.shutdown(cancel_futures=True)
    write_json(folder / "manifest.json", plan | _manifest(folder, sources))


def _manifest(folder: Path, sources: list[dict]) -> dict:
    written = finished(folder)
    parts: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for file, source, tally in (entry for shard in written for entry in shard["tallies"]):
        parts[sources[file]["path"], source].append(tally)
    tallies = {key: Tally.of(tallied) for key, tallied in parts.items()}
    report = report_of([source["path"] for source in sources], tallies)
    kept = [
        {name: shard[name] for name in ("tokens", "documents", "files")}
        for shard in written
        if shard["documents"]
    ]
    if not kept:
        raise InputError(f"no document in {', '.join(report['files'])}: {report['dropped']}")
    return {
        "tokens": report["tokens"],
        "documents": report["kept"],
        "bytes": report["bytes"],
        "sha256": _content(kept),
        "sources": sources,
        "shards": kept,
        "report": report,
    }


def _content(kept: list[dict]) -> str:
    """One hash of all tokens, borders and keys: what a resumed run must find again."""
    hashes = [
        facts["sha256"]
        for number, shard in enumerate(kept)
        for name, facts in shard["files"].items()
        if name != file_of(number, "source")
    ]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _identity(encoder: Encoder) -> dict:
    """What a store must share with the run that reads it."""
    return {
        "tokenizer": encoder.tokenizer.fingerprint(),
        "document_end": encoder.document_end,
        "template": encoder.template.to_json(),
        "versions": versions(encoder, "documents", "chats"),
    }


def _plan(files: list[str], encoder: Encoder, fields: Sequence[str], shard_tokens: int) -> dict:
    settings = {"fields": list(fields), "shard_tokens": shard_tokens}
    return {"paths": list(files), **settings, **_identity(encoder)}


def _go_on(folder: Path, begun, plan: dict, files: list[str]) -> None:
    """Sees that what is in the folder was begun for the same store."""
    try:
        plan = plan | {"times": [os.stat(path).st_mtime_ns for path in files]}
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    text = begun.read()
    if any(folder.glob("shard-*")):
        found = json.loads(text or "{}")
        _same(folder, plan, found)
        check_versions(str(folder), found.get("versions", {}), plan["versions"])
        return
    begun.truncate(0)  # what was begun, if anything, had come to nothing
    begun.write(json.dumps(plan))
    begun.flush()
    os.fsync(begun.fileno())


def _same(folder: Path, plan: dict, found: dict) -> None:
    names = set(plan) - {"versions"}
    if other := sorted(name for name in names if plan[name] != found.get(name)):
        raise InputError(
            f"{folder} holds a store of other input ({', '.join(other)} differ); delete it or give "
            "--out another folder"
        )


class _Builder:
    def __init__(self, folder: Path, files: list[str], shard_tokens: int):
        self.folder, self.files, self.shard_tokens = folder, files, shard_tokens
        done = finished(folder)
        self.start = tuple(done[-1]["next"]) if done else (0, 1)
        self.number, self.shard = len(done), Shard()
        self.named: dict[int, set[str]] = defaultdict(set)  # of each file the sources told apart
        for file, source, _ in (entry for shard in done for entry in shard["tallies"]):
            self.named[file].add(source)
        self.tallies: dict[tuple[int, str], Tally] = defaultdict(Tally)  # of this shard

    def run(self, encoder: Encoder, fields: Sequence[str], n_processes: int) -> None:
        sizes = np.cumsum([0, *(os.path.getsize(path) for path in self.files)]).tolist()
        with progress(self.files, sizes[self.start[0]]) as bar:
            todo = batches(self.files, fields, self.start)
            with closing(in_order(todo, encoder, n_processes)) as done:
                for encoded in done:
                    self._add(encoded)
                    bar.update(sizes[encoded.file] + encoded.n_bytes - bar.n)
        if self.shard.n_tokens or self.tallies:
            self._finish((len(self.files), 1))

    def _add(self, batch: Encoded) -> None:
        """A shard is cut between records, before the one that it has no room for."""
        file, at = batch.file, 0
        for record, group in groupby(range(len(batch.records)), batch.records.__getitem__):
            members = list(group)
            n_tokens = sum(batch.lengths[i] for i in members)
            if self.shard.n_tokens and self.shard.n_tokens + n_tokens > self.shard_tokens:
                self._finish((file, record))
            for i in members:
                if length := batch.lengths[i]:
                    self.shard.add(batch.ids[at : at + length], batch.keys[i], file, record)
                at += length
                self._count(file, batch.facts[i], length)

    def _count(self, file: int, facts: Facts, n_tokens: int) -> None:
        source = among(self.named[file], facts.source)
        self.named[file].add(source)
        self.tallies[file, source].count(facts, n_tokens, n_tokens - 1)

    def _finish(self, following: tuple[int, int]) -> None:
        """Writes the shard; the next one begins with the record `following`."""
        about = {"documents": 0}
        if self.shard.n_tokens:
            about = self.shard.write(self.folder, self.number)
        tallies = [[*key, vars(tally)] for key, tally in self.tallies.items()]
        about |= {"next": following, "tallies": tallies}
        write_json(self.folder / f"shard-{self.number:05d}.json", about)
        self.number, self.shard = self.number + 1, Shard()
        self.tallies.clear()
