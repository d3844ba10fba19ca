"""Batches of records to token ids in many processes, in order and with a bounded number under way.

The processes are interpreters of their own (process.py), which have neither this one's memory and
locks nor its script's imports. A process ends when its pipe does: none is left behind, however this
one ends. Python's own pool is no choice: up to Python 3.11 at least it hangs if a process dies
while a batch of more than a pipe holds is sent to it.
"""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import Pipe
from queue import SimpleQueue

from nanomed.store.cache import PACKAGE
from nanomed.store.texts import Batch, Encoded, encode
from nanomed.text.template import Encoder

AHEAD = 2  # batches under way for each process, so that none waits for this one


def in_order(batches: Iterable[Batch], encoder: Encoder, n_processes: int) -> Iterator[Encoded]:
    """Each batch encoded, in the batches' order. Raises what encode() raises, at the first batch
    that cannot be read, and ChildProcessError if a process dies."""
    if n_processes == 1:
        yield from (encode(batch, encoder) for batch in batches)
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
            process = _Process(str(encoder.tokenizer.path), encoder.template)
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


class _Process:
    def __init__(self, *settings):
        self.pipe, there = Pipe()
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanomed.store.process", str(there.fileno())],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
        )
        there.close()
        self.pipe.send(settings)

    def encode(self, batch: Batch) -> Encoded:
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
