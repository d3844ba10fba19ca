"""Hangs, named by the ranks: one that sleeps, one that is stopped, others that only wait."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanomed import distributed, watchdog
from tests.forks import server
from tests.test_meeting import free_port, process

LOOKS = {"EVERY": 0.2, "LIMIT": 1.5, "TIMES": 2}


def hanging(folder: str, rank: int) -> None:
    """Rank 1 does not come to a sum of step 2: what it does instead is in the file `how`."""
    for name, value in LOOKS.items():
        setattr(watchdog, name, value)
    with distributed.start(torch.device("cpu")) as world:
        for step in (1, 2):
            watchdog.at(f"row 1 of 1 of step {step}")
            time.sleep(0.2)
            if rank == 1 and step == 2:
                if Path(folder, "how").read_text() == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                reads_a_disk_that_hangs()
            distributed.sum_over_ranks(torch.ones(1))
        assert world.size == 3


def reads_a_disk_that_hangs() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_a_hang_is_named(tmp_path, how):
    (tmp_path / "how").write_text(how)
    port = free_port()
    ranks = [
        server().Process(target=process, args=(hanging, str(tmp_path), rank, 3, port))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for number, rank in enumerate(ranks):
        if number != 1 or how != "stopped":
            rank.join(60)
            assert rank.exitcode == 1
    ranks[1].kill()
    screens = [(tmp_path / f"screen{rank}").read_text() for rank in range(3)]
    together = "".join(screens)
    tables = re.findall(r"error: rank \d hangs at row 1 of 1 of step 2. Where all are:", together)
    assert len(tables) == 1  # of this machine
    still = re.findall(r"rank (\d) on .*step 2, for .*: and its process stands still", together)
    assert still == (["1"] if how == "stopped" else [])
    assert "sum_over_ranks" in screens[0] and "sum_over_ranks" in screens[2]
    assert ("reads_a_disk_that_hangs" in screens[1]) == (how == "sleeps")


def watched(monkeypatch, first=2.0) -> tuple[list, watchdog.Watchdog]:
    ended = []
    monkeypatch.setattr(watchdog, "EVERY", 0.05)
    monkeypatch.setattr(watchdog, "LIMIT", 2.0)
    monkeypatch.setattr(watchdog, "TIMES", 4)
    monkeypatch.setattr(watchdog.meeting, "LINGER", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", ended.append)
    return ended, watchdog.Watchdog(dist.HashStore(), 0, 1, first)


def test_what_moves_or_may_take_any_time_is_left_alone(monkeypatch, capfd):
    ended, dog = watched(monkeypatch)
    with dog:
        for step in range(10):
            watchdog.at(f"step {step}")
            time.sleep(0.1)
        watchdog.away("a disk")
        said, until = "", time.monotonic() + 60
        while "rank 0 hangs at a disk" not in said and time.monotonic() < until:
            time.sleep(0.1)
            said += capfd.readouterr().err
        assert "WARNING, it may be a slow disk: rank 0 hangs at a disk" in said and ended == []


def test_a_place_may_take_many_times_as_long_as_those_before(monkeypatch):
    """A row on a CPU may take minutes: nothing is known before the first."""
    ended, dog = watched(monkeypatch, first=60.0)
    with dog:
        watchdog.at("row 1")
        time.sleep(2.3)
        assert ended == []
        watchdog.at("row 2")
        until = time.monotonic() + 60
        while dog.limit == 60.0 and time.monotonic() < until:
            time.sleep(0.05)
    assert dog.limit == max(2.0, 4 * dog.longest) and ended == []


def test_a_hang_is_ended_though_the_screen_is_gone(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(watchdog, "EVERY", 0)
    monkeypatch.setattr(watchdog.meeting, "LINGER", 0)
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8", buffering=1) as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        watchdog.Watchdog(dist.HashStore(), 0, 1, 1.0)._say_where(watchdog._moves, ends=True)
    assert codes == [1]
