"""Files into a store of documents: in order, shard by shard, and on from the last whole one."""

import hashlib
import io
import json
import os
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanomed import locks
from nanomed.config import InputError
from nanomed.processes import n_cores
from nanomed.records import read_records, texts_in
from nanomed.store.cache import cached, digest, hash_of_first, progress
from nanomed.store.stream import DTYPES, Documents, file_of, files_of
from nanomed.store.tally import Facts, Tally, among, report_of
from nanomed.store.tokenising import batches, ids_of, in_order
from nanomed.store.versions import check_versions, versions
from nanomed.text.template import Encoder

SHARD_TOKENS = 32 << 20  # at most, 128 MiB; a document longer than that has a shard of its own
SMALL = 8 << 20  # bytes of files that are read before other processes have started


def documents(files: list[str], encoder: Encoder, fields: Sequence[str] = ()) -> Documents:
    """The store of the documents in `files`, tokenised now or found in the cache; or, if `files`
    is one folder, the store that it is. Chats become documents by the template.

    Raises InputError for a file that cannot be read, and for a store that is damaged or not of
    this tokenizer and code."""
    plan = _plan(files, encoder, fields, SHARD_TOKENS)
    if len(files) == 1 and Path(files[0]).is_dir():
        folder = Path(files[0])
    else:
        first = [hash_of_first(_ids_in(path, encoder, fields)) for path in files]
        parts = [json.dumps(plan), *map(digest, files), *first]
        small = sum(map(os.path.getsize, files)) < SMALL
        processes = 1 if small else n_cores()
        write = partial(build, files=files, encoder=encoder, fields=fields, n_processes=processes)
        folder = cached("documents", parts, write)
    return Documents(folder).made_by(plan)


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
            _begin(folder, begun, plan)
            _write(folder, encoder, plan, n_processes)
    (folder / "unfinished.json").unlink(missing_ok=True)
    store = Documents(folder)
    _same(folder, plan, store.manifest)
    return store.made_by(plan)


def _write(folder: Path, encoder: Encoder, plan: dict, n_processes: int) -> None:
    hasher = ThreadPoolExecutor(1)  # reads beside the tokenising
    try:
        hashes = hasher.map(digest, plan["paths"])
        _write_shards(folder, encoder, plan, n_processes)
        sources = [
            {"path": path, "size": os.path.getsize(path), "sha256": sha256}
            for path, sha256 in zip(plan["paths"], hashes, strict=True)
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
    # Of tokens, borders and keys: what a resumed run must find again.
    hashes = [file["sha256"] for name, file in files_of(kept).items() if ".source." not in name]
    return {
        "tokens": report["tokens"],
        "documents": report["kept"],
        "bytes": report["bytes"],
        "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
        "sources": sources,
        "shards": kept,
        "report": report,
    }


def _plan(files: list[str], encoder: Encoder, fields: Sequence[str], shard_tokens: int) -> dict:
    """All that decides what is in a store, but for the content of its files."""
    return {
        "paths": list(files),
        "fields": list(fields),
        "shard_tokens": shard_tokens,
        "tokenizer": encoder.tokenizer.fingerprint(),
        "document_end": encoder.document_end,
        "template": encoder.template.to_json(),
        "versions": versions(encoder, "documents", "chats"),
    }


def _begin(folder: Path, begun: IO[str], plan: dict) -> None:
    """Sees that what is in the folder was begun by the same plan for the same state of the files,
    or notes both there."""
    try:
        plan = plan | {"times": [os.stat(path).st_mtime_ns for path in plan["paths"]]}
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    begun.seek(0)
    if any(folder.glob("shard-*")):
        found = json.loads(begun.read() or "{}")
        _same(folder, plan, found)
        check_versions(str(folder), found.get("versions", {}), plan["versions"])
    else:
        begun.truncate()  # what was begun, if anything, had come to nothing
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


def _write_shards(folder: Path, encoder: Encoder, plan: dict, n_processes: int) -> None:
    """Those that are not written yet. A shard is cut between records, before the one that it has no
    room for."""
    done = finished(folder)
    start = tuple(done[-1]["next"]) if done else (0, 1)
    named: dict[int, set[str]] = defaultdict(set)  # of each file the sources told apart
    for file, source, _ in (entry for shard in done for entry in shard["tallies"]):
        named[file].add(source)
    shard = Shard(len(done))
    files, fields = plan["paths"], plan["fields"]
    encoded = in_order(batches(files, fields, start), encoder, n_processes)
    with progress(files, start[0]) as reached, closing(encoded):
        for file, _, n_bytes, texts in encoded:
            for record, n_tokens, ids, key, facts in texts:
                full = shard.n_tokens and shard.n_tokens + n_tokens > plan["shard_tokens"]
                if full and shard.last != (file, record):
                    shard.write(folder, (file, record))
                    shard = Shard(shard.number + 1)
                source = among(named[file], facts.source)
                named[file].add(source)
                shard.add(ids, key, file, record, source, facts)
            reached(file, n_bytes)
    if shard.tallies:
        shard.write(folder, (len(files), 1))


class Shard:
    """Documents gathered in memory, in one piece that is given back whole, until written."""

    def __init__(self, number: int):
        self.number = number
        self.tokens, self.keys = array("I"), array("Q")
        self.borders, self.source = array("q", [0]), array("q")
        self.tallies: dict[tuple[int, str], Tally] = defaultdict(Tally)  # (file, its source)
        self.last = 0, 0  # file and record of the text that was added last

    @property
    def n_tokens(self) -> int:
        return self.borders[-1]

    def add(self, ids: bytes, key: int, file: int, record: int, source: str, facts: Facts) -> None:
        self.last = file, record
        n_tokens = len(ids) // self.tokens.itemsize
        self.tallies[file, source].count(facts, n_tokens, n_tokens - 1)
        if n_tokens:
            self.tokens.frombytes(ids)
            self.borders.append(len(self.tokens))
            self.keys.append(key)
            self.source.extend((file, record))

    def write(self, folder: Path, following: tuple[int, int]) -> None:
        """Its arrays, in the order of the documents' keys, and then its JSON; the next shard begins
        with the record `following`."""
        tokens = np.frombuffer(self.tokens, np.uint32).astype(DTYPES["tokens"], copy=False)
        borders = np.array(self.borders, DTYPES["borders"])
        keys = np.array(self.keys, DTYPES["keys"])
        source = np.array(self.source, DTYPES["source"]).reshape(-1, 2)
        order = np.argsort(keys, kind="stable")
        content = {
            "tokens": (tokens[borders[i] : borders[i + 1]].tobytes() for i in order),
            "borders": [_npy(np.concatenate(([0], np.cumsum(np.diff(borders)[order]))))],
            "keys": [_npy(keys[order])],
            "source": [_npy(source[order])],
        }
        about = {
            "tokens": self.n_tokens,
            "documents": len(order),
            "files": {
                file_of(self.number, name): _hashed(folder / file_of(self.number, name), chunks)
                for name, chunks in content.items()
                if self.n_tokens  # else all of its records were dropped
            },
            "next": following,
            "tallies": [[*key, vars(tally)] for key, tally in self.tallies.items()],
        }
        write_json(folder / f"shard-{self.number:05d}.json", about)


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _hashed(path: Path, chunks: Iterable[bytes]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    _hashed(unfinished, [json.dumps(content, ensure_ascii=False).encode()])
    unfinished.rename(path)


def finished(folder: Path) -> list[dict]:
    """What each shard's JSON says, up to the first shard without one."""
    found: list[dict] = []
    while (path := folder / f"shard-{len(found):05d}.json").exists():
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found
