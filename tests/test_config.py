import dataclasses

import pytest

from nanomed.arguments import parse
from nanomed.config import CPT, DPO, SFT, InputError
from nanomed.stages import stage
from tests.conftest import ROOT


def test_without_arguments_the_demonstration():
    c = parse(SFT, [])
    assert {name: getattr(c, name) for name in SFT.FRESH} == SFT.FRESH
    assert c.dropout == 0.0


def test_with_weights_the_recipe():
    c = parse(SFT, ["--init", "folder"])
    assert (c.lr, c.batch_size, c.seq_len, c.epochs) == (2e-6, 128, 2048, 2)
    assert (c.dropout, c.weight_decay, c.val_fraction) == (0.0, 0.1, 0.1)


def test_file_then_flags(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('lr = 1\nbatch_size = 7\ndata = ["a", "b"]\n')
    c = parse(SFT, ["--config", str(path), "--batch_size", "9"])
    assert (c.lr, c.batch_size, c.data) == (1.0, 9, ["a", "b"])
    assert c.epochs == 2  # the recipe's, not the demonstration's
    c = parse(SFT, ["--config", str(path), "--data", "c", "d", "--data", "e"])
    assert c.data == ["c", "d", "e"]  # no file is left unread


@pytest.mark.parametrize(
    "flags, resume", [([], ""), (["--resume"], "latest"), (["--resume", "auto"], "auto")]
)
def test_resume_with_and_without_a_value(flags, resume):
    assert parse(SFT, flags).resume == resume
    assert parse(SFT, ["--resume", "runs/a", "--out", "./runs/a/"]).out == "./runs/a/"  # the same


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_sise", "8"], "'--batch_sise'; did you mean --batch_size"),
        (["--batch", "8"], "unknown argument '--batch'"),
        (["--lr", "abc"], "--lr: invalid float value: 'abc'"),
        (["--lr"], "--lr: expected one argument"),
        (["--lr", "0"], "--lr is 0.0; it must be above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--lr", "inf"], "--lr is inf; it must be a finite number"),
        (["--seed", "-1"], "--seed is -1; it must be 0 or more"),
        (["--resume", "a", "--out", "b"], "--resume is a; it must be without a folder"),
        (
            ["--seq_len", "512", "--micro_tokens", "511"],
            "--micro_tokens is 511; it must be at least",
        ),
        (["--model", "aquilmed-7b"], "did you mean aquilamed-7b"),
        (["--dropout", "1"], "--dropout"),
        (["--val_fraction", "1"], "--val_fraction"),
        (["--epochs", "0"], "--epochs"),
        (["--config", "none.toml"], "none.toml: .*No such file"),
        (["--data", "a\udcb2.jsonl"], r"argument --data: .*udcb2.* is no UTF-8; rename the file"),
    ],
)
def test_errors(flags, message):
    with pytest.raises(InputError, match=message):
        parse(SFT, flags)


@pytest.mark.parametrize(
    "text, message",
    [
        ("batch_sise = 8", "unknown setting 'batch_sise'; did you mean batch_size"),
        ('lr = "x"', "lr = 'x' must be float"),
        ("epochs = 1.5", "epochs = 1.5 must be int"),
        ("lr =", "Invalid value"),
    ],
)
def test_errors_in_a_file(tmp_path, text, message):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse(SFT, ["--config", str(path)])


UNITS = (
    "tokens", "examples", "steps", "share", "passes", "checkpoints", "number", "learning rate",
    "gradient norm", "nat",
)  # fmt: skip


@pytest.mark.parametrize("cls", [CPT, SFT, DPO])
def test_help_names_every_flag_with_unit_default_and_the_papers_value(cls, capsys):
    with pytest.raises(SystemExit):
        parse(cls, ["--help"])
    text = capsys.readouterr().out.split("options:")[1]
    entries = {e.split()[0]: " ".join(e.split()) for e in text.split("\n  --")[1:]}
    assert list(entries) == [f.name for f in dataclasses.fields(cls)]
    for f in dataclasses.fields(cls):
        entry = entries[f.name]
        shown = f.default if f.type in (int, float) else ""
        assert f"default {shown}" in entry or "default:" in entry, entry
        if f.type in (int, float):
            assert any(unit in entry for unit in UNITS), entry
        assert ("the paper:" in entry) == bool(f.metadata["paper"])
    paper = "1e-4 (CPT stage 1), 1e-5 (CPT stage 2), 2e-6 (SFT), 2e-7 (DPO)"
    assert entries["lr"].endswith(f"the paper: {paper}")
    assert entries["warmup_ratio"].endswith("0.01 (CPT stage 2), unpublished (SFT, DPO)")


@pytest.mark.parametrize("cls", [CPT, SFT, DPO])
def test_every_stage_has_a_demonstration(cls):
    c = parse(cls, [])
    assert {name: getattr(c, name) for name in cls.FRESH} == cls.FRESH
    assert all((ROOT / path).exists() for path in c.data)


def test_what_the_project_brings_is_found_from_any_folder(tmp_path, monkeypatch, encoder):
    """And nothing else is looked for there; what stands here under that name goes first."""
    monkeypatch.chdir(tmp_path)
    assert parse(SFT, ["--config", "configs/sft.toml"]).batch_size == 128
    c = parse(SFT, ["--tokenizer", "samples/tokenizer.model"])
    assert c.data == [str(ROOT / "samples/sft.jsonl")]
    assert c.tokenizer == str(ROOT / "samples/tokenizer.model") and stage.may_show_text(c)
    assert parse(CPT, ["--data", "samples/x.jsonl:0.5"]).data == [str(ROOT / "samples/x.jsonl:0.5")]
    assert parse(SFT, ["--data", "docs/x", "--tokenizer", "t"]).data == ["docs/x"]
    _, found = stage.model_and_encoder(SFT())
    assert found.tokenizer.fingerprint() == encoder.tokenizer.fingerprint()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/sft.jsonl").touch()
    own = parse(SFT, [])
    assert own.data == ["samples/sft.jsonl"] and not stage.may_show_text(own)
    monkeypatch.chdir(ROOT)
    assert parse(SFT, []).data == ["samples/sft.jsonl"] and stage.may_show_text(parse(SFT, []))


def test_a_file_may_be_learned_and_held_out_too_but_each_once():
    """Whoever looks whether a model learns anything at all validates on what it learns."""
    assert parse(SFT, ["--data", "a", "b", "--val_data", "a"]).val_data == ["a"]
    for given in (["--data", "a", "./a"], ["--data", "a", "--val_data", "b", "b"]):
        with pytest.raises(InputError, match="given twice"):
            parse(SFT, given)
