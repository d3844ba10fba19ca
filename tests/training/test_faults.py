"""Steps that cannot be applied, signals, spikes, a parent that is gone, saves and validations that
fail: the run survives each of them, on all ranks alike."""

import json
import math
import resource
import sys
from functools import partial

import pytest
import torch

import train_sft
from nanomed.config import InputError
from nanomed.distributed import local
from nanomed.model.decoder import Aquila
from nanomed.run import checkpoint, saves
from nanomed.run.log import Meter, RunFolder
from nanomed.tools import replay
from nanomed.training import step, trainer
from nanomed.training.faults import Spikes
from nanomed.training.optim import adamw
from nanomed.training.step import train_step
from tests.conftest import ROOT
from tests.killed import build, digest, loader_of, settings
from tests.training.test_exactness import metrics_of, sharded


def next_token_loss(scores, row):
    return scores.nll.sum(), {}


def train(world, out: str, bad_steps=(), rank=1, on_step=None, **changes) -> dict:
    """A run in which one row of one rank has a loss that is not a number; what became of it."""
    c = settings(out, resume="auto", **changes)
    run = RunFolder(c, world, {"what": "faults"})
    loader, model, seen = loader_of(world, c), build(world), []
    at = {"step": -1, "row": 0}

    def noted(config, model, optimizer, loader, loss, step, lr, meter, stop):
        at.update(step=step, row=0)
        before = digest(model, optimizer) if optimizer.state else ""
        if on_step:
            on_step(world, step)
        result = train_step(config, model, optimizer, loader, loss, step, lr, meter, stop)
        still = before == (digest(model, optimizer) if optimizer.state else "")
        seen.append((step, lr, result.applied, still))
        return result

    def loss(scores, row):
        at["row"] += 1
        bad = at["step"] in bad_steps and world.rank == rank and at["row"] == 1
        return scores.nll.sum() * (float("nan") if bad else 1.0), {}

    trainer.train_step = noted
    outcome = None
    try:
        trainer.fit(c, model, loader, loss, run)
    except (SystemExit, InputError) as ending:
        outcome = ending.code if isinstance(ending, SystemExit) else str(ending)
    finally:
        trainer.train_step = train_step
        run.close()
    return {"steps": seen, "outcome": outcome, "rows": at["row"]}


# ---------------------------------------------------------------- steps that are skipped


@pytest.fixture(scope="module")
def with_a_bad_row(pool, tmp_path_factory):
    """(folder, results) of a run on two ranks in which one has a bad row in step 6."""
    folder = tmp_path_factory.mktemp("faults") / "bad"
    return folder, pool(2, train, str(folder), {5})


def test_a_bad_row_on_one_rank_is_skipped_by_both(undisturbed, with_a_bad_row):
    """No weight, moment or count of Adam moves; learning rate and data do; training goes on."""
    (clean_folder, clean), (bad_folder, bad) = undisturbed(2), with_a_bad_row
    for rank in (0, 1):
        wanted, got = clean[rank]["steps"], bad[rank]["steps"]
        assert [s[:2] for s in got] == [s[:2] for s in wanted]  # numbers, learning rates
        assert [s[0] for s in got if not s[2]] == [5] == [s[0] for s in got if s[3] and s[0]]
        assert bad[rank]["outcome"] is None and bad[rank]["rows"] > 1
    lines = metrics_of(bad_folder)
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3, 4, 5, *range(7, 13)]
    same = [m for m in metrics_of(clean_folder) if m["step"] <= 5]
    assert [m for m in lines if m["step"] <= 5] == same


def test_what_is_written_about_a_bad_step(with_a_bad_row):
    (path,) = (with_a_bad_row[0] / "bad_batches").iterdir()
    facts = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    assert path.name == "step-000006.json" and facts["step"] == 6
    assert facts["loss"] == "nan" and facts["checkpoint"] == "step-000004"
    assert set(facts["grad_norms"]) == {"embed_tokens", "layers.0", "norm", "lm_head"}
    (bad,) = [row for row in facts["rows"] if row["loss"] == "nan"]
    assert bad["rank"] == 1 and bad["examples"]
    examples = sorted(i for row in facts["rows"] for i in row["examples"])
    c = settings("x")
    assert examples == sorted(loader_of(One, c).examples(5).tolist())
    assert [r["record"] for row in facts["rows"] for r in row["records"]] == [
        i + 1 for row in facts["rows"] for i in row["examples"]
    ]


class One:
    rank, size = 0, 1


