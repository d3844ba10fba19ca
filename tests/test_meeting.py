"""Processes that find one another, again after a restart, and what they say when one fails."""

import os
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nanomed import distributed, meeting
from nanomed.config import SFT, InputError
from nanomed.meeting import PATIENCE, PATIENCE_GPU
from nanomed.run.log import RunFolder
from tests.forks import server

# ---------------------------------------------------------------- the meeting


def meet(store: dist.Store, size: int) -> list[str]:
    """The names that `size` ranks agree on; the last comes first."""
    names = [""] * size

    def one(rank: int) -> None:
        names[rank] = meeting._attempt(store, rank, size)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    for thread in threads:
        thread.join(20)
    return names


def test_a_restarted_group_meets_whatever_its_dead_have_left():
    """The place outlives them. Some died before they had met, at any point."""
    store, seen = dist.HashStore(), set()
    deaths = [
        [],
        [lambda: meeting._answer(store, 1, "dead")],
        [lambda: meeting._call(store, 3, "dead")],
        [lambda: meeting._call(store, 3, "dead"), lambda: meeting._answer(store, 2, "x")],
        [lambda: meeting._answer(store, 1, "y"), lambda: meeting._call(store, 3, "dead")],
    ]
    for death in [*deaths, deaths[0]]:
        for step in death:
            step()
        names = meet(store, 3)
        assert len(set(names)) == 1 and names[0] not in seen | {"", "dead"}
        seen.add(names[0])


def test_who_waits_says_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "WAIT_IS_SAID", 0.2)
    monkeypatch.setattr(meeting, "PATIENCE", meeting.timedelta(seconds=0.7))
    with pytest.raises(InputError, match=r"rank 0 has waited .* s for ranks \[1, 2\] to start"):
        meeting._attempt(dist.HashStore(), 0, 3)
    said = capsys.readouterr().out.splitlines()
    assert 2 <= len(said) <= 4 and all("for ranks [1, 2] to start" in line for line in said)
    with pytest.raises(InputError, match=r"rank 2 has waited .* s for rank 0 to start"):
        meeting._attempt(dist.HashStore(), 2, 3)


