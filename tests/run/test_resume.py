"""--resume: what it finds, what it refuses, and how a group restarted by torchrun goes on."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest

from nanomed.config import SFT, InputError
from nanomed.run import saves
from nanomed.run.log import RunFolder
from tests.run.test_checkpoint import trained

RUN = {"lr": 0.01, "model's d_model": 128, "tokenizer": "abc", "content of the data": "d" * 64}


def begun(world, folder: Path) -> RunFolder:
    """A run with a checkpoint, closed."""
    run = RunFolder(SFT(out=str(folder)), world, RUN)
    model, optimizer = trained(world)
    state = {"step": 3, "identity": run.identity}
    saves.save(run.checkpoints, model, optimizer, state)
    for step in (1, 2, 3, 4):
        run.metrics(step=step, loss=1.0)
    run.close()
    return run


@pytest.mark.parametrize("name", RUN)
def test_another_run_is_refused_with_the_difference(world, tmp_path, name):
    begun(world, tmp_path / "x")
    before = {p: p.read_bytes() for p in (tmp_path / "x").glob("*.json*")}
    other = {**RUN, name: "another"}
    for resume in ("latest", "auto", str(tmp_path / "x")):
        with pytest.raises(InputError, match=f"{name} was {str(RUN[name])[:12]}.*, is another"):
            RunFolder(SFT(out=str(tmp_path / "x"), resume=resume), world, other)
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").glob("*.json*")}


def test_resume_finds_the_newest_and_cuts_the_metrics_back(world, tmp_path):
    begun(world, tmp_path / "x")
    (tmp_path / "x/checkpoints/step-000009.unfinished").mkdir()
    with open(tmp_path / "x/metrics.jsonl", "ab") as file:
        file.write('{"step": 4, "loss/药'.encode()[:-1])  # a full disk
    run = RunFolder(SFT(out=str(tmp_path / "x"), resume="latest"), world, RUN)
    assert run.resume_from.name == "step-000003"
    lines = (tmp_path / "x/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    run.close()


def test_on_a_full_disk_the_run_folder_stays_as_it_was(world, tmp_path):
    """The limit on a file's size stands for the disk."""
    begun(world, tmp_path / "x")
    before = {p: p.read_bytes() for p in (tmp_path / "x").glob("*.json*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write to"):
            RunFolder(SFT(out=str(tmp_path / "x"), resume="latest"), world, RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").glob("*.json*")}


def test_auto_starts_or_goes_on(world, tmp_path):
    run = RunFolder(SFT(out=str(tmp_path / "x"), resume="auto"), world, RUN)
    assert run.resume_from is None
    run.close()
    begun(world, tmp_path / "y")
    run = RunFolder(SFT(out=str(tmp_path / "y"), resume="auto"), world, RUN)
    assert run.resume_from.name == "step-000003"
    run.close()
    with pytest.raises(InputError, match="holds no checkpoint"):
        RunFolder(SFT(out=str(tmp_path / "x"), resume="latest"), world, RUN)


def test_a_group_restarted_by_torchrun_goes_on_in_its_own_folder(world, tmp_path, monkeypatch):
    """Although another run has started since, and without --resume; whichever machine's
    torchrun counts the restart. A launch that died before it had a folder starts its own, though
    torchrun gives all the same id ("none")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    of = lambda launch, attempt: dataclasses.replace(world, launch=(launch, attempt))  # noqa: E731
    mine = begun(of("mine", "1"), Path("runs/sft-001"))
    theirs = RunFolder(SFT(), of("theirs", "1"), RUN)
    assert theirs.path.name == "sft-002"
    theirs.close()
    again = RunFolder(SFT(), of("mine", "2"), RUN)
    assert again.path == mine.path and again.resume_from.name == "step-000003"
    again.close()
    again = RunFolder(SFT(), of("theirs", "2"), RUN)  # which had not saved yet
    assert again.path == theirs.path and again.resume_from is None
    again.close()
    other = RunFolder(SFT(), of("died at once", "2"), RUN)
    assert other.path.name == "sft-003" and other.resume_from is None
    other.close()
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder(SFT(out=str(mine.path)), of("another", "1"), RUN)
    second = RunFolder(SFT(), of("mine", "2"), RUN)  # of one process, and no restart
    assert second.path.name == "sft-004"
    second.close()


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_step(world):
    with pytest.raises(InputError, match="cannot write to /sys/"):
        RunFolder(SFT(out="/sys/nanomed"), world, RUN)
