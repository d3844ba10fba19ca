"""What may not change a run: the number of processes, packing, accumulation, a stop in between.

Everything goes through the code that the scripts run: shard(), Loader, train_step(), fit().
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanomed import hf
from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import SFT
from nanomed.distributed import Sharing, World, full, shard
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.recompute import set_recompute
from nanomed.run import checkpoint, saves
from nanomed.run.log import Meter, RunFolder
from nanomed.training.optim import adamw
from nanomed.training.step import evaluate, reduced, train_step
from nanomed.training.trainer import fit
from tests.data import ListData

ALONE = World(0, 1, torch.device("cpu"), mesh=None)


def next_token_loss(scores, row):
    return scores.nll.sum(), {}


def settings(**changes) -> SFT:
    defaults = dict(lr=1e-2, dropout=0.0, warmup_ratio=0.0, grad_clip=1.0, seq_len=64)
    return SFT(**{**defaults, "micro_tokens": 64, "log_every": 1, **changes})


def sharded(
    world, model_config, seed=0, recompute="none", dtype=torch.float32, dropout=0.0, sharing=None
) -> Aquila:
    with torch.device("meta"):
        model = Aquila(model_config, dropout)
    set_recompute(model, recompute)
    shard(model, world, dtype, sharing)
    model.to_empty(device=world.device)
    init_weights(model, seed)
    return model


def chats_of(n: int) -> ListData:
    """n chats of different lengths to train on, then 7 others to hold out."""
    return ListData.of_lengths(np.random.default_rng(5).integers(3, 60, n + 7).tolist())


def loader_of(world: World, n: int, c: SFT, max_steps=0) -> Loader:
    c = dataclasses.replace(c, steps=max_steps)
    parts = np.arange(n), np.arange(n, n + 7)
    return Loader(c, chats_of(n), world.rank, world.size, parts)


class Recorder:
    """Stands in for the optimizer: keeps the whole gradients that it was given."""

    def __init__(self, model):
        self.model, self.param_groups = model, [{"lr_scale": 1.0}]

    def step(self):
        grads = [full(p.grad).clone() for p in self.model.parameters()]
        self.gradients = grads

    def zero_grad(self):
        self.model.zero_grad()


# ---------------------------------------------------------------- gradients and losses


def gradients_of_a_step(world, model_config, n, batch_size, micro_tokens, step, sharing=None):
    """(gradients, loss, number of rows on this rank) of one step, as train_step makes them."""
    c = settings(batch_size=batch_size, micro_tokens=micro_tokens, grad_clip=0.0)
    model = sharded(world, model_config, sharing=sharing)
    loader = loader_of(world, n, c)
    recorder = Recorder(model)
    meter = Meter(model_config, world.size)
    result = train_step(c, model, recorder, loader, next_token_loss, step, 1e-3, meter)
    values = reduced(result, loader.divisor(step), meter)
    return recorder.gradients, values, len(loader.step(step)), loader.examples(step)


def reference_gradients(model_config, n, examples):
    """One example after another through an unsharded model in float64; divided at the end."""
    model = Aquila(model_config).double()
    data = chats_of(n)
    total, n_trained = 0.0, 0
    for i in examples:
        row = row_from(*zip(*data[i], strict=True))
        logp = model(row, logits=True).log_softmax(-1)
        picked = logp.gather(1, row.labels.clamp(min=0)[:, None])[:, 0]
        nll = -(picked * (row.labels >= 0)).sum()
        nll.backward()
        total += nll.item()
        n_trained += (row.labels >= 0).sum().item()
    return [p.grad / n_trained for p in model.parameters()], total / n_trained


def assert_same_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):  # elements near 0 have no digits
        assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm()


@pytest.mark.parametrize("n, batch_size, step, few", [(64, 64, 0, 128), (61, 16, 3, 64)])
def test_gradients_do_not_depend_on_processes_packing_or_accumulation(
    pool, small, n, batch_size, step, few
):
    """64 chats of different lengths as (1 process, 1 row), (1, 8 or more), (2, several), (4,
    several, of `few` tokens), two copies of two; then the short last step of an epoch that nothing
    divides evenly; sums over ranks after each row and once. All equal a plain float64 computation;
    the logged loss is the sum of nll over the trained tokens."""
    row, once = Sharing(), Sharing(once=True)
    layouts = [(1, 4096, row), (1, 256, row), (1, 256, once), (2, 300, once), (4, 128, row)]
    layouts += [(4, few, sharing) for sharing in (once, Sharing(2), Sharing(2, once=True))]
    n_rows = []
    alone = loader_of(ALONE, n, settings(batch_size=batch_size))
    wanted, loss = reference_gradients(small, n, alone.examples(step))
    for n_ranks, micro_tokens, sharing in layouts:
        arguments = (small, n, batch_size, micro_tokens, step, sharing)
        results = pool(n_ranks, gradients_of_a_step, *arguments)
        _, values, rows, examples = results[0]
        assert examples.tolist() == alone.examples(step).tolist()
        for other, *_ in results:
            assert_same_gradients(other, wanted)
        assert values["loss"] == pytest.approx(loss, rel=1e-6)
        n_rows.append(n_ranks * rows)
    assert n_rows[0] == 1 and (batch_size < 64 or (n_rows[1] >= 8 and min(n_rows[4:]) >= 16))
    assert len(examples) == (64 if step == 0 else 13)


def test_a_mean_of_means_is_seen(pool, small, monkeypatch):
    """A common bug of other trainers, planted: each row's loss divided by its own tokens."""

    def planted(n, batch_size, step):
        c = settings(batch_size=n, micro_tokens=256)
        model = Aquila(small)
        data = loader_of(ALONE, n, c)
        rows = data.step(0)
        for row in rows:
            (model(row).nll.sum() / (row.labels >= 0).sum() / len(rows)).backward()
        return [p.grad for p in model.parameters()]

    wanted, _ = reference_gradients(small, 64, range(64))
    with pytest.raises(AssertionError):
        assert_same_gradients(planted(64, 64, 0), wanted)


