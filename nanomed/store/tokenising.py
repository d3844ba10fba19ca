"""Records of files become token ids, in many processes: in order, a bounded number under way.

The processes are interpreters of their own, which have neither this one's memory and locks nor its
script's imports. A process ends when its pipe does: none is left behind, however this one ends.
Python's own pool is no choice: up to Python 3.11 at least it hangs if a process dies while a batch
of more than a pipe holds is sent to it.
"""

import os
import signal
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from nanomed.records import Chat, Document, read_records, texts_in
from nanomed.records.fields import strings_in
from nanomed.store.cache import PACKAGE, group_key
from nanomed.store.tally import Facts
from nanomed.text import tokenizer
from nanomed.text.template import Encoder

BATCH = 1 << 20  # characters that a process is given at a time
RENDERED = "chat rendered by the template"  # its note in the report
NO_LIMIT = 1 << 62  # tokens of a chat: here it is cut into slices, not shortened
AHEAD = 2  # batches under way for each process, so that none waits for this one


class Batch(NamedTuple):
    """Records of one file as they stand in it; once encoded, the texts that they became."""

    file: int  # its number
    path: str
    n_bytes: int  # of the file read so far
    records: list[tuple[int, Any]]  # (number from 1, record); once encoded: list[Text]


# Of a document, or a chat as one: (its record's number, tokens of all of the record's texts, its
# own ids as uint32, none if it is dropped; its key, what is reported of it).
# A plain tuple: one process receives those of all others, and a NamedTuple takes it longer.
Text = tuple[int, int, bytes, int, Facts]


def batches(files: list[str], fields: Sequence[str], start: tuple[int, int]) -> Iterator[Batch]:
    """The records of all files from start (the file's number, the record's) on. Files before it
    are not opened, records before it not looked at."""
    for file in range(start[0], len(files)):
        records, size = [], 0
        for number, record, n_bytes in read_records(files[file], fields):
            if (file, number) < start:
                continue
            records.append((number, record))
            size += 8 + sum(map(len, strings_in(record)))
            if size >= BATCH:
                yield Batch(file, files[file], n_bytes, records)
                records, size = [], 0
        if records:
            yield Batch(file, files[file], n_bytes, records)


def encode(batch: Batch, encoder: Encoder) -> Batch:
    """Raises InputError at the first record that cannot be read."""
    encoded: list[Text] = []
    for number, record in batch.records:
        texts = texts_in(batch.path, number, record)
        ids = [ids_of(text, encoder) for text in texts]
        n_tokens = sum(map(len, ids))
        for text, its_ids in zip(texts, ids, strict=True):
            facts = Facts.of(text, encoder)
            if isinstance(text, Chat):
                facts.notes.append(RENDERED)
            its_ids = array("I", its_ids).tobytes()
            encoded.append((number, n_tokens, its_ids, group_key(text.group), facts))
    return batch._replace(records=encoded)


def ids_of(text: Document | Chat, encoder: Encoder) -> list[int]:
    """A document's text; a chat as the template renders it; nothing of what is dropped. Both end
    with the document-end id, of which a text itself has none, however it is spelt."""
    if text.dropped:
        return []
    if isinstance(text, Document):
        return [*encoder.tokenizer.encode(text.text), encoder.document_end]
    ids, _, _ = encoder.chat(text, NO_LIMIT)
    return ids if ids[-1] == encoder.document_end else [*ids, encoder.document_end]


# ---------------------------------------------------------------- in many processes


def in_order(batches: Iterable[Batch], encoder: Encoder, n_processes: int) -> Iterator[Batch]:
    """Each batch encoded, in the batches' order. Raises what encode() raises, at the first batch
    that cannot be read, and ChildProcessError if a process dies."""
    if n_processes == 1:
        yield from (encode(batch, encoder) for batch in batches)
        return
    idle: SimpleQueue[_Process] = SimpleQueue()

    def one(batch: Batch) -> Batch:
        process = idle.get()
        try:
            return process.encode(batch)
        finally:
            idle.put(process)

    with ExitStack() as stack:
        for _ in range(n_processes):
            process = _Process(str(encoder.tokenizer.path), encoder.template)
            stack.callback(process.end)
            idle.put(process)
        # A thread for each process, which only sends and receives.
        threads = ThreadPoolExecutor(n_processes)
        stack.callback(threads.shutdown, cancel_futures=True)
        under_way: deque[Future[Batch]] = deque()
        for batch in batches:
            under_way.append(threads.submit(one, batch))
            if len(under_way) > AHEAD * n_processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


class _Process:
    def __init__(self, *settings):
        self.pipe, there = Pipe()
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _work; _work({there.fileno()})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
        )
        there.close()
        self.pipe.send(settings)

    def encode(self, batch: Batch) -> Batch:
        try:
            self.pipe.send(batch)
            encoded = self.pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError(
                f"a tokenising process ended with exit code {self.process.wait()} (-9: killed, "
                "often for lack of memory); the same command goes on, --processes starts fewer"
            ) from None
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    def end(self) -> None:
        self.pipe.close()
        self.process.wait()


def _work(descriptor: int) -> None:
    """All that a tokenising process does. The settings come first, then batches; what is sent back
    is the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    pipe = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # the parent is done, or gone
        path, template = pipe.recv()
        encoder = Encoder(template, tokenizer.load(path))
        while True:
            batch = pipe.recv()
            try:
                answer = encode(batch, encoder)
            except Exception as error:
                answer = error
            pipe.send(answer)
