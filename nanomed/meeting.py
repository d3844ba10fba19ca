"""Where processes find one another, before they are a group; and when one has failed, who says why.

torchrun on each machine starts processes, counts their restarts by itself, and keeps one place that
all processes see: a store of keys and values. It outlives them.
"""

import json
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanomed.config import InputError
from nanomed.processes import rank_from_env

# How long a rank waits for the others. On a GPU, where nobody waits for a disk, a few minutes: a
# link or a GPU that hangs is noticed by nothing else. In host memory, for the slowest disk among
# them. A rank that is gone is noticed by torchrun.
PATIENCE_GPU, PATIENCE = timedelta(minutes=15), timedelta(hours=2)


def place(rank: int, size: int) -> tuple[dist.Store, tuple[str, str]]:
    """Where processes find one another, and World.launch. torchrun keeps the place over its
    restarts, with the addresses of the processes that are gone: each attempt has a part of it to
    itself."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if lacking := [name for name in needed if name not in os.environ]:
        if size > 1:
            raise InputError(
                f"WORLD_SIZE is {size}, but {', '.join(lacking)} not set; torchrun sets all of them"
            )
        return dist.HashStore(), (uuid.uuid4().hex, "")
    store, *_ = next(rendezvous("env://", timeout=PATIENCE))
    launch = store.compare_set("launch", "", uuid.uuid4().hex).decode()
    attempt = _attempt(store, rank, size)
    return dist.PrefixStore(attempt, store), (launch, attempt)


WAIT_IS_SAID = 60.0  # seconds between two lines of who waits for others
LISTENS = 0.5  # seconds between two looks whether another rank has failed
STAYS = 10.0  # seconds at most that the first to fail waits for the others to hear of it
LINGER = 20.0  # seconds: it comes to its message meanwhile, and torchrun then ends the others


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A new name, the same on all ranks. It cannot be a count of restarts: each machine's torchrun
    counts by itself. So rank 0 makes a name. Every other rank answers with it and a name of its
    own. Once all have answered, rank 0 shows the answers, and a rank that finds its own among them
    goes on. What an earlier attempt has left in the store is in nobody's answer."""
    mine, (_, _, local_rank, _) = uuid.uuid4().hex, rank_from_env()
    since = said = time.monotonic()
    while True:
        name, missing = _call(store, size, mine) if rank == 0 else _answer(store, rank, mine)
        if name:
            return name
        now = time.monotonic()
        waits = f"rank {rank} has waited {now - since:.0f} s for {missing} to start"
        if now - since > PATIENCE.total_seconds():
            raise InputError(f"{waits}; look at the screens of the other machines")
        if now - said > WAIT_IS_SAID and local_rank == 0:
            print(waits, flush=True)
            said = now
        time.sleep(0.1)


def _call(store: dist.Store, size: int, name: str) -> tuple[str, str]:
    """(the attempt's name once all have answered to it, else who has not)."""
    store.set("attempt", name)
    answers = [_read(store, f"answer {rank}") for rank in range(1, size)]
    missing = [rank for rank, answer in enumerate(answers, 1) if not answer.startswith(name)]
    if not missing:
        store.set("answers", " ".join(answers))
    return "" if missing else name, f"ranks {missing[:8]}" + " and more" * (len(missing) > 8)


def _answer(store: dist.Store, rank: int, mine: str) -> tuple[str, str]:
    name = _read(store, "attempt")
    store.set(f"answer {rank}", f"{name}:{mine}")
    heard = f"{name}:{mine}" in _read(store, "answers").split()
    return name if heard else "", "rank 0"


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def tell_torchrun(words: str) -> None:
    """Its closing table shows the words in place of a traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        about = {"py_callstack": words, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(file, "w", encoding="utf-8") as out:
            json.dump({"message": {"message": words, "extraInfo": about}}, out)


class Ear(threading.Thread):
    """Hears the reason when another rank fails. That rank's end may be the end of the place, and
    whoever waits for it meets a closed connection not before: then it is too late to ask."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(name="ear", daemon=True)
        self.store, self.rank, self.size = store.clone(), rank, size
        self.failed, self.ended = b"", threading.Event()  # (host, rank, reason) in JSON

    def __enter__(self) -> "Ear":
        self.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.ended.set()
        if kind is None or not issubclass(kind, Exception):
            self._has_heard()  # and will not ask any more
        if kind is None and self.rank == 0:
            self._stay()  # without torchrun the place ends with it, and torch would warn the others

    def run(self) -> None:
        with suppress(RuntimeError):  # the place is gone
            while not self.ended.wait(LISTENS):
                if self.store.check(["failed"]):
                    self.failed = self.store.get("failed")
                    return self._has_heard()

    def _has_heard(self) -> None:
        with suppress(RuntimeError):
            self.store.set(f"heard {self.rank}", "")

    def another_failed_before(self, error: Exception) -> bool:
        """When a rank fails, the others only see a closed connection, and the reason is on its
        screen. If that is another machine's screen, one line says the reason here, too. The first
        stays until all have heard it."""
        mine = json.dumps([os.uname().nodename, self.rank, f"{type(error).__name__}: {error}"])
        with suppress(RuntimeError):
            self.failed = self.failed or self.store.compare_set("failed", "", mine)
            self._has_heard()
        if not self.failed:  # the place is gone
            return False
        host, first, reason = json.loads(self.failed)
        if first == self.rank:
            self._stay()
            return False
        if host != os.uname().nodename and rank_from_env()[2] == 0:
            print(f"error: rank {first} on {host} has failed: {reason}", file=sys.stderr)
        time.sleep(LINGER)
        return True

    def _stay(self) -> None:
        """Until all have heard, or have left."""
        until = time.monotonic() + STAYS
        with suppress(RuntimeError):
            while time.monotonic() < until:
                if self.store.check([f"heard {rank}" for rank in range(self.size)]):
                    return
                time.sleep(0.05)
