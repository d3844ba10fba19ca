"""Batches of records to token ids in many processes, in order and with a bounded number under way.

The processes are started anew (spawned), so they hold neither this one's memory nor its locks. A
process ends when its pipe does: none is left behind, however this one ends.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from queue import SimpleQueue

from nanomed import tokenizer
from nanomed.store.texts import Batch, Encoded, encode
from nanomed.template import Encoder, Template

AHEAD = 2  # batches under way for each process, so that none waits for this one


def in_order(
    batches: Iterable[Batch], encoder: Encoder, text_key: str, n_processes: int
) -> Iterator[Encoded]:
    """Each batch encoded, in the batches' order. Raises what encode() raises, at the first batch
    that cannot be read, and ChildProcessError if a process dies."""
    if n_processes == 1:
        yield from (encode(batch, encoder, text_key) for batch in batches)
        return
    idle: SimpleQueue[_Process] = SimpleQueue()

    def one(batch: Batch) -> Encoded:
        process = idle.get()
        try:
            return process.encode(batch)
        finally:
            idle.put(process)

    with ExitStack() as stack:
        for _ in range(n_processes):
            process = _Process(str(encoder.tokenizer.path), encoder.template, text_key)
            stack.callback(process.end)
            idle.put(process)
        # A thread for each process, which only sends and receives.
        threads = ThreadPoolExecutor(n_processes)
        stack.callback(threads.shutdown, cancel_futures=True)
        under_way: deque[Future[Encoded]] = deque()
        for batch in batches:
            under_way.append(threads.submit(one, batch))
            if len(under_way) > AHEAD * n_processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


class _Process:
    def __init__(self, *settings):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(there, *settings), daemon=True)
        self.process.start()
        there.close()

    def encode(self, batch: Batch) -> Encoded:
        try:
            self.pipe.send(batch)
            encoded = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise ChildProcessError(
                f"a tokenising process ended with exit code {self.process.exitcode} (-9: killed, "
                "often for lack of memory); the same command goes on, --processes starts fewer"
            ) from None
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def _serve(pipe: Connection, tokenizer_path: str, template: Template, text_key: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    encoder = Encoder(template, tokenizer.load(tokenizer_path))
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        try:
            encoded = encode(batch, encoder, text_key)
        except Exception as error:
            encoded = error
        try:
            pipe.send(encoded)
        except OSError:
            return
