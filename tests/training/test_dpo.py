"""DPO as a stage: against TRL, what may not change it, its reference, and that it learns."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
import train_dpo
from nanomed import store
from nanomed.arguments import parse
from nanomed.batches.packing import filler, row_from
from nanomed.config import DPO, InputError
from nanomed.distributed import full
from nanomed.model.decoder import Aquila, Scores, init_weights
from nanomed.run.log import Meter, RunFolder
from nanomed.training.losses import segment_logps
from nanomed.training.optim import adamw
from nanomed.training.reference import reference_logps
from nanomed.training.step import reduced, train_step
from nanomed.training.trainer import fit
from tests.conftest import ROOT
from tests.data import Examples
from tests.loss_oracle import check_learned
from tests.training.test_exactness import Recorder, assert_same_gradients, sharded

C = DPO(beta=0.1, seq_len=64, micro_tokens=256, batch_size=16, lr=1e-3)


# ---------------------------------------------------------------- pairs as rows


class PairData(Examples):
    """n pairs of random tokens: a prompt, then two answers of other lengths."""

    def __init__(self, n: int, vocab_size: int = 97):
        rng = np.random.default_rng(n)
        pairs = []
        for _ in range(n):
            prompt = rng.integers(vocab_size, size=rng.integers(2, 20)).tolist()
            answers = [rng.integers(vocab_size, size=k).tolist() for k in rng.integers(1, 30, 2)]
            flags = [[False] * len(prompt) + [True] * len(a) for a in answers]
            pairs.append([(prompt + a, learned) for a, learned in zip(answers, flags, strict=True)])
        super().__init__(pairs)


def loader_of(world, c: DPO, n: int, n_val: int = 0):
    from nanomed.batches.loader import Loader

    parts = np.arange(n), np.arange(n, n + n_val)
    return Loader(c, PairData(n + n_val), world.rank, world.size, parts)


def loss_of(reference: Tensor, c: DPO):
    kinds = torch.arange(len(reference)) % 2
    return train_dpo.preference_loss(reference, kinds, ["subjective", "objective"], c)


def random_reference(n: int) -> Tensor:
    return -40 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0))


def gradients_of_a_step(world, model_config, c):
    """(gradients, metrics) of a step over 16 pairs."""
    model, loader = sharded(world, model_config), loader_of(world, c, 16)
    recorder, meter = Recorder(model), Meter(model_config, world.size)
    loss = loss_of(random_reference(16), c)
    values = take_step(c, model, recorder, loader, loss, meter)
    return recorder.gradients, values


def take_step(c, model, optimizer, loader, loss, meter):
    result = train_step(c, model, optimizer, loader, loss, 0, 1e-3, meter)
    return reduced(result, loader.divisor(0), meter)


def test_rows_and_processes_change_nothing(pool, small):
    """The same 16 pairs as one row, many rows, and on 2 and 4 ranks (some of which run fillers):
    gradients to 1e-5 of their norm, as for SFT; every metric to 1e-5. The bound is float32's
    rounding of sums in another order: measured about 1e-6."""
    c = dataclasses.replace(C, grad_clip=0.0)
    wanted, values = pool(1, gradients_of_a_step, small, dataclasses.replace(c, micro_tokens=4096))[
        0
    ]
    for n_ranks, micro_tokens in [(1, 128), (2, 200), (4, 128), (4, 4096)]:
        changed = dataclasses.replace(c, micro_tokens=micro_tokens)
        for gradients, others in pool(n_ranks, gradients_of_a_step, small, changed):
            assert_same_gradients(gradients, wanted)
            for name in values:
                if "rewards" in name or "log" in name or name == "loss":
                    assert others[name] == pytest.approx(values[name], rel=1e-5, abs=1e-6), name


def test_a_filler_adds_nothing(small):
    loss = loss_of(random_reference(4), C)
    total, metrics = loss(Aquila(small)(filler()), filler())
    assert total.item() == 0
    values = [v for m in metrics.values() for v in (m if isinstance(m, tuple) else (m,))]
    assert all(v.item() == 0 for v in values)


def test_what_the_model_prefers_needs_no_reference():
    """Of four pairs, the first three have the likelier chosen answer; kinds alternate."""
    segments = [part for i in range(4) for part in PairData(4)[i]]
    row = row_from(*zip(*segments, strict=True), examples=[0, 0, 1, 1, 2, 2, 3, 3])
    of_segment = torch.tensor([1, 2, 1, 2, 1, 2, 2, 1]) / row.cu_seqlens.diff()
    nll = of_segment.repeat_interleave(row.cu_seqlens.diff())
    for reference in (torch.zeros(4, 2), random_reference(4)):
        _, metrics = loss_of(reference, C)(Scores(nll, nll, nll > 0), row)
        assert metrics["logps/accuracies"] == 3
        assert metrics["logps/accuracies/subjective"] == (2, 2)
        assert metrics["logps/accuracies/objective"] == (1, 2)


# ---------------------------------------------------------------- the reference


def fresh_run(world, model_config, tmp_path, dtype=torch.float32):
    c = dataclasses.replace(C, out=str(tmp_path / "run"))
    model = sharded(world, model_config, dtype=dtype)
    return c, model, RunFolder(c, world), loader_of(world, c, 24, n_val=6)


def test_the_reference_is_the_models_own(world, small, tmp_path):
    _, model, run, loader = fresh_run(world, small, tmp_path)
    reference = reference_logps(model, loader, run, torch.float32)
    plain = Aquila(small)
    plain.load_state_dict({n: full(p.detach()) for n, p in model.named_parameters()})
    for i in range(30):
        row = row_from(*zip(*loader.data[i], strict=True))
        with torch.no_grad():
            assert torch.allclose(segment_logps(plain(row).nll, row), reference[i], rtol=1e-5)
    run.close()


def test_a_resume_reads_the_reference_and_refuses_another_key(world, small, tmp_path, monkeypatch):
    _, model, run, loader = fresh_run(world, small, tmp_path)
    first = reference_logps(model, loader, run, torch.float32)
    run.resume_from = tmp_path  # as after a stop
    monkeypatch.setattr(
        "nanomed.training.reference.answer_logps", lambda *_: pytest.fail("computed again")
    )
    again = reference_logps(model, loader, run, torch.float32)
    assert torch.equal(first, again)
    with pytest.raises(InputError, match=r"dtype: .*float32 there, .*bfloat16 now"):
        reference_logps(model, loader, run, torch.bfloat16)
    monkeypatch.setattr(kernels, "in_force", lambda *_: "triton")  # its sums round otherwise
    with pytest.raises(InputError, match="kernels: reference there, triton now"):
        reference_logps(model, loader, run, torch.float32)
    monkeypatch.undo()
    kept = (run.path / "reference.npy").read_bytes()
    for content in (kept[:-1], kept[:20], b""):
        (run.path / "reference.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"reference.npy .* cannot be read .*start a new run"):
            reference_logps(model, loader, run, torch.float32)
    (run.path / "reference.npy").write_bytes(kept)
    init_weights(model, seed=1)
    with pytest.raises(InputError, match="weights: "):
        reference_logps(model, loader, run, torch.float32)
    run.close()


def fingerprints(world, model_config):
    from nanomed.training.reference import fingerprint

    return fingerprint(sharded(world, model_config))


def test_the_weights_key_does_not_depend_on_the_number_of_processes(pool, small):
    assert len({fp for n in (1, 2, 3) for fp in pool(n, fingerprints, small)}) == 1


# ---------------------------------------------------------------- it moves, and it learns


def share_moved(model, world, small, dtype):
    """Of the weights outside embeddings and norms, after 10 steps at 2e-7: such an update
    is less than half of bfloat16's spacing."""
    model = model.to(dtype)
    c = dataclasses.replace(C, micro_tokens=1024)
    loader, optimizer = loader_of(world, c, 64), adamw(model, c.weight_decay)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(10):
        train_step(c, model, optimizer, loader, loss_of(random_reference(64), c), step, 2e-7,
                   Meter(small, 1))  # fmt: skip
    inner = [n for n in start if n.endswith("_proj.weight")]
    now = dict(model.named_parameters())
    moved = sum((now[n] != start[n]).sum().item() for n in inner)
    return moved / sum(start[n].numel() for n in inner)


