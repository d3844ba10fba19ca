"""paper.sh: its real commands, going on where it was stopped, what it measures and expects."""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import build_corpus
import build_dpo
import build_sft
from nanomed import arguments, store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import CPT, DPO, ROOT, SFT, InputError
from nanomed.model.decoder import Aquila, init_weights
from nanomed.tools import paper
from tests.killed import SMALL

STAGES = {"train_cpt.py": CPT, "train_sft.py": SFT, "train_dpo.py": DPO}
BUILDS = {
    "build_corpus.py": build_corpus.Corpus,
    "build_sft.py": build_sft.Chats,
    "build_dpo.py": build_dpo.Pairs,
}


def paper_sh(*flags: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "paper.sh"), *flags],
        env=os.environ | env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# ---------------------------------------------------------------- the script


def test_the_real_commands_are_printed_and_none_is_run(tmp_path):
    out = tmp_path / "out"
    printed = paper_sh("--gpus", "8", "--scale", "7b", "--out", str(out))
    assert printed.returncode == 0, printed.stderr
    assert not out.exists()
    commands = [shlex.split(x) for x in printed.stdout.splitlines() if x and x[0] != "#"]
    trained = {}
    for command in commands:
        script = next((word for word in command if word in STAGES | BUILDS), None)
        flags = command[command.index(script) + 1 :] if script else []
        if script in STAGES:
            assert command[:4] == ["torchrun", "--standalone", "--nproc_per_node", "8"]
            c = arguments.parse(STAGES[script], flags)
            trained[Path(c.out).name] = c
        elif script:
            arguments.parse(BUILDS[script], flags, base={})
        else:
            assert "evaluate.py" in command or command[:2] == ["python", "-m"]
    assert list(trained) == ["cpt1", "cpt2", "sft", "dpo"]
    assert [c.lr for c in trained.values()] == [1e-4, 1e-5, 2e-6, 2e-7]  # the paper's
    starts = [c.init for c in trained.values()]
    assert starts == ["models/aquila", *(f"{out}/{name}" for name in ("cpt1", "cpt2", "sft"))]


@pytest.mark.parametrize("flags", [("--gpu", "8"), ("--out",), ("--scale", "8b")])
def test_unknown_flags_end_it_before_anything_starts(flags):
    ended = paper_sh(*flags)
    assert ended.returncode == 2 and "error:" in ended.stderr and not ended.stdout


def test_it_goes_on_where_it_was_stopped(tmp_path):
    """With commands that write down what they were asked; one of them fails the first time."""
    log, failed = tmp_path / "log", tmp_path / "failed"
    fake = f"""#!/bin/sh
echo "$(basename "$0") $*" >> {log}
case "$*" in *train_sft.py*) [ -e {failed} ] || {{ touch {failed}; exit 3; }};; esac
"""
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(fake)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    first = paper_sh("--out", str(tmp_path / "out"), PATH=path)
    assert first.returncode == 3
    done = log.read_text().splitlines()
    assert "train_sft.py" in done[-1]
    log.unlink()
    assert paper_sh("--out", str(tmp_path / "out"), PATH=path).returncode == 0
    rest = log.read_text().splitlines()
    assert "train_sft.py" in rest[0] and not {*done[:-1]} & {*rest}
    assert "nanomed.tools.paper table" in "\n".join(rest)


@pytest.mark.slow
def test_the_whole_paper_gives_what_is_expected(tmp_path):
    """Its last lines hold the numbers to what the script expects."""
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "paper.sh"), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=5400)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert results["not_as_expected"] == [], ended.stdout[-3000:]
    assert list(results["stages"]) == ["base", "cpt1", "cpt2", "sft-unselected", "sft", "dpo"]
    assert (out / "report.html").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "===" not in again.stdout  # nothing is done twice


# ---------------------------------------------------------------- what is measured