def test_five_in_a_row_end_the_run_and_lose_nothing(pool, tmp_path):
    """Four do not. What was trained before them is saved, and a resume goes on behind them."""
    four = pool(1, train, str(tmp_path / "four"), {5, 6, 7, 8}, 0)
    assert four[0]["outcome"] is None
    five = pool(2, train, str(tmp_path / "five"), {5, 6, 7, 8, 9})
    for rank in (0, 1):
        assert "5 steps in a row (--max_bad)" in five[rank]["outcome"]
        assert five[rank]["steps"][-1][0] == 9
    assert checkpoint.newest(tmp_path / "five/checkpoints").name == "step-000010"
    rest = pool(2, train, str(tmp_path / "five"))
    assert [s[0] for s in rest[0]["steps"]] == [10, 11] and rest[0]["outcome"] is None


def test_a_run_of_bad_steps_alone_does_not_end_well(pool, tmp_path):
    """Shorter than --max_bad: no weight has moved."""
    short = partial(train, epochs=1)
    outcome = pool(1, short, str(tmp_path / "x"), {0, 1, 2, 3}, 0)[0]["outcome"]
    assert "4 steps in a row" in outcome


def bad_gradient(world, config, value: float) -> tuple[dict[str, float], float]:
    """The norms of a step in which one element of one gradient, on the last rank, is `value`."""
    c, model = settings("x"), sharded(world, config)
    (layer, *_) = model.layers
    weight = layer.mlp.up_proj.weight

    def spoil(param):
        if world.rank == world.size - 1:
            local(param.grad).view(-1)[0] = value

    weight.register_post_accumulate_grad_hook(spoil)
    meter, loader = Meter(model.config, world.size), loader_of(world, c)
    result = train_step(c, model, adamw(model, 0.1), loader, next_token_loss, 0, 1e-3, meter)
    return result.layers, result.grad_norm


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_bad_element_of_a_gradient_is_found_in_its_layer_alone(pool, small, n_ranks, value):
    """The others have the norms that they have without it: they are taken before clipping."""
    finite = 1e30  # not applied either: its square is too much
    wanted, _ = pool(n_ranks, bad_gradient, small, finite)[0]
    for norms, total in pool(n_ranks, bad_gradient, small, value):
        assert not math.isfinite(total) and not math.isfinite(norms.pop("layers.0"))
        assert norms == {name: norm for name, norm in wanted.items() if name != "layers.0"}
        assert len(norms) == 4 and min(norms.values()) > 0


def test_max_bad_counts_only_steps_in_a_row(pool, tmp_path):
    outcome = pool(1, train, str(tmp_path / "x"), {1, 3, 5, 7}, 0, None)[0]["outcome"]
    assert outcome is None


def test_a_spike_is_one_among_quiet_losses():
    quiet = [2.0 + 0.1 * (i % 5) for i in range(40)]
    spikes = Spikes()
    assert not any(spikes.is_spike(loss) for loss in quiet)
    assert spikes.is_spike(4.0) and not spikes.is_spike(2.3)
    falling = Spikes()
    assert not any(falling.is_spike(9.0 - 0.05 * i) for i in range(100))


def test_a_spike_is_logged_with_its_records(pool, tmp_path):
    pool(2, spiking, str(tmp_path / "x"))
    (line,) = [json.loads(text) for text in (tmp_path / "x/spikes.jsonl").open()]
    assert line["step"] == 9 and len(line["records"]) == 16
    assert line["records"][0]["file"] == "made.jsonl"


def spiking(world, out: str) -> None:
    original, trainer.Spikes = trainer.Spikes, lambda: Spikes(n=4)
    try:
        c = settings(out, lr=1e-5, save_every=12, eval_every=12)
        run, loader, calls = RunFolder(c, world), loader_of(world, c), []

        def loss(scores, row):
            if torch.is_grad_enabled():
                calls.append(row)
            spike = len(calls) > sum(len(loader.step(k)) for k in range(8))
            late = len(calls) > sum(len(loader.step(k)) for k in range(9))
            return scores.nll.sum() * (5.0 if spike and not late else 1.0), {}

        trainer.fit(c, build(world), loader, loss, run)
        run.close()
    finally:
        trainer.Spikes = original


# ---------------------------------------------------------------- replay


AFTERWARDS = [(train_sft, "show_answers"), (train_sft, "show_results"), (train_sft.stage, "export")]


