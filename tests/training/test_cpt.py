"""train_cpt.py as a user meets it, and what may not change it: processes, a resume, the rows."""

import json
import shlex
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_cpt
from nanomed import arguments, store
from nanomed.batches import slices
from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import CPT, InputError
from nanomed.distributed import full
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.run.log import RunFolder
from nanomed.stages import stage
from nanomed.text import template
from nanomed.tools import replay
from nanomed.training import faults
from nanomed.training.trainer import fit
from tests.batches.test_slices import WEIGHTS, loaders
from tests.conftest import ROOT
from tests.documents import random_documents, slices_of
from tests.training.test_exactness import metrics_of, sharded
from tests.training.test_faults import _Joined
from tests.training.test_train import write

SMALL = "--steps 2 --batch_size 4 --seq_len 64 --lr 1e-3 --warmup_ratio 0 --val_fraction 0.02"


def run_script(flags: str, world, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_cpt.py", *shlex.split(flags)])
        patch.setattr(train_cpt, "start", lambda _: _Joined(world))
        train_cpt.main()


# ---------------------------------------------------------------- the demonstration


def test_stage_1_and_the_command_that_it_prints(world, monkeypatch, tmp_path, capsys):
    """Stage 2 starts from stage 1's weights with a fresh optimizer, on a mixture with chats."""
    run_script(f"{SMALL} --out {tmp_path / 'one'}", world, monkeypatch)
    printed = capsys.readouterr().out
    for part in (
        "--config configs/cpt_stage1.toml",
        " documents to train on, ",
        "val_bits_per_byte/cpt_medical",
        "val_bits_per_byte/cpt_general",
    ):
        assert part in printed
    (command,) = [s for s in printed.splitlines() if s.startswith("stage 2: python train_cpt.py ")]
    flags = command.removeprefix("stage 2: python train_cpt.py ")
    last = metrics_of(tmp_path / "one")[-1]
    c = arguments.parse(CPT, shlex.split(flags))
    data = slices.read(c, stage.model_and_encoder(c)[1])  # it can be run as it stands
    assert Loader(c, data, parts=(data.train, data.val), mixture=data.mixture).n_steps == 60

    run_script(f"{flags} {SMALL} --out {tmp_path / 'two'}", world, monkeypatch)
    printed = capsys.readouterr().out
    assert "50.0% of the draws" in printed and "stage 2: " not in printed
    assert "x chat rendered by the template" in printed
    other = f"{flags} {SMALL} --out {tmp_path / 'two'} --resume".replace("jsonl:0.2", "jsonl:0.4")
    with pytest.raises(InputError, match=r"weights of the data was \[5, 3, 2\], is \[5, 3, 4\]"):
        run_script(other, world, monkeypatch)
    first, *_, end = metrics_of(tmp_path / "two")
    for name in ("cpt_medical", "cpt_general"):  # the same documents are held out
        name = f"val_bits_per_byte/{name}"
        assert first[name] == pytest.approx(last[name], rel=1e-5) and end[name] != first[name]
    told = json.loads((tmp_path / "two/data_report.json").read_text())["sources"]
    assert told["sft"]["weight"] == 0.3 and told["sft"]["seen"] == pytest.approx(
        2 / told["sft"]["train"]["slices"], rel=0.51
    )


def test_who_sees_the_text_of_own_data_is_not_sent_to_the_samples():
    run = SimpleNamespace(world=SimpleNamespace(size=8), path="runs/cpt-001")
    own = stage.second_stage(CPT(data=["mine.jsonl"], show_text=True), run)
    assert own == (
        "torchrun --nproc_per_node 8 train_cpt.py --config configs/cpt_stage2.toml --data FILES "
        "--init runs/cpt-001"
    )


@pytest.mark.slow
def test_stage_2_as_printed(world, monkeypatch, tmp_path, capsys):
    run_script(f"{SMALL} --out {tmp_path / 'one'}", world, monkeypatch)
    command = capsys.readouterr().out.split("stage 2: python train_cpt.py ")[1]
    run_script(f"{command.strip()} --out {tmp_path / 'two'}", world, monkeypatch)
    first, *_, end = metrics_of(tmp_path / "two")
    assert end["val_loss"] < first["val_loss"]


# ---------------------------------------------------------------- refused before the first step


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--data samples/cpt_medical.jsonl:0", "the weight after the colon must be above 0"),
        (
            "--data samples/cpt_medical.jsonl:1 samples/cpt_general.jsonl",
            "samples/cpt_general.jsonl has no weight",
        ),
        (
            "--data samples/cpt_medical.jsonl:1 samples/cpt_general.jsonl:1 --steps 999",
            "cpt_general runs out in step .* of 999.*--repeat",
        ),
        ("--data none.jsonl:1", "none.jsonl: No such file"),
        ("--data samples", "samples is not a finished store"),
        ("--data STORE", "STORE was tokenised with another tokenizer"),
        ("--data ONE", "leaves no document of .*ONE to train on|holds out no document"),
        ("--data ONE ONE", "ONE is given twice"),
        ("--data CHOICE", "record 1: .*unknown fields; found 'foo'"),
        ("--seq_len 8192 --micro_tokens 8192", "over the model's maximum 4096"),
    ],
)
def test_bad_input_is_met_before_the_first_step(
    world, monkeypatch, tmp_path, encoder, flags, message
):
    write(tmp_path / "ONE", {"text": "one document"})
    write(tmp_path / "CHOICE", {"foo": 1})
    monkeypatch.chdir(ROOT)
    if "STORE" in flags:
        tok = type("Other", (), {"fingerprint": lambda self: "another"})()
        tok.__dict__.update(vars(encoder.tokenizer), encode=encoder.tokenizer.encode)
        other = template.Encoder(encoder.template, tok)
        store.build(tmp_path / "STORE", ["samples/cpt_general.jsonl"], other)
    for name in ("ONE", "CHOICE", "STORE"):
        flags = flags.replace(name, str(tmp_path / name))
    monkeypatch.setattr(train_cpt, "fit", lambda *_: pytest.fail("a step was reached"))
    with pytest.raises(InputError, match=message):
        run_script(f"--out {tmp_path / 'run'} {flags}", world, monkeypatch)