def test_a_launch_has_a_name_of_its_own_which_restarts_keep(monkeypatch):
    places = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    found = []
    for store in (dist.HashStore(), dist.HashStore()):
        monkeypatch.setattr(meeting, "rendezvous", lambda *_, s=store, **__: iter([(s, 0, 1)]))
        found.append([meeting.place(0, 1)[1] for _ in range(2)])
    for launches in found:
        assert launches[0][0] == launches[1][0] and launches[0][1] != launches[1][1]
    assert found[0][0][0] != found[1][0][0]


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "localhost"}, {"MASTER_PORT": "1"}])
def test_one_process_needs_no_meeting_place(monkeypatch, given):
    """MASTER_ADDR stays behind in many a shell."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert isinstance(meeting.place(0, 1)[0], dist.HashStore)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, but RANK, .* not set"):
        meeting.place(0, 2)


# ---------------------------------------------------------------- how long they wait


def test_a_gpu_is_waited_for_minutes_and_a_disk_hours(world, monkeypatch):
    assert PATIENCE_GPU.total_seconds() <= 20 * 60 and PATIENCE.total_seconds() >= 2 * 3600
    of_gloo = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    of_saves = distributed.host_group()._get_backend(torch.device("cpu"))
    assert of_gloo == of_saves.options._timeout == PATIENCE

    class Joined(Exception):
        pass

    def join(backend, **settings):
        raise Joined(backend, settings["timeout"])

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(Joined) as met, distributed.start(torch.device("cuda", 0)):
        pass
    assert met.value.args == ("cpu:gloo,cuda:nccl", PATIENCE_GPU)


# ---------------------------------------------------------------- when one fails


def process(function, folder: str, rank: int, size: int, port: int) -> None:
    """A rank as Slurm would start it: its screen goes into a file."""
    screen = os.open(f"{folder}/screen{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
    meeting.LINGER = 0.3
    distributed.launch(lambda: function(folder, rank))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


# A thread may ask where the others are while they end: torch then warns, with its stack.
TORCHS_OWN = re.compile(r"^\[W\d.*\n(?:(?:Exception raised|C\+\+|frame #|#\d).*\n|\n)*", re.M)


def screens(function, folder: Path, size: int = 2) -> list[str]:
    port = free_port()
    ranks = [
        server().Process(target=process, args=(function, str(folder), rank, size, port))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 1
    texts = [(folder / f"screen{rank}").read_text("utf-8") for rank in range(size)]
    return [TORCHS_OWN.sub("", text) for text in texts]


def refused_by_rank_0(folder: str, rank: int) -> None:
    if rank > 0:  # on a busy machine it is long until a rank comes to listen, and then to ask
        meeting.LISTENS, asks = 1.5, meeting.Ear.another_failed_before
        meeting.Ear.another_failed_before = lambda *about: time.sleep(0.3) or asks(*about)
    with distributed.start(torch.device("cpu")) as world:
        RunFolder(SFT(out=f"{folder}/held"), world)


def refused_by_all(folder: str, rank: int) -> None:
    with distributed.start(torch.device("cpu")):
        raise InputError("no such thing")


def broken_on_rank_1(folder: str, rank: int) -> None:
    with distributed.start(torch.device("cpu")):
        if rank == 1:
            raise ZeroDivisionError("a bug")
        distributed.from_all(rank)


def on_two_machines(folder: str, rank: int) -> None:
    os.environ["LOCAL_RANK"] = "0"
    os.uname = lambda: SimpleNamespace(nodename=f"node{rank}")
    refused_by_rank_0(folder, rank)


def test_one_refusal_is_one_line(tmp_path):
    """The others meet a closed connection, which says nothing: they end without a word."""
    (tmp_path / "held").mkdir()
    (tmp_path / "held/config.json").write_text("{}")
    first, second = screens(refused_by_rank_0, tmp_path)
    assert re.fullmatch(r"error: .*/held already holds a run; .*\n", first) and second == ""


def test_what_all_refuse_is_said_once(tmp_path):
    assert sorted(screens(refused_by_all, tmp_path)) == ["", "error: no such thing\n"]


def test_a_crash_is_one_traceback(tmp_path):
    first, second = screens(broken_on_rank_1, tmp_path)
    assert first == "" and second.count("Traceback") == 1
    assert second.endswith("ZeroDivisionError: a bug\n")


def test_another_machine_hears_who_has_failed_and_why(tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held/config.json").write_text("{}")
    first, second = screens(on_two_machines, tmp_path)
    assert first.count("\n") == second.count("\n") == 1
    assert "rank 0 on node0 has failed: InputError" in second and "already holds a run" in second


def test_the_first_to_fail_stays_until_all_have_heard(monkeypatch):
    """Or are gone, or for as long as is bearable."""
    store = dist.HashStore()
    first, ends_well, listens = (meeting.Ear(store, rank, 3) for rank in range(3))
    monkeypatch.setattr(meeting, "LISTENS", 0.02)
    monkeypatch.setattr(meeting, "LINGER", 0.0)
    monkeypatch.setattr(meeting, "STAYS", 0.2)
    with ends_well:
        pass
    since = time.monotonic()
    with meeting.Ear(dist.HashStore(), 0, 2):  # where the place is, the last to leave
        pass
    assert time.monotonic() - since >= 0.2

    def stays(at_most: float) -> float:
        monkeypatch.setattr(meeting, "STAYS", at_most)
        since = time.monotonic()
        assert not first.another_failed_before(InputError("no such thing"))
        return time.monotonic() - since

    assert 0.2 <= stays(0.2) < 30
    listens.start()
    assert stays(60.0) < 30
    listens.join(20)
    listens.store = dist.HashStore()  # the place is gone with the first
    assert listens.another_failed_before(RuntimeError("connection closed"))


def test_after_an_error_nothing_is_torn_down(tmp_path, monkeypatch):
    """NCCL would wait for what it has begun. And the allocator joins what rows of many lengths
    leave between them, unless the user has set it."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for given, wanted in ((None, "expandable_segments:True"), ("other", "other")):
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        if given:
            monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
        distributed.launch(lambda: 1 / 0)
        assert os.environ["PYTORCH_ALLOC_CONF"] == wanted
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "other")
    distributed.launch(lambda: None)
    assert "PYTORCH_ALLOC_CONF" not in os.environ and ended == [1, 1, 0]


def test_what_a_disk_refuses_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", lambda code: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    distributed.launch(lambda: open("/sys/nanomed", "w"))
    assert re.fullmatch("error: /sys/nanomed: .*\n", capsys.readouterr().err)
    distributed.launch(lambda: open("/none"))  # that file is somebody's mistake
    assert "Traceback" in capsys.readouterr().err