def validation_losses(world, model_config, sizes):
    model = sharded(world, model_config)
    losses = []
    for n in sizes:
        loader = loader_of(world, 9, settings(batch_size=4))
        loader.val = np.arange(9, 9 + n)
        run = Silent(world)
        losses.append((evaluate(model, loader, next_token_loss, run, step=0), run.last))
    return losses


class Silent:
    """A run folder that keeps the last values instead of writing them."""

    def __init__(self, world):
        self.world, self.last, self.describe = world, {}, None

    def metrics(self, **values):
        self.last = values

    def print(self, text=""):
        pass


def test_validation_counts_each_example_once_on_any_number_of_ranks(pool, small):
    """1 to 7 examples on 1, 2 and 4 ranks; none hangs, all agree."""
    sizes = range(1, 8)
    alone = pool(1, validation_losses, small, sizes)[0]
    for n_ranks in (2, 4):
        for losses in pool(n_ranks, validation_losses, small, sizes):
            for (loss, _), (wanted, _) in zip(losses, alone, strict=True):
                assert loss == pytest.approx(wanted, rel=1e-6)
    model = Aquila(small)
    data = chats_of(9)
    row = row_from(*zip(*[data[i][0] for i in range(9, 16)], strict=True))
    with torch.no_grad():
        nll = model(row).nll
    assert alone[-1][0] == pytest.approx((nll.sum() / (row.labels >= 0).sum()).item(), rel=1e-6)


# ---------------------------------------------------------------- every parameter moves


def still_after(world, model_config, before: str, folder: str) -> list[str]:
    """Names of the parameters that three steps did not change, after nothing, a forward without
    gradient, or a load; having seen that the model computes with what its parameters hold."""
    c = settings(batch_size=8)
    model = sharded(world, model_config)
    loader = loader_of(world, 40, c)
    if before == "forward":
        evaluate(model, loader, next_token_loss, Silent(world), step=0)
    optimizer = adamw(model, c.weight_decay)
    meter = Meter(model_config, world.size)
    step = lambda k: train_step(c, model, optimizer, loader, next_token_loss, k, 1e-2, meter)  # noqa: E731
    if before == "load":
        saves.save(Path(folder), model, optimizer, {"step": 0})
        step(0)
        evaluate(model, loader, next_token_loss, Silent(world), step=0)
        checkpoint.load(Path(folder) / "latest", model, optimizer)
    start = weights_in_use(model)
    for k in range(3):
        step(k)
    now = weights_in_use(model)
    return [name for name in start if torch.equal(start[name], now[name])]


