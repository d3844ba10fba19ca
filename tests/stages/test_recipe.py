"""docs/recipe.md, configs/, --help and the report say the same numbers; and the plan they give."""

import dataclasses
import math
import tomllib

import pytest

import kernels
from nanomed import store
from nanomed.arguments import parse
from nanomed.batches.loader import Loader
from nanomed.config import CPT, DPO, MODELS, SFT, InputError, Run
from nanomed.run.log import Meter, flops_of
from nanomed.stages import dry_run, link, memory, stage
from nanomed.stages.hardware import parse_hardware
from tests.conftest import ROOT

STAGES = {"cpt_stage1": CPT, "cpt_stage2": CPT, "sft": SFT, "dpo": DPO}
# From the report itself, for each of STAGES; None where it says nothing.
REPORT = {
    "lr": (1e-4, 1e-5, 2e-6, 2e-7),
    "warmup_ratio": (0.05, 0.01, None, None),
    "batch_size": (768, 384, 128, 64),
    "seq_len": (4096, 4096, 2048, None),
    "epochs": (1, 1, 2, 2),
    "val_fraction": (None, None, 0.1, None),
    "weight_decay": (None, None, 0.1, None),
    "dropout": (None, None, 0.1, None),  # not followed: SPOILS says why
    "dtype": (None, None, "bf16", None),
    "beta": (None, None, None, 0.03),
    "hardware": ("24xA100-40G", "24xA100-40G", "8xA100-40G", "8xA100-40G"),
    "examples": (math.ceil(60e9 / 4096), math.ceil(20e9 / 4096), 320_000, 12_727),
}

SPOILS = ("dropout", "sft")  # published and not followed, for the reason that the ledger gives


def config(name: str) -> Run:
    return parse(STAGES[name], ["--config", str(ROOT / f"configs/{name}.toml")])


def model(c: Run):
    return MODELS["aquilamed-7b"]


