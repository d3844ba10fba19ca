"""Checkpoints that are whole or not there: damage found and named, full disks survived, nothing
from outside run, nothing of another run continued."""

import errno
import io
import json
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nanomed.config import InputError
from nanomed.distributed import from_all, local
from nanomed.run import checkpoint, saves, untrusted
from nanomed.run.saves import SaveFailed
from nanomed.training.optim import adamw
from tests.killed import build


def trained(world):
    """A model whose optimizer has moments to save."""
    model = build(world)
    optimizer = adamw(model, 0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def parts(model) -> list[torch.Tensor]:
    return [local(param.detach()).clone() for param in model.parameters()]


# ---------------------------------------------------------------- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "has changed since it was written": flip,
    "bytes instead of": lambda path: os.truncate(path, path.stat().st_size - 1),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("problem", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json"])
def test_damage_is_found_and_named(world, tmp_path, name, problem):
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    DAMAGE[problem](saved / name)
    before = parts(model)
    with pytest.raises(InputError, match=f"{name} .*{problem}.*Delete .*step-000003 to go on"):
        checkpoint.load(saved, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, parts(model), strict=True))


def flipped_on_two(world, folder: str) -> str:
    model, optimizer = trained(world)
    saved = saves.save(Path(folder), model, optimizer, {"step": 3})
    if world.is_main:
        flip(saved / "__1_0.distcp")
    torch.distributed.barrier()
    try:
        checkpoint.load(saved, model, optimizer)
        return "loaded"
    except InputError as error:
        return str(error)


def test_every_rank_hears_of_a_damaged_shard(pool, tmp_path):
    messages = pool(2, flipped_on_two, str(tmp_path))
    assert all("__1_0.distcp has changed" in message for message in messages)


def test_a_folder_without_a_manifest_is_no_checkpoint(world, tmp_path):
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    (saved / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        checkpoint.load(saved, model, optimizer)


# ---------------------------------------------------------------- files from outside


class Payload:
    """Unpickled by plain pickle, it makes the folder that it was given."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def rewritten(saved: Path, name: str, content: bytes) -> None:
    """As somebody would who can compute a hash too."""
    (saved / name).write_bytes(content)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = checkpoint.described(saved / name)
    (saved / "manifest.json").write_text(json.dumps(manifest))


def test_a_payload_in_the_metadata_is_not_run(world, tmp_path):
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    content = pickle.dumps(Payload(tmp_path / "ran"))
    rewritten(saved, ".metadata", content)
    with pytest.raises(InputError, match=r"it asks for posix[.]mkdir"):
        checkpoint.load(saved, model, optimizer)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # and it would have run
    assert (tmp_path / "ran").exists()


def test_a_payload_in_the_place_of_a_tensor_is_not_run(world, tmp_path):
    """What is no tensor is pickled inside a shard, and DCP's own planner reads it with
    weights_only=False."""
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    planted = {"model": {"norm.weight": Payload(tmp_path / "ran")}}
    dcp.save(planted, checkpoint_id=tmp_path / "planted")
    for path in (tmp_path / "planted").iterdir():
        rewritten(saved, path.name, path.read_bytes())
    with pytest.raises(InputError, match=r"model\.norm\.weight is no tensor there"):
        checkpoint._read({"model": {"norm.weight": model.norm.weight}}, saved)
    assert not (tmp_path / "ran").exists()
    dcp.load(planted, checkpoint_id=saved)  # and it would have run
    assert (tmp_path / "ran").exists()


def test_rates_and_decay_are_the_settings_and_moments_the_checkpoints(world, tmp_path):
    """A checkpoint of before lr_scale is read; one with another decay does not bring it along."""
    model, optimizer = trained(world)
    for group in optimizer.param_groups:
        del group["lr_scale"]
        group["weight_decay"] = 0.7
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    model = build(world)
    other = adamw(model, 0.1)
    checkpoint.load(saved, model, other)
    assert [g["weight_decay"] for g in other.param_groups] == [0.1, 0.0]
    assert [g["lr_scale"] for g in other.param_groups] == [1.0, 1.0]
    moments = [[local(s["exp_avg"]) for s in o.state.values()] for o in (optimizer, other)]
    assert all(a.any() and torch.equal(a, b) for a, b in zip(*moments, strict=True))


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "a/b", ".."])
def test_no_path_leaves_the_folder(world, tmp_path, name):
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    metadata = untrusted.read_metadata(saved / ".metadata")
    for info in metadata.storage_data.values():
        info.relative_path = name
    rewritten(saved, ".metadata", pickle.dumps(metadata))
    with pytest.raises(InputError, match=r"points to .* not in manifest"):
        checkpoint.load(saved, model, optimizer)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["__0_0.distcp"]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="files must be names in its folder"):
        checkpoint.load(saved, model, optimizer)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "[]", '{"files": []}', "\x00"])
def test_a_broken_manifest_is_named(world, tmp_path, content):
    model, optimizer = trained(world)
    saved = saves.save(tmp_path, model, optimizer, {"step": 3})
    (saved / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        checkpoint.load(saved, model, optimizer)


# ---------------------------------------------------------------- a disk that refuses


class Disk:
    """While it is open, files opened for writing below a folder share `room` bytes; what does not
    fit raises ENOSPC after the part that does, as a full disk."""

    def __init__(self, folder: Path, room: float, error: int = errno.ENOSPC):
        self.folder, self.room, self.error, self.written = str(folder), room, error, 0

    def __enter__(self):
        Path.open = lambda path, mode="r", *a, **k: self.open(path, mode, *a, **k)
        return self

    def __exit__(self, *_):
        Path.open = _PATH_OPEN

    def open(self, path, mode, *arguments, **named):
        if "w" not in mode or not str(path).startswith(self.folder):
            return _PATH_OPEN(path, mode, *arguments, **named)
        raw = io.BufferedWriter(_Limited(self, path), 1024)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")


_PATH_OPEN = Path.open


class _Limited(io.FileIO):
    def __init__(self, disk: Disk, path: Path):
        super().__init__(path, "w")
        self.disk = disk

    def write(self, content) -> int:
        fits = int(min(len(content), self.disk.room - self.disk.written))
        self.disk.written += super().write(memoryview(content)[:fits])
        if fits < len(content):
            raise OSError(self.disk.error, os.strerror(self.disk.error))
        return fits


def saves_on_a_full_disk(world, folder: str, n: int, error: int) -> list[str]:
    """A good save; its bytes; then n saves, each on a disk that is full at a random place for a
    random rank, each followed by a look at what is left."""
    path = Path(folder)
    model, optimizer = trained(world)
    with Disk(path, float("inf")) as disk:
        saves.save(path, model, optimizer, {"step": 1})
    wanted, problems = parts(model), []
    sizes = from_all(disk.written)
    rng = random.Random(n)
    for trial in range(n):
        victim, share = trial % world.size, rng.random()
        room = share * sizes[victim] if world.rank == victim else float("inf")
        for param in model.parameters():  # so that nothing equal could be saved
            param.data.add_(1.0)
        try:
            with Disk(path, room, error):
                saves.save(path, model, optimizer, {"step": 2 + trial})
            problems.append(f"{share:.3f} of rank {victim}: nobody noticed")
        except SaveFailed as failed:
            if f"rank {victim}" not in str(failed) or "GB free" not in str(failed):
                problems.append(f"{share:.3f} of rank {victim}: {failed}")
        torch.distributed.barrier()
        if sorted(p.name for p in path.iterdir()) != ["latest", "step-000001"]:
            problems.append(f"{share:.3f} of rank {victim}: {list(path.iterdir())}")
        checkpoint.load(path / "latest", model, optimizer)
        if not all(map(torch.equal, wanted, parts(model))):
            problems.append(f"{share:.3f} of rank {victim}: other weights")
    saves.save(path, model, optimizer, {"step": 99})  # there is room again
    return problems


@pytest.mark.parametrize("n_ranks, n", [(1, 10), (2, 12)])
def test_a_full_disk_leaves_the_last_checkpoint(pool, tmp_path, n_ranks, n):
    """ENOSPC at random offsets of a save, in shards, metadata and manifest."""
    for problems in pool(n_ranks, saves_on_a_full_disk, str(tmp_path), n, errno.ENOSPC):
        assert problems == []
    assert checkpoint.newest(tmp_path).name == "step-000099"


def test_a_disk_that_became_read_only(pool, tmp_path):
    assert pool(1, saves_on_a_full_disk, str(tmp_path), 2, errno.EROFS) == [[]]


def test_space_is_checked_before_the_run_and_before_a_save(world, tmp_path, monkeypatch):
    model, optimizer = trained(world)
    size = checkpoint.size_of(model)
    saved = saves.save(tmp_path, model, optimizer, {"step": 1})
    real = sum(path.stat().st_size for path in saved.iterdir())
    assert size < real < 1.3 * size  # the estimate; this model is mostly names and headers
    usage = lambda free: lambda _: type("usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage(3 * size - real))
    checkpoint.check_space(tmp_path, model, 3)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage(3 * size - real - 1))
    with pytest.raises(InputError, match=r"3 checkpoints need .* GB"):
        checkpoint.check_space(tmp_path, model, 3)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage(size - 1))
    with pytest.raises(SaveFailed, match="GB needed"):
        saves.save(tmp_path, model, optimizer, {"step": 2})
    assert checkpoint.newest(tmp_path) == saved


def save_with_one_bad_weight(world, folder: str) -> str:
    model, optimizer = trained(world)
    if world.rank == 1:
        local(next(model.layers[-1].parameters())).detach()[0] = float("nan")
    try:
        saves.save(Path(folder), model, optimizer, {"step": 1})
        return "saved"
    except SaveFailed as error:
        return str(error)


def test_weights_that_are_not_finite_are_never_saved(pool, tmp_path):
    for message in pool(2, save_with_one_bad_weight, str(tmp_path)):
        assert "rank 1: layers.0." in message and "not finite" in message
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- which ones are kept


def test_the_newest_and_the_best_are_kept(world, tmp_path):
    model, optimizer = trained(world)
    losses = {1: 3.0, 2: 1.0, 3: 1.0, 999_999: 2.0, 1_000_000: 2.0, 1_000_001: 2.0}
    for step, loss in losses.items():
        saved = saves.save(tmp_path, model, optimizer, {"step": step})
        checkpoint.mark_validated(saved, loss)
        checkpoint.keep(tmp_path, 2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == [
        "step-000002",
        "step-1000000",
        "step-1000001",
    ]
    assert (tmp_path / "best").resolve().name == "step-000002"  # the first of the lowest
    assert checkpoint.newest(tmp_path) == (tmp_path / "latest").resolve()