def weights_in_use(model) -> dict[str, torch.Tensor]:
    """The whole parameters; a plain model with them must give what the sharded one gives."""
    weights = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
    plain = Aquila(model.config)
    plain.load_state_dict(weights)
    row = row_from([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.allclose(model(row).nll, plain(row).nll, atol=1e-6)
    return weights


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("before", ["nothing", "forward", "load"])
def test_every_parameter_moves(pool, small, tmp_path, n_ranks, before):
    """A root that owns parameters would silently leave some of them behind."""
    for still in pool(n_ranks, still_after, small, before, str(tmp_path)):
        assert still == []


# ---------------------------------------------------------------- resume


def train(world, model_config, out, changes, dies=(), n_steps=10, sharing=None):
    """A run in the folder `out`; `dies` (module, name, step) is a function that ends it once that
    step is saved. What it leaves behind."""
    saving = dict(save_every=5, eval_every=5, save="blocking", out=out)
    c = settings(batch_size=16, micro_tokens=256, epochs=5, **{**saving, **changes})
    model = sharded(world, model_config, dropout=c.dropout, sharing=sharing)
    run = RunFolder(c, world)
    loader = loader_of(world, 61, c, max_steps=n_steps)
    if dies:
        module, name = sys.modules[dies[0]], dies[1]
        original = getattr(module, name)

        def dying(*arguments):
            if (run.checkpoints / f"step-{dies[2]:06d}").exists():
                raise KeyboardInterrupt
            return original(*arguments)

        setattr(module, name, dying)
    try:
        fit(c, model, loader, next_token_loss, run)
    except KeyboardInterrupt:
        setattr(module, name, original)
    run.close()
    return [full(p.detach()).clone() for p in model.parameters()]


def metrics_of(folder: Path) -> list[dict]:
    """Without what depends on the clock and the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "peak_memory_gb", "mfu_causal")
    return [{k: v for k, v in m.items() if k not in clock} for m in lines]


RIGHT_AFTER_THE_SAVE = ("nanomed.training.trainer", "evaluate", 5)
AFTER_VALIDATION = ("nanomed.training.trainer", "train_step", 5)


@pytest.mark.parametrize(
    "n_ranks, dies", [(1, (RIGHT_AFTER_THE_SAVE, AFTER_VALIDATION)), (2, (AFTER_VALIDATION,))]
)
def test_ten_steps_are_five_and_a_resume_and_five(pool, small, tmp_path, n_ranks, dies):
    """With dropout: weights, losses, learning rates, validation and the choice of
    the best checkpoint, bit for bit."""
    straight = tmp_path / "straight"
    wanted = pool(n_ranks, train, small, str(straight), {"dropout": 0.2})
    for place in dies:
        halves = tmp_path / place[1]
        pool(n_ranks, train, small, str(halves), {"dropout": 0.2}, place)
        assert metrics_of(halves)[-1]["step"] == 5
        got = pool(n_ranks, train, small, str(halves), {"dropout": 0.2, "resume": "latest"})
        for a, b in zip(got[0], wanted[0], strict=True):
            assert torch.equal(a, b)
        assert metrics_of(halves) == metrics_of(straight)
        best = [(folder / "checkpoints/best").resolve().name for folder in (straight, halves)]
        assert best[0] == best[1]


def test_early_losses_do_not_depend_on_the_number_of_processes(pool, shallow, tmp_path):
    """Dropout 0: the first 20 steps within 1e-5 on 1, 2 and 4 processes; and the 15 steps after a
    resume on another number of them."""

    def run(n_ranks: int, name: str, **changes) -> list[dict]:
        changes = {"lr": 1e-3, "save_every": 20, "eval_every": 20, **changes}
        pool(n_ranks, train, shallow, str(tmp_path / name), changes, (), 20)
        return metrics_of(tmp_path / name)

    alone, *found = run(1, "on1"), run(2, "on2", save_every=5, keep_last=9), run(4, "on4")
    for step in (10, 15, 20):
        checkpoint.delete(tmp_path / f"on2/checkpoints/step-{step:06d}")
    found.append(run(1, "on2", resume="latest"))
    assert [lines[-1]["step"] for lines in (alone, *found)] == [20] * 4
    for lines in found:
        for ours, wanted in zip(lines, alone, strict=True):
            assert ours == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- export


def export_sharded(world, model_config, tokenizer, folder):
    model = sharded(world, model_config, seed=3)
    hf.export(model, tokenizer, folder, torch.float32)
    dist.barrier()


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_an_export_holds_the_same_tensors_from_any_number_of_ranks(
    pool, small, encoder, tmp_path, n_ranks
):
    config = dataclasses.replace(small, vocab_size=encoder.tokenizer.vocab_size)
    pool(n_ranks, export_sharded, config, encoder.tokenizer, str(tmp_path / "x"))
    loaded, wanted = pretrained.load(tmp_path / "x"), Aquila(config)
    init_weights(wanted, seed=3)
    for (name, a), b in zip(loaded.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b), name