@pytest.fixture
def model(encoder) -> Aquila:
    model = Aquila(dataclasses.replace(SMALL, vocab_size=encoder.tokenizer.vocab_size))
    init_weights(model)
    return model.eval()


def test_bits_per_byte_of_whole_texts(model, encoder, monkeypatch, tmp_path):
    texts = ["霍乱弧菌感染。", "Cholera is an infection."]
    lines = [{"text": text, "quality": "good"} for text in texts]
    lines.append({"text": "BUY NOW", "quality": "advertising"})
    (tmp_path / "cpt_x.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setattr(paper, "SAMPLES", tmp_path)
    monkeypatch.setattr(paper, "ROW", 12)
    bits, n_bytes = 0.0, 0
    for text in texts:
        ids = [*encoder.tokenizer.encode(text), encoder.document_end]
        row = row_from([ids])
        with torch.no_grad():
            chances = model(row, logits=True).log_softmax(-1)
        bits -= sum(chances[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / math.log(2)
        n_bytes += len(encoder.tokenizer.decode(ids[1:-1]).encode())
    found = paper.bits_per_byte(model, encoder, "x")
    assert found["of"] == 2 and found["value"] == pytest.approx(bits / n_bytes, rel=1e-4)


@pytest.mark.parametrize("name", paper.PAIRS)
def test_pairs_are_those_that_training_holds_out(name, model, encoder, monkeypatch):
    monkeypatch.setattr(paper, "ROW", 300)
    c = DPO(data=[str(paper.PAIRS[name])], seq_len=512, val_fraction=paper.HELD_OUT)
    data = store.pairs(c.data, encoder, c.seq_len, 0.0)
    kinds, expected = [data.meta["kinds"][k] for k in data.kinds], 0
    held_out = [i for i in Loader(c, data).val.tolist() if kinds[i] == "subjective"]
    for i in held_out:
        rows = [row_from([side.ids.tolist()], [side.trained.tolist()]) for side in data[i]]
        with torch.no_grad():
            chosen, rejected = (model(row).nll.sum().item() for row in rows)
        expected += chosen < rejected
    found = paper.preferred(model, encoder, paper.PAIRS[name])
    assert found["of"] == len(held_out) > 20
    assert abs(found["right"] - expected) <= 1  # a tie may be rounded


# ---------------------------------------------------------------- what is expected


NUMBERS = {
    "base": {"medical": {"value": 2.0, "of": 9}, "option_texts": {"right": 3, "of": 12}},
    "sft": {"medical": {"value": 1.0, "of": 9}, "option_texts": {"right": 9, "of": 12}},
}


@pytest.mark.parametrize(
    "expected, wrong",
    [
        ("sft medical 1.1 0.2\nsft medical below base # less", ""),
        ("sft medical 1.3 0.2", "sft: medical is 1.000, expected 1.3 give or take 0.2"),
        ("base option_texts above sft", "base: option_texts is 0.250, not above sft's 0.750"),
        ("sft option_texts 0.75 0", ""),
    ],
)
def test_a_deviation_is_said(expected, wrong):
    found, checked = paper.deviations(NUMBERS, expected)
    assert found == ([wrong] if wrong else []) and checked == len(expected.splitlines())


def test_what_the_script_expects_can_be_checked():
    """Every line names a stage that the script measures, and a number of the table."""
    script = (ROOT / "paper.sh").read_text(encoding="utf-8")
    lines = re.search(r"<<'EXPECTED'\n(.*)EXPECTED", script, re.DOTALL)[1].splitlines()
    stages = re.findall(r"^measured ([\w-]+)", script, re.MULTILINE)
    numbers = {name: {"right": 1, "of": 2} for name in paper.COLUMNS}
    _, checked = paper.deviations(dict.fromkeys(stages, numbers), "\n".join(lines))
    assert checked == len(lines) > 2


def test_a_folder_without_measurements(tmp_path):
    with pytest.raises(InputError, match="no measured run"):
        paper.read_stages(tmp_path)
