import dataclasses

import pytest

from nanomed.config import SFT, InputError, parse


def test_without_arguments_the_demonstration():
    c = parse(SFT, [])
    assert {name: getattr(c, name) for name in SFT.FRESH} == SFT.FRESH
    assert c.dropout == 0.0


def test_with_weights_the_recipe():
    c = parse(SFT, ["--init", "folder"])
    assert (c.lr, c.batch_size, c.seq_len, c.epochs) == (2e-6, 128, 2048, 2)
    assert (c.dropout, c.weight_decay, c.val_fraction) == (0.1, 0.1, 0.1)


def test_file_then_flags(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('lr = 1\nbatch_size = 7\ndata = ["a", "b"]\n')
    c = parse(SFT, ["--config", str(path), "--batch_size", "9"])
    assert (c.lr, c.batch_size, c.data) == (1.0, 9, ["a", "b"])
    assert c.epochs == 2  # the recipe's, not the demonstration's


@pytest.mark.parametrize(
    "flags, resume", [([], ""), (["--resume"], "latest"), (["--resume", "auto"], "auto")]
)
def test_resume_with_and_without_a_value(flags, resume):
    assert parse(SFT, flags).resume == resume


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_sise", "8"], "'--batch_sise'; did you mean --batch_size"),
        (["--batch", "8"], "unknown argument '--batch'"),
        (["--lr", "abc"], "--lr: invalid float value: 'abc'"),
        (["--lr"], "--lr: expected one argument"),
        (["--lr", "0"], "--lr is 0.0; it must be above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (
            ["--seq_len", "512", "--micro_tokens", "511"],
            "--micro_tokens is 511; it must be at least",
        ),
        (["--model", "aquilmed-7b"], "did you mean aquilamed-7b"),
        (["--dropout", "1"], "--dropout"),
        (["--val_fraction", "1"], "--val_fraction"),
        (["--epochs", "0"], "--epochs"),
        (["--config", "none.toml"], "none.toml: .*No such file"),
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


def test_help_names_every_flag_with_default_and_the_papers_value(capsys):
    with pytest.raises(SystemExit):
        parse(SFT, ["--help"])
    text = capsys.readouterr().out
    for name in (f.name for f in dataclasses.fields(SFT)):
        assert f"--{name}" in text
    assert "peak learning rate" in text and "the paper: 2e-6 (SFT)" in text
