"""A hang is named: which rank is where. Whoever waits for another process waits in silence, and a
link, a GPU or a disk that hangs makes no error.

The main thread says where it is (`at`, `away`). A thread of each rank looks every few seconds, and
puts it into the store where the ranks have met. A rank that does not leave a place of a step prints
where every rank is and its own stacks, and ends; torchrun then ends the others or starts all anew.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from nanomed import meeting

EVERY = 10.0  # seconds between two looks
LIMIT = 300.0  # seconds that a place may take at least
TIMES = 20  # as long as the longest so far, if that is more: rows on a CPU may take minutes

UNKNOWN = '[0, "?", "a place before its first look", 0]'
_place, _moves, _watched = "the start", 0, False


def at(place: str) -> None:
    """In a step: what takes long from here on is a hang."""
    global _place, _moves, _watched
    _place, _moves, _watched = place, _moves + 1, True


def away(place: str) -> None:
    """At what may take any time, such as a disk: a hang there is said, and ends nothing."""
    global _place, _moves, _watched
    _place, _moves, _watched = place, _moves + 1, False


class Watchdog(threading.Thread):
    """Of one rank, while it is open. `first` is how many seconds the first place may take: nothing
    is known of this machine then."""

    def __init__(self, store: dist.Store, rank: int, size: int, first: float):
        super().__init__(name="watchdog", daemon=True)
        self.store, self.rank, self.size = store.clone(), rank, size
        self.limit, self.longest, self.looks = first, 0.0, 0
        self.ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        away("the start")
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()

    def run(self) -> None:
        # Seconds are counted by looks: those in which the whole process stands still, because it is
        # suspended, are not this rank's fault.
        seconds, moves, watched, said = 0.0, _moves, False, False
        while not self.ended.wait(EVERY):
            if moves == _moves:
                seconds += EVERY
            else:
                if watched:
                    self.longest = max(self.longest, seconds)
                    self.limit = max(LIMIT, TIMES * self.longest)
                seconds, moves, watched, said = 0.0, _moves, _watched, False
            self._tell(seconds)
            if seconds > self.limit and not said:
                said = True
                self._say_where(moves, watched)

    def _tell(self, seconds: float) -> None:
        self.looks += 1
        words = [self.looks, os.uname().nodename, _place, seconds]
        with suppress(RuntimeError):  # the store is gone
            self.store.set(f"at {self.rank}", json.dumps(words))

    def _seen(self) -> list[list]:
        """What each rank has told last."""
        try:
            keys = [f"at {rank}" for rank in range(self.size)]
            told = [self.store.get(key) if self.store.check([key]) else UNKNOWN for key in keys]
            return [json.loads(words) for words in told]
        except RuntimeError:
            return []

    def _say_where(self, moves: int, ends: bool) -> None:
        """Says where all are; if this rank is in a step, where exactly it hangs, and ends it."""
        before = self._seen()
        for _ in range(3):  # who lives looks meanwhile
            time.sleep(EVERY)
            self._tell(self.limit)
        if moves != _moves:
            return  # it has gone on
        lines = [f"rank {self.rank} hangs at {_place}. Where all are:"]
        for rank, (now, earlier) in enumerate(zip(self._seen(), before, strict=False)):
            looks, host, place, seconds = now
            still = ": and its process stands still" if looks == earlier[0] else ""
            lines.append(f"  rank {rank} on {host}: {place}, for {seconds:.0f} s{still}")
        words = ("error: " if ends else "WARNING, it may be a slow disk: ") + "\n".join(lines)
        with suppress(OSError):  # of a screen that is gone
            if self._is_first_here():
                print(words, file=sys.stderr, flush=True)
            if ends:
                meeting.tell_torchrun(words)
                print(f"rank {self.rank} hangs here:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
        if ends:
            time.sleep(meeting.LINGER)  # the others come to theirs
            os._exit(1)

    def _is_first_here(self) -> bool:
        """Of this machine's ranks at this place: one table is enough."""
        with suppress(RuntimeError):
            key = f"{_place} on {os.uname().nodename}"
            return self.store.compare_set(key, "", str(self.rank)) == str(self.rank).encode()
        return True
