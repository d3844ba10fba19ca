"""Locks of files: held by another, on a disk that has none, on one that only this machine sees."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from nanomed import locks
from nanomed.config import SFT, InputError
from nanomed.run.log import RunFolder
from nanomed.store import cache


def test_a_lock_is_one_process_s_until_its_file_is_closed(tmp_path):
    with locks.take(tmp_path / "new" / "lock"):
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        with pytest.raises(InputError, match=f"another process is writing to {tmp_path}/new"):
            locks.take(tmp_path / "new" / "lock", patience=0.3)
    locks.take(tmp_path / "new" / "lock", patience=0).close()


def test_a_folder_that_cannot_be_written_is_named():
    with pytest.raises(
        InputError, match=r"cannot write to /sys/nanomed: .*(permitted|denied|only)"
    ):
        locks.take(Path("/sys/nanomed/lock"))


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said_and_used(world, tmp_path, monkeypatch, capsys, error):
    """Lustre without -o flock, some FUSE: neither a traceback nor a run that nobody has started."""

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunFolder(SFT(out=str(tmp_path / "run")), world).close()
    said = capsys.readouterr().out
    assert f"WARNING: the disk of {tmp_path}/run has no file locks" in said and "-o flock" in said
    write = lambda folder: (folder / "it").write_text("x")  # noqa: E731
    assert (cache.cached("chats", ["key"], write) / "it").read_text() == "x"


def test_two_machines_whose_locks_are_their_own_write_beside_each_other(tmp_path):
    """Each in a folder of its own; the first to end wins, and the other takes what that wrote."""
    found = {}

    def late(unfinished: Path) -> None:
        (unfinished / "it").write_text("the other's")
        found["own"] = unfinished
        key = unfinished.name.partition(".")[0]
        found["first"] = unfinished.with_name(key)
        found["first"].mkdir()
        (found["first"] / "it").write_text("the first's")

    folder = cache.cached("chats", ["key"], late)
    assert folder == found["first"] and (folder / "it").read_text() == "the first's"
    assert not found["own"].exists()


def test_what_a_killed_writer_left_is_deleted_and_what_another_machine_writes_is_not(tmp_path):
    write = lambda folder: (folder / "it").write_text("x")  # noqa: E731
    folder = cache.cached("chats", ["key"], write)
    folder.rename(tmp_path / "away")
    left = {
        name: folder.with_name(f"{folder.name}.unfinished-{name}")
        for name in (f"{os.uname().nodename}-999999999", f"{os.uname().nodename}-1", "elsewhere-7")
    }
    for path in left.values():
        path.mkdir()
    assert cache.cached("chats", ["key"], write) == folder
    assert [path.exists() for path in left.values()] == [False, True, True]


def test_a_cache_that_cannot_be_written_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cache, "CACHE", Path("/sys/nanomed/cache"))
    with pytest.raises(
        InputError, match=r"/sys/nanomed/cache: start the script from a folder that"
    ):
        cache.cached("chats", ["key"], lambda folder: None)
