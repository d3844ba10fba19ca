"""Import, training and export on two processes, what a run leaves, and memory."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nanomed.config import SFT
from nanomed.hf import __main__ as hf_commands
from nanomed.hf import pretrained, reading
from nanomed.stages import stage
from nanomed.text import tokenizer
from tests import sharded_worker
from tests.folders import TEXTS, all_tensors, edit_tensor, write_model, write_rank_file
from tests.ranks import script

HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "in", "qwen2", max_shard_size="100KB")
    write_rank_file(tmp_path / "in")
    return tmp_path / "in"


def test_import_and_export_on_two_processes(pool, folder, tmp_path):
    """And a number that is none, in the rows of one rank, is an error on both."""
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    edit_tensor(bad, HEAD, lambda t: t.index_fill(0, torch.tensor([899]), float("nan")))
    good, refused = (pool(2, sharded_worker.report, str(path)) for path in (folder, bad))

    total = sum(p.nbytes for p in pretrained.load(folder).parameters())
    assert [0.4 < report["share"] / total < 0.6 for report in good] == [True, True]
    before, after = all_tensors(folder), all_tensors(tmp_path / "in-out")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    for report in refused:
        assert "lm_head.weight holds numbers that are NaN" in report["error"]
    assert not (tmp_path / "bad-out").exists()


def test_a_run_starts_from_a_folder_and_its_result_is_read_again(
    pool, folder, tmp_path, monkeypatch
):
    """--init, the run's own export, --init on the run, the export command, and chat's reader."""
    chats = [{"messages": turns(q, "好" * (1 + i % 3))} for i, q in enumerate(TEXTS[:6] * 4)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(c) + "\n" for c in chats))
    given = ["--data", str(data), "--epochs=1", "--batch_size=8", "--seq_len=400", "--lr=1e-3"]
    given += ["--micro_tokens=800", "--device=cpu", "--val_fraction=0.2"]
    pool(2, script, "train_sft", ["--init", str(folder), "--out", "run", *given], str(tmp_path))
    run = tmp_path / "run"

    trained = pretrained.load(run, torch.device("cpu"), torch.float32)
    exported = pretrained.load(run / "export")
    start = pretrained.load(folder)
    moved = 0
    for (name, a), b, c in zip(
        trained.named_parameters(), exported.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        moved += not torch.equal(a, c)
    assert moved == len(list(trained.parameters()))
    config, encoder = pretrained.describe(run)
    assert tokenizer.same(encoder.tokenizer, tokenizer.load(folder))
    assert "chats.jsonl" in (run / "export/README.md").read_text()

    for source in (run, run / "checkpoints/latest"):
        out = tmp_path / f"out-{source.name}"
        monkeypatch.setattr(sys, "argv", ["hf", "export", str(source), str(out), "--dtype", "fp32"])
        hf_commands.main()
        theirs, ours = all_tensors(out), dict(trained.named_parameters())
        assert all(theirs[reading.hf_name(name)].equal(param) for name, param in ours.items())
        assert config == reading.read_config(out)
    monkeypatch.setattr(sys, "argv", ["hf", "export", str(run), str(tmp_path / "bf16")])
    hf_commands.main()
    halved = all_tensors(tmp_path / "bf16")
    assert all(halved[reading.hf_name(n)].equal(p.bfloat16()) for n, p in ours.items())
    c = SFT(init=str(run), seq_len=64, micro_tokens=64)
    assert stage.model_and_encoder(c)[0].vocab_size == config.vocab_size


def turns(question, answer):
    pair = (("user", question or "?"), ("assistant", answer))
    return [{"role": role, "content": text if text.strip() else "?"} for role, text in pair]


@pytest.mark.slow
def test_memory_of_import_and_export(tmp_path):
    """A gigabyte of float32 in bfloat16 shards, on two processes."""
    big = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
    big |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 40_000}
    folder = tmp_path / "in"
    write_model(folder, "qwen2", dtype=torch.bfloat16, max_shard_size="200MB", **big)
    write_rank_file(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, sharded_worker.__file__, str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        r = json.loads((tmp_path / f"in-report-{rank}").read_text())
        print({name: f"{value / 1e6:.0f} MB" for name, value in r.items()})
        assert r["import"] <= 1.3 * r["share"] + r["largest"]
        assert r["export"] <= r["largest"] < 250e6  # a shard of the export
    assert all_tensors(tmp_path / "in-out").keys() == all_tensors(folder).keys()
