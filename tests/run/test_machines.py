"""Several machines: what each of them must see and know before the first step and in a save; and
what a disk may not be able to do."""

import errno
import os
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanomed.config import SFT, InputError
from nanomed.run import checkpoint, saves
from nanomed.run.log import RunFolder
from nanomed.run.saves import SaveFailed
from tests.run.test_checkpoint import trained


def begin(world, folders: list[str], identities: list[dict], flags=()) -> str:
    """Each rank on a machine of its own, in its folder; what it says."""
    checkpoint.CACHED, uname = 0.3, os.uname
    os.uname = lambda: SimpleNamespace(nodename=f"node{world.rank}")
    try:
        with chdir(folders[world.rank]):
            c = SFT(out="run", resume="auto", **dict(flags).get(world.rank, {}))
            RunFolder(c, world, identities[world.rank]).close()
        return ""
    except InputError as error:
        return str(error)
    finally:
        os.uname = uname


def test_a_machine_that_does_not_see_the_run_folder_is_named(pool, tmp_path):
    """It has a folder of that name, from an earlier run."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b/run").mkdir(parents=True)
    (tmp_path / "b/run/.launch").write_text("another")
    folders = [str(tmp_path / name) for name in "ab"]
    wanted = "rank 1 on node1 cannot join: it does not see run; all must share the disk of --out"
    assert pool(2, begin, folders, [{}, {}]) == [wanted] * 2
    assert not (tmp_path / "a/run/config.json").exists()  # so that --out is still free
    (tmp_path / "c").mkdir()
    assert pool(2, begin, [str(tmp_path / "c")] * 2, [{}, {}]) == ["", ""]


def test_a_machine_started_otherwise_is_named_with_the_difference(pool, tmp_path):
    same = {"lr": 0.1, "seed": 0}
    said = pool(2, begin, [str(tmp_path)] * 2, [same, same | {"lr": 0.5}])
    assert not (tmp_path / "run").exists()
    assert said == ["rank 1 on node1 cannot join: lr is 0.1 on rank 0 and 0.5 here"] * 2
    said = pool(2, begin, [str(tmp_path)] * 2, [same, same], {1: {"micro_tokens": 8192}})
    wanted = "rank 1 on node1 cannot join: micro_tokens is 4096 on rank 0 and 8192 here"
    assert said == [wanted] * 2  # the resume may change it, but no machine alone: all would wait


def save_on_two(world, folders: list[str]) -> str:
    checkpoint.CACHED = 0.3
    model, optimizer = trained(world)
    folder = Path(folders[world.rank])
    (folder / "step-000003.unfinished").mkdir(exist_ok=True)
    try:
        return str(saves.save(folder, model, optimizer, {"step": 3}))
    except SaveFailed as error:
        return str(error)


def test_a_checkpoint_is_complete_when_every_file_is_seen(pool, tmp_path):
    """Each machine has its own shard on a disk of its own, with the hash that rank 0 is told."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    said = pool(2, save_on_two, [str(folder) for folder in folders])
    assert all("__1_0.distcp, which another rank has written, is not seen" in s for s in said)
    assert checkpoint.steps(folders[0]) == [] and not (folders[0] / "latest").exists()
    assert pool(2, save_on_two, [str(folders[0])] * 2) == [str(folders[0] / "step-000003")] * 2


# ---------------------------------------------------------------- disks


def test_a_disk_without_links_is_met_before_the_first_step(world, tmp_path, monkeypatch):
    """Not at the first save, whose checkpoint would be whole and be called not saved."""

    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(
        InputError, match=f"{tmp_path}/run cannot hold symbolic links .*another disk"
    ):
        RunFolder(SFT(out=str(tmp_path / "run")), world)


def test_a_disk_that_cannot_flush_a_folder_is_used(tmp_path, monkeypatch):
    def refuse(number: int):
        def fsync(_):
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    checkpoint.fsync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid"):
        checkpoint.fsync(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input"):
        checkpoint.fsync(tmp_path)
