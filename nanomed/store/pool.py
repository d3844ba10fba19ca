"""Batches of records to token ids in many processes, in order.

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
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe

from nanomed.store.cache import PACKAGE
from nanomed.store.texts import Batch, Encoded, encode
from nanomed.text.template import Encoder


def in_order(batches: Iterable[Batch], encoder: Encoder, n_processes: int) -> Iterator[Encoded]:
    """Each batch encoded, in the batches' order: the processes take turns. Raises what encode()
    raises, at the first batch that cannot be read, and ChildProcessError if a process dies."""
    if n_processes == 1:
        yield from (encode(batch, encoder) for batch in batches)
        return
    with ExitStack() as stack:
        settings = str(encoder.tokenizer.path), encoder.template
        idle = deque(_Process(*settings) for _ in range(n_processes))
        for process in idle:
            stack.callback(process.end)
        busy: deque[_Process] = deque()  # each with one batch, the oldest first
        for batch in batches:
            encoded = None
            if idle:
                process = idle.popleft()
            else:
                process = busy.popleft()
                encoded = process.receive()
            process.send(batch)
            busy.append(process)
            if encoded:
                yield encoded
        for process in busy:
            yield process.receive()


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
        self.send(settings)

    def send(self, batch: Batch) -> None:
        with self._alive():
            self.pipe.send(batch)

    def receive(self) -> Encoded:
        with self._alive():
            encoded = self.pipe.recv()
        if isinstance(encoded, Exception):
            raise encoded
        return encoded

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            raise ChildProcessError(
                f"a tokenising process ended with exit code {self.process.wait()} (-9: killed, "
                "often for lack of memory); the same command goes on, --processes starts fewer"
            ) from None

    def end(self) -> None:
        self.pipe.close()
        self.process.wait()