def table(title: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the first table under a heading of docs/recipe.md."""
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8").split(f"## {title}\n")[1]
    lines = text.split("\n## ")[0].splitlines()
    cells = [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("| ")]
    return {row[0].strip("`"): row[1:] for row in cells[1:]}


LEDGER = table("Settings")


# ---------------------------------------------------------------- the ledger


@pytest.mark.parametrize("column, name", list(enumerate(STAGES)))
def test_configs_equal_the_ledger_and_the_report(column, name):
    c = config(name)
    for flag, cells in LEDGER.items():
        cell, value = cells[column], getattr(c, flag, "—")
        assert type(value)(cell.strip("*")) == value, (name, flag)
        published = REPORT.get(flag, (None,) * 4)[column]
        if (flag, name) == SPOILS:
            assert value != published and f"published is {published}" in cells[4]
            published = None
        assert (published is not None) == ("*" not in cell and cell != "—"), (name, flag)
        if published is not None:
            assert value == published, (name, flag)
    set_here = tomllib.loads((ROOT / f"configs/{name}.toml").read_text(encoding="utf-8"))
    assert set(set_here) == {f for f, cells in LEDGER.items() if cells[column] != "—"} | {"data"}


# They decide what is trained and are no part of the recipe: where it starts, and chance.
NO_RECIPE = {"init", "seed"}


def is_off(flag: dataclasses.Field) -> bool:
    """Ours alone, and it does nothing unless it is given."""
    return not flag.default and not flag.metadata["paper"]


def test_every_flag_that_decides_what_is_trained_is_in_the_ledger():
    """A resume compares the same flags: a new one is compared unless stage.py says that it may
    change, so it is either there or here. One that is off is no part of the recipe."""
    for cls in (CPT, SFT, DPO):
        flags = [f for f in dataclasses.fields(cls) if not is_off(f)]
        decides = {f.name for f in flags} - stage.MAY_CHANGE - NO_RECIPE
        assert decides <= set(LEDGER), (cls.stage, decides - set(LEDGER))


def test_every_choice_has_its_reason():
    for flag, cells in LEDGER.items():
        assert any("*" in cell for cell in cells[:4]) <= bool(cells[4]), flag


@pytest.mark.parametrize("cls", [CPT, SFT, DPO])
def test_help_tells_the_papers_values(cls):
    told = {f.name: f.metadata["paper"] for f in dataclasses.fields(cls) if f.metadata["paper"]}
    for flag, paper in told.items():
        if flag in ("examples", "hardware"):  # written as the report writes them
            assert all(paper)
            continue
        for text, value in zip(paper, REPORT.get(flag, (None,) * 4), strict=True):
            assert (type(value)(text) if text else None) == value, flag
    missing = {f for f, values in REPORT.items() if hasattr(cls, f) and f not in told}
    assert not missing


def test_defaults_are_the_recipes():
    """Without --config, each stage's defaults train as its (first) config does."""
    for name in ("cpt_stage1", "sft", "dpo"):
        c, default = config(name), parse(STAGES[name], ["--init", "x"])
        for flag in REPORT.keys() - {"dtype", "examples"}:
            assert getattr(c, flag, None) == getattr(default, flag, None), (name, flag)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("column, name", list(enumerate(STAGES)))
def test_what_follows(column, name):
    c, follows = dataclasses.replace(config(name), kernels="reference"), table("What follows")
    hw = parse_hardware(c.hardware)
    train, val = dry_run.published_work(c)
    nothing_held_out = dataclasses.replace(c, val_fraction=0.0)
    all_steps = dry_run.n_steps(c, dry_run.published_work(nothing_held_out)[0])
    gib = link.gib(model(c), link.decided(model(c), c, hw), hw)
    days = dry_run.flops(c, model(c), train, val) / (hw.n_gpus * 312e12 * 0.5) / 86400
    assert follows["steps if nothing is held out"][column] == str(all_steps)
    assert follows["steps"][column] == str(dry_run.n_steps(c, train))
    assert follows["predicted GiB on each GPU"][column] == f"{gib:.1f}"
    assert follows["days at an MFU of 50%, at most"][column] == f"{days:.1f}"


MACHINES = ("24xA100-40G", "8xA100-40G", "8xA100-40G-PCIe", "8xH800", "1xH200")


def bounds(machine: str, name: str) -> str:
    """A row of the table of docs/recipe.md."""
    c, hw = config(name), parse_hardware(machine)
    step = dry_run.step_of(c, dry_run.published_work(c)[0])
    best = link.advice(model(c), c, hw, step)
    computing, exchanging = link.seconds(model(c), best, hw, step)
    cells = (
        f"`{machine}`", name, f"`{link.flags(best, hw)}`", f"{link.gib(model(c), best, hw):.1f}",
        f"{computing:.2f}", f"{exchanging:.2f}", f"{step.tokens / max(computing, exchanging):,.0f}",
        link.rules(model(c), best, hw, step),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def test_the_table_of_bounds():
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    for machine in MACHINES:
        for name in ("cpt_stage1", "sft"):
            assert bounds(machine, name) in text


def test_steps_of_the_report():
    """60e9 and 20e9 tokens; 2 x 198.9 steps of DPO, of which the released weights are the 350th."""
    steps = [int(n) for n in table("What follows")["steps if nothing is held out"]]
    assert abs(steps[0] - 60e9 / (768 * 4096)) < 1 and abs(steps[1] - 20e9 / (384 * 4096)) < 1
    assert steps[2:] == [2 * 2500, 398]
    assert int(table("What follows")["steps"][2]) == 2 * 2250
    assert 350 <= int(table("What follows")["steps"][3]) < 398


@pytest.mark.parametrize("name", STAGES)
def test_rows_and_recompute_are_the_cheapest_within_36_gib(name):
    """Whichever kernels run."""
    c = config(name)
    n_gpus = parse_hardware(c.hardware).n_gpus

    def fits(recompute: str, micro_tokens: int) -> bool:
        changed = {"recompute": recompute, "micro_tokens": micro_tokens}
        runs = [dataclasses.replace(c, kernels=k, **changed) for k in kernels.CHOICES]
        return all(sum(memory.memory(model(c), run, n_gpus).values()) < 36 for run in runs)

    assert fits(c.recompute, c.micro_tokens) and not fits(c.recompute, 2 * c.micro_tokens)
    assert c.recompute == "lean" and not fits("none", c.micro_tokens)
    seconds = dry_run.published_work(c)[0].flops(model(c)) * c.batch_size
    seconds /= dry_run.published_work(c)[0].examples * n_gpus * 312e12 * 0.5
    assert c.save_every * seconds < 4200


def test_the_parameters_and_flops_of_aquilamed():
    m = MODELS["aquilamed-7b"]
    assert m.n_params() == 8_223_748_096  # tests/model/test_options.py counts them
    assert sum(memory.states(m, 8).values()) == 16 * 8_223_748_096 / 8
    a_slice = dry_run.Work(4096, 4096**2, 1)
    assert a_slice.flops(m) / 4096 == pytest.approx(48.83e9, rel=1e-4)  # causal count
    assert dry_run.disk(config("sft"), m, 0)["checkpoints"] / 4 == pytest.approx(98.7e9, rel=1e-3)


# ---------------------------------------------------------------- on the screen


def test_a_dry_run_of_the_papers_sft(monkeypatch, capsys, tmp_path):
    import train_sft

    monkeypatch.chdir(ROOT)
    flags = ["--config", "configs/sft.toml", "--model", "aquilamed-7b", "--dry_run"]
    monkeypatch.setattr("sys.argv", ["train_sft.py", *flags, "--out", str(tmp_path / "run")])
    train_sft.main()
    text = capsys.readouterr().out
    for part in (
        "8,223,748,096 parameters",
        "3.83 GiB  4 bytes x parameters / GPUs",
        "steps: 4,500 of 128",
        "at most 6.09e+19 FLOPs",
        "at most 13.5 hours at an assumed MFU of 50% of 8 x 312 TFLOP/s",
        "checkpoints 394.7 GB, export 16.4 GB",
    ):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_without_published_numbers_the_data_are_counted(encoder, monkeypatch, capsys):
    import train_sft

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train_sft.py", "--dry_run"])
    train_sft.main()
    text, c = capsys.readouterr().out, parse(SFT, [])
    data = store.chats(c.data, encoder, c.seq_len, c.allow_drop)
    n_train = sum(data.keys >= 2**64 // 10)
    assert f"{n_train:,} examples to train on, {len(data) - n_train} held out" in text
    assert f"steps: {-(-n_train // c.batch_size) * c.epochs:,} of {c.batch_size}" in text
    assert "at most" not in text and "fits" in text


def test_a_prompt_that_two_answers_share_is_counted_once(encoder):
    """The FLOPs of an epoch are those of its rows, as a run counts them; without, 1.8 times."""
    c = parse(DPO, [])
    data, m = store.pairs(c.data, encoder, c.seq_len, c.allow_drop), MODELS["tiny"]
    train, val = dry_run.counted_work(c, data)
    loader = Loader(c, data)
    for part, work in ((loader.train, train), (loader.val, val)):
        meter = Meter(m, 1)
        for row in loader.rows(part):
            meter.count(row)
        assert work.tokens == meter.tokens > 1.5 * meter.computed
        assert work.flops(m) == flops_of(m, meter.computed, meter.squares)
        epoch = dry_run.step_of(c, work).flops(m) * len(part) / c.batch_size
        assert epoch == pytest.approx(work.flops(m))


def test_what_does_not_fit_gets_a_remedy(capsys):
    c = dataclasses.replace(config("sft"), micro_tokens=65_536, recompute="none")
    dry_run.show(c, model(c), load=None)
    remedy = capsys.readouterr().out.split("DOES NOT FIT; ")[1].split(" fits")[0].split()
    changed = dataclasses.replace(c, recompute=remedy[1], micro_tokens=int(remedy[3]))
    assert sum(memory.memory(model(c), changed, 8).values()) <= 39.5
    alone, step = parse_hardware("1xA100-40G"), dry_run.step_of(c, dry_run.published_work(c)[0])
    assert "more GPUs" in link.remedy(model(c), c, alone, step)


def test_a_plan_has_something_to_train_on():
    c = dataclasses.replace(config("sft"), examples=2, val_fraction=0.9)
    with pytest.raises(InputError, match="--examples 2 leaves none to train on"):
        dry_run.show(c, model(c), load=None)


@pytest.mark.parametrize("text", ["A100-40G", "0xA100-40G", "8xA100"])
def test_unknown_hardware(text):
    c = dataclasses.replace(config("sft"), hardware=text)
    with pytest.raises(InputError, match=r"--hardware is .* like 8xA100-40G"):
        dry_run.show(c, model(c), load=None)


def test_a_dpo_row_holds_a_pair():
    with pytest.raises(InputError, match="micro_tokens is 4095; it must be at least 2 x --seq_len"):
        parse(DPO, ["--micro_tokens", "4095", "--seq_len", "2048"])
    with pytest.raises(InputError, match="--beta is 0"):
        parse(DPO, ["--beta", "0"])