def test_a_dry_run_says_what_the_run_would_take(world, monkeypatch, capsys):
    paper = "--config configs/cpt_stage1.toml --model aquilamed-7b"
    run_script(f"--dry_run {paper}", world, monkeypatch)
    assert "steps: 19,055 of 768 examples" in capsys.readouterr().out
    files = "--val_data samples/cpt_general.jsonl --data samples/sft.jsonl"
    run_script(f"--dry_run {SMALL} {files}", world, monkeypatch)
    assert "steps: 2 of 4 examples" in capsys.readouterr().out


# ---------------------------------------------------------------- exactness


def train(world, model_config, out, weighted: bool, stops_at=0, dropout=0.0, **changes):
    """12 steps on two sources, validated every sixth; `stops_at` ends it after that step's save."""
    saves = {"save_every": 4} | changes
    c = CPT(
        lr=1e-3, batch_size=8, seq_len=64, micro_tokens=256, epochs=4, warmup_ratio=0.0,
        dropout=dropout, out=out, steps=12, eval_every=6, **saves,
    )  # fmt: skip
    sources = [random_documents(60, 0, longest=150), random_documents(40, 1)]
    held_out = [random_documents(5, 2, longest=150), random_documents(5, 3)]
    data = slices_of(sources, c.seq_len, WEIGHTS[1] if weighted else None, held_out, passes=0)
    loader = loaders(
        data, world.size, batch_size=c.batch_size, epochs=c.epochs, steps=c.steps, seed=c.seed
    )[world.rank]
    model, run = sharded(world, model_config, dropout=c.dropout), RunFolder(c, world)
    if stops_at:
        step = loader.step

        def stopping(k: int):
            if k == stops_at:
                raise KeyboardInterrupt
            return step(k)

        loader.step = stopping
    try:
        fit(c, model, loader, train_cpt.next_token_loss(data, n_bytes_of(model_config)), run)
    except KeyboardInterrupt:
        assert stops_at
    run.close()
    return [full(p.detach()).clone() for p in model.parameters()]


def n_bytes_of(model_config) -> torch.Tensor:
    return torch.arange(model_config.vocab_size) % 5


def test_early_losses_do_not_depend_on_the_number_of_processes(pool, shallow, tmp_path):
    """Dropout 0: 12 steps within 1e-5 on 1 and 2 processes, and the sources' metrics with them."""
    unsaved = partial(train, save_every=12)
    for n_ranks in (1, 2):
        pool(n_ranks, unsaved, shallow, str(tmp_path / f"on{n_ranks}"), False)
    alone = metrics_of(tmp_path / "on1")
    assert len([m for m in alone if "loss" in m]) == 12 and "val_bits_per_byte/source1" in alone[-1]
    for ours, wanted in zip(metrics_of(tmp_path / "on2"), alone, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5)


def test_a_resumed_run_is_the_run_that_was_never_stopped(pool, shallow, tmp_path):
    """Bit for bit, with dropout; in the middle of a pass over both sources."""
    n_ranks = 2
    straight, halves = (str(tmp_path / name) for name in ("straight", "halves"))
    wanted = pool(n_ranks, train, shallow, straight, True, 0, 0.2)
    pool(n_ranks, train, shallow, halves, True, 9, 0.2)
    got = pool(n_ranks, resumed, shallow, halves)
    assert all(torch.equal(a, b) for a, b in zip(got[0], wanted[0], strict=True))
    assert metrics_of(tmp_path / "halves") == metrics_of(tmp_path / "straight")