def test_masters_in_float32_move_where_bfloat16_ones_do_not(world, small):
    assert share_moved(Aquila(small), world, small, torch.float32) > 0.99
    assert share_moved(Aquila(small), world, small, torch.bfloat16) < 0.05


def test_eight_pairs_are_learned(world, small, tmp_path):
    c = dataclasses.replace(
        C, batch_size=8, steps=30, lr=3e-3, log_every=30, eval_every=30, out=str(tmp_path / "x")
    )
    model, run, loader = sharded(world, small), RunFolder(c, world), loader_of(world, c, 8)
    loss = loss_of(reference_logps(model, loader, run, torch.float32), c)
    fit(c, model, loader, loss, run)
    run.close()
    lines = (tmp_path / "x/metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    check_learned(first, last)
    assert last["rewards/accuracies/subjective"] == last["rewards/accuracies/objective"] == 1


# ---------------------------------------------------------------- real pairs, and settings


def test_real_pairs_train_as_they_are(shared_data, encoder):
    data = store.pairs([str(shared_data / "preference_sharegpt.jsonl")], encoder, 2048, 0.05)
    report = data.meta["report"]
    assert report["examples"] == 500 and report["kept"] >= 475
    assert all(len(data[i]) == 2 for i in range(len(data))) and set(data.divisors) == {1}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dropout", "0.1"], "--dropout is 0.1; it must be 0: policy and reference"),
        (["--beta", "0"], "--beta is 0.0; it must be above 0"),
        (["--seq_len", "2048", "--micro_tokens", "4095"], "at least 2 x --seq_len"),
    ],
)
def test_settings_that_cannot_work(flags, message):
    with pytest.raises(InputError, match=message):
        parse(DPO, flags)


def demonstration(script: str, folder: Path) -> None:
    """As a reader runs it: without arguments, in a folder that holds samples/."""
    run = subprocess.run(
        [sys.executable, str(ROOT / script)], cwd=folder, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
def test_the_demonstration_moves_held_out_pairs_the_right_way(tmp_path):
    """SFT, then DPO, without arguments: nine held-out questions in ten of each kind, none before
    the first step, and the chosen answers do not pay for it."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    demonstration("train_sft.py", tmp_path)
    demonstration("train_dpo.py", tmp_path)
    lines = (tmp_path / "runs/dpo/metrics.jsonl").read_text().splitlines()
    first, *_, last = [m for m in map(json.loads, lines) if "val_loss" in m]
    for kind in ("subjective", "objective"):
        assert first[f"val_rewards/accuracies/{kind}"] == 0
        assert last[f"val_rewards/accuracies/{kind}"] >= 0.9
        assert last[f"val_logps/accuracies/{kind}"] >= 0.9
    assert last["val_log_ratio_per_token/chosen"] > -0.02
    assert last["val_log_ratio_per_token/rejected"] < -0.1
