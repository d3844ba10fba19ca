"""Batches of records to token ids in many processes, in order and with a bounded number under way.

The processes are interpreters of their own, which have neither this one's memory and locks nor its
script's imports. A process ends when its pipe does: none is left behind, however this one ends.
Python's own pool is no choice: up to Python 3.11 at least it hangs if a process dies while a batch
of more than a pipe holds is sent to it.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

from nanomed.store.cache import PACKAGE
from nanomed.store.texts import Batch, encode
from nanomed.text import tokenizer
from nanomed.text.template import Encoder

AHEAD = 2  # batches under way for each process, so that none waits for this one


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