def resumed(world, model_config, out):
    return train(world, model_config, out, True, dropout=0.2, resume="latest")


def test_bits_per_byte_are_those_of_a_direct_count(small):
    """Of each source; the rows hold pieces of both."""
    sources = [random_documents(12, 0), random_documents(9, 1)]
    data = slices_of(sources, 16)
    n_bytes, model = n_bytes_of(small), Aquila(small)
    loss = train_cpt.next_token_loss(data, n_bytes)
    (loader,) = loaders(data, batch_size=len(data), micro_tokens=64)
    sums = {}
    with torch.no_grad():
        for row in loader.step(0):
            metrics = loss(model(row), row)[1]
            del metrics["accuracy"]
            for name, (value, count) in metrics.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + value.item(), before[1] + count.item()
        for k, documents in enumerate(sources):
            nats, labels = 0.0, []
            for i in range(len(data)):
                if data.source_of(np.array([i])) == k:
                    for ids, _, last_label in data[i]:
                        wanted = [*ids.tolist()[1:], *([last_label] if last_label >= 0 else [])]
                        logp = model(row_from([ids.tolist()]), logits=True).log_softmax(-1)
                        nats -= sum(logp[t, label].item() for t, label in enumerate(wanted))
                        labels += wanted
            assert len(labels) == sum(len(ids) - 1 for ids in documents)
            of_nats, of_bits = sums[f"loss/source{k}"], sums[f"bits_per_byte/source{k}"]
            assert of_nats == (pytest.approx(nats, rel=1e-5), len(labels))
            expected = pytest.approx(nats / np.log(2), rel=1e-5), n_bytes[labels].sum().item()
            assert of_bits == expected


# ---------------------------------------------------------------- tools


def test_a_bad_batch_replays(tmp_path, monkeypatch, capsys, world):
    """A slice that breaks the model is found again, with the records that its documents are."""
    forward, poison = Aquila.forward, []

    def breaks(self, row, logits=False, *cache, **named):
        if self.training and not poison:
            poison.append(row.tokens[: int(row.cu_seqlens[1])].clone())
        piece = poison and poison[0]
        broken = poison and any(
            torch.equal(part, piece)
            for part in row.tokens.tensor_split(row.cu_seqlens[1:-1].long())
        )
        out = forward(self, row, logits, *cache, **named)
        return out._replace(nll=out.nll * float("nan")) if broken else out

    monkeypatch.setattr(Aquila, "forward", breaks)
    monkeypatch.setattr(train_cpt.stage, "export", lambda *_: None)
    run_script(f"{SMALL} --save_every 1 --out {tmp_path / 'run'}", world, monkeypatch)
    (found,) = sorted((tmp_path / "run/bad_batches").iterdir())
    capsys.readouterr()
    broken = replay.replay(found, world)
    printed, facts = capsys.readouterr().out, json.loads(found.read_text())
    examples = [i for row in facts["rows"] for i in row["examples"]]
    assert len(examples) == len(set(examples)) == 4
    assert len(broken) == 1 and printed.count("<- NOT FINITE") == 1
    assert f"slice {broken[0]} (samples/cpt_" in printed and ".jsonl, records " in printed

    # Every document of every slice is named: its text has the slice's piece.
    _, encoder = pretrained.describe(tmp_path / "run")
    data = slices.read(arguments.parse(CPT, shlex.split(SMALL)), encoder)
    named = [record for row in facts["rows"] for record in row["records"]]
    assert any("more" in record for record in named)
    for i, record in zip(examples, named, strict=True):
        places = [record, *record.get("more", [])]
        for segment, place in zip(data[i], places, strict=True):
            line = (ROOT / place["file"]).read_text().splitlines()[place["record"] - 1]
            ids = [*encoder.tokenizer.encode(json.loads(line)["text"]), encoder.document_end]
            starts = range(len(ids) - len(segment.ids) + 1)
            assert any(ids[k : k + len(segment.ids)] == segment.ids.tolist() for k in starts)


def test_the_documents_that_a_bad_batch_names_are_bounded():
    places = [("x.jsonl", n) for n in range(1, 151)]
    loader = SimpleNamespace(data=SimpleNamespace(documents_in=lambda i: places))
    (record,) = faults._records(loader, [0])
    assert (record["file"], record["record"], record["not_named"]) == ("x.jsonl", 1, 49)
    assert [other["record"] for other in record["more"]] == [*range(2, 102)]