def test_a_bad_batch_replays(tmp_path, monkeypatch, capsys, world):
    """A real run of the script in which every text with a certain token breaks the model: the step
    is skipped, and the tool finds the record without being told."""
    monkeypatch.chdir(ROOT)
    forward, poison = Aquila.forward, []

    def breaks(self, row, logits=False, *cache, **named):
        """From the second step on, where a token stands that only one of its chats has."""
        steps.extend([row] * (self.training and not poison))
        if len(steps) == 2 and not poison:
            tokens = [set(s.tolist()) for s in row.tokens.tensor_split(row.cu_seqlens[1:-1].long())]
            poison.append(min(tokens[0] - set.union(*tokens[1:])))
        broken = poison and not logits and (row.tokens == poison[0]).any()
        out = forward(self, row, logits, *cache, **named)
        return out._replace(nll=out.nll * float("nan")) if broken else out

    steps = []
    monkeypatch.setattr(Aquila, "forward", breaks)
    out = tmp_path / "run"
    flags = f"--out {out} --steps 3 --batch_size 8 --save_every 1 --seq_len 256 --max_bad 9"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["train_sft.py", *flags.split(), "--val_fraction", "0.01"])
        patch.setattr(train_sft, "start", lambda _: _Joined(world))
        for owner, name in AFTERWARDS:
            patch.setattr(owner, name, lambda *_: None)
        train_sft.main()
    found = sorted((out / "bad_batches").iterdir())[0]
    assert found.name == "step-000002.json"
    capsys.readouterr()
    broken = replay.replay(found, world)
    printed = capsys.readouterr().out
    facts = json.loads(found.read_text())
    assert len(broken) == 1 and broken[0] in facts["rows"][0]["examples"]
    assert printed.count("<- NOT FINITE") == len(broken)
    assert f"reading {out}/checkpoints/step-" in printed and "samples/sft.jsonl, record" in printed
    assert "<|im_start|>" in printed


class _Joined:
    def __init__(self, world):
        self.world = world

    def __enter__(self):
        return self.world

    def __exit__(self, *_):
        pass


# ---------------------------------------------------------------- what fails around a step


def with_a_failing_save(world, out: str) -> dict:
    """The save of step 6 fails on rank 1 alone."""
    check = saves._check_finite
    calls = []

    def failing(model):
        calls.append(model)
        if len(calls) == 3 and world.rank == world.size - 1:
            raise OSError(28, "No space left on device")
        return check(model)

    saves._check_finite = failing
    try:
        return train(world, out)
    finally:
        saves._check_finite = check


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_failing_save_leaves_the_run_alive(pool, undisturbed, tmp_path, n_ranks):
    results = pool(n_ranks, with_a_failing_save, str(tmp_path / "x"))
    assert [r["outcome"] for r in results] == [None] * n_ranks
    assert metrics_of(tmp_path / "x") == metrics_of(undisturbed(n_ranks)[0])
    assert checkpoint.newest(tmp_path / "x/checkpoints").name == "step-000012"


def with_no_room_at_the_end(world, out: str) -> dict:
    begin = saves.begin

    def failing(folder, model, optimizer, state, host):
        if state["step"] > 8:
            raise saves.SaveFailed("no room")
        return begin(folder, model, optimizer, state, host)

    saves.begin = failing
    try:
        return train(world, out)
    finally:
        saves.begin = begin


def test_a_run_that_could_not_save_its_end_does_not_end_well(pool, tmp_path):
    (result,) = pool(1, with_no_room_at_the_end, str(tmp_path / "x"))
    assert "the last checkpoint could not be saved" in result["outcome"]
    assert [s[0] for s in pool(1, train, str(tmp_path / "x"))[0]["steps"]] == [8, 9, 10, 11]


def with_a_failing_validation(world, out: str) -> str:
    def failing(model, loader, loss, run, step):
        if step == 8:
            raise RuntimeError("sampling broke")
        return evaluate(model, loader, loss, run, step)

    evaluate, trainer.evaluate = step.evaluate, failing
    try:
        train(world, out)
    except RuntimeError as error:
        return str(error)
    finally:
        trainer.evaluate = evaluate


def test_an_exception_in_validation_loses_no_step(pool, undisturbed, tmp_path):
    """The save came before. The resume validates what was saved, then goes on."""
    assert pool(1, with_a_failing_validation, str(tmp_path / "x")) == ["sampling broke"]
    assert checkpoint.newest(tmp_path / "x/checkpoints").name == "step-000008"
    assert [s[0] for s in pool(1, train, str(tmp_path / "x"))[0]["steps"]] == [8, 9, 10, 11]
    assert metrics_of(tmp_path / "x") == metrics_of(undisturbed(1)[0])


def test_a_full_disk_does_not_end_the_run_at_a_log_line(world, tmp_path, capsys):
    run = RunFolder(settings(str(tmp_path / "x")), world)
    (tmp_path / "x/metrics.jsonl").symlink_to("/dev/full")
    run.metrics(step=1, loss=2.0)
    assert "metrics.jsonl lacks {'step': 1, 'loss': 2.0}: No space left" in capsys.readouterr().out
    run.close()


def test_a_disk_that_is_full_for_one_line_keeps_nothing_of_it(world, tmp_path, capsys):
    """The limit on a file's size stands for the disk: it takes the first five bytes of the line."""
    run = RunFolder(settings(str(tmp_path / "x")), world)
    run.metrics(step=1, loss=2.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "x/metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        run.metrics(step=2, loss=2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.metrics(step=3, loss=2.0)
    run.close()
    assert "metrics.jsonl lacks {'step': 2, 'loss': 2.0}: File too large" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(tmp_path / "x")] == [1, 3]
