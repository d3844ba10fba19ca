"""bench/: how figures are taken, counted and printed. No test depends on how fast anything is."""

import math
import os
import re
import subprocess
import sys

import pytest
import torch

from bench import cases, ceilings, counts, kernels, measure, oracles, rivals, setting
from bench.counts import Count
from kernels import reference
from nanomed.config import MODELS
from tests.conftest import ROOT

AQUILAMED = MODELS["aquilamed-7b"]


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """conftest.py turns it on for the tests of the Triton kernels; here the definitions run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


# ---------------------------------------------------------------- measure.py


def test_works_take_turns_after_a_warm_up():
    seen = []
    works = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    samples = measure.interleaved(works, rounds=3, warmup=2)
    assert "".join(seen) == "aabb" + "ab" * 3
    assert {name: len(x) for name, x in samples.items()} == {"a": 3, "b": 3}
    assert all(seconds >= 0 for column in samples.values() for seconds in column)


def test_a_ratio_is_of_pairs_and_knows_its_noise():
    base, again = [1.0, 2.0, 4.0], [1.1, 2.0, 3.8]  # one slow machine, three rounds
    twice = measure.ratio([2.0, 4.2, 8.0], base, again)
    assert (twice.median, twice.low, twice.high) == (2.0, 2.0, 2.1) and twice.differs
    assert str(twice) == "2.00 (2.00 to 2.10)"
    near = measure.ratio([1.05, 2.1, 4.2], base, again)
    assert 0.05 < near.noise < 0.1 and not near.differs
    assert str(near) == "no difference (1.05 to 1.05)"
    assert measure.ratio([3.0], [1.0], [1.0]).differs  # one round is enough to say something


def test_one_hiccup_does_not_hide_a_difference():
    base = [1.0] * 30
    again = [1.0] * 29 + [9.0]
    assert measure.ratio([1.02] * 30, base, again).differs


def test_quartiles():
    assert measure.quartiles([1, 2, 3, 4, 5]) == (2, 3, 4) and measure.quartiles([7]) == (7, 7, 7)


def test_a_measurement_comes_back_with_the_machine_it_was_taken_on(tmp_path):
    path = tmp_path / "new/folder/x.jsonl"
    for k in range(2):
        found = measure.Results(path)
        found.add("step", f"run {k}", [0.25, 0.5, 0.75], shapes={"T": 64}, dtype=torch.float32,
                  convention="causal", tokens_per_second=12_345)  # fmt: skip
    rows, runs = measure.read([path])
    assert [row["name"] for row in rows] == ["run 0", "run 1"] and len(runs) == 2
    run = runs[rows[0]["run"]]
    assert run["torch"] == torch.__version__ and run["cores"] >= 1
    assert {"commit", "dirty", "source", "date", "cpu", "threads", "load", "clean"} <= set(run)
    assert measure.shown(rows[0]) == {
        "name": "run 0", "T": 64, "dtype": "float32", "median ms": 500, "min ms": 250,
        "IQR ms": 250, "tokens per second": 12_345,
    }  # fmt: skip


def test_a_busy_machine_is_not_clean(monkeypatch):
    assert measure.fingerprint()["clean"] == (os.getloadavg()[0] <= len(os.sched_getaffinity(0)))
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 0, 0))
    assert measure.fingerprint()["clean"] is False


def test_the_code_has_a_name_without_git(monkeypatch):
    monkeypatch.setattr(measure, "_said", lambda *_: "")
    found = measure.fingerprint()
    assert found["commit"] == "" and re.fullmatch("[0-9a-f]{12}", found["source"])


def test_a_narrow_column_of_a_table_has_a_rule():
    assert measure.table([{"T": None}]).splitlines()[1] == "| -: |"


def test_a_table_is_markdown_and_aligned():
    rows = [{"name": "a", "ms": 1.23456, "n": 12345}, {"name": "long", "GB": None}]
    assert measure.table(rows).splitlines() == [
        "| name |    ms |      n | GB |",
        "| ---- | ----: | -----: | -: |",
        "| a    | 1.235 | 12,345 |    |",
        "| long |       |        |    |",
    ]


# ---------------------------------------------------------------- counts.py


def test_counts_of_aquilamed():
    """Against figures worked out elsewhere: bytes of a token by hand, and the model's causal FLOPs
    a token (3.22 GF of attention at 4,096 tokens, forward 1 part and backward 2)."""
    t = 4096
    per_token = {op: [c.bytes / t for c in of(AQUILAMED, [t])] for op, of in counts.OPS.items()}
    assert per_token["rmsnorm"] == pytest.approx([16_388, 24_580], rel=1e-3)
    assert per_token["rope"] == [20_488, 20_488]  # 40 heads of 128, read and written; a position
    assert per_token["swiglu"] == [86_016, 143_360]
    forward, backward = counts.attention(AQUILAMED, [t])
    assert 32 * 3 * forward.flops / t == pytest.approx(3.22e9, rel=1e-3)
    assert backward.flops == 2.5 * forward.flops  # scores are computed again
    forward, backward = counts.linear_nll(AQUILAMED, [t])
    assert (forward + backward).flops == 6 * 621_981_696 * t


def test_attention_pays_for_documents_not_for_the_row():
    whole, halves = (counts.attention(AQUILAMED, lengths)[0] for lengths in ([64], [32, 32]))
    assert whole.bytes == halves.bytes and 1.9 < whole.flops / halves.flops < 2


def test_the_floor_is_the_slower_of_memory_and_arithmetic():
    gpu = counts.GPU(bandwidth=100, flops=1000)
    assert gpu.floor(Count(200, 1000)) == 2 and gpu.floor(Count(200, 3000)) == 3


def test_traffic_counts_what_operations_read_and_write():
    x = torch.empty(10, 100, device="meta")
    with counts.Traffic() as seen:
        x.t()  # a view moves nothing
    assert seen.bytes == 0
    with counts.Traffic() as seen:
        (x + x[0]).exp_()  # reads x and one row, writes; reads and writes
    assert seen.bytes == 4 * (1000 + 100 + 1000 + 1000 + 1000)


def test_the_docs_show_what_the_formulas_give():
    text = (ROOT / "docs/kernels.md").read_text("utf-8")
    for rows in counts.tables(AQUILAMED, counts.TOKENS):
        assert measure.table(rows) in text
    c, t, head = AQUILAMED, counts.TOKENS, AQUILAMED.vocab_size * counts.TOKENS
    for figure in (
        f"{counts.H200.flops / counts.H200.bandwidth:.0f} operations for each byte",
        f"{2 * c.d_model * 2 + 4:,} bytes a token",
        f"{counts.rmsnorm(c, [t])[0].bytes / 1e6:.0f} MB / 4.8 TB/s = 28 µs",
        f"{counts.naive('rmsnorm', c, t)[0] / c.d_model / t:.0f} bytes for the 4",
        f"{2 * c.d_ff:,} bytes a token and layer, {2 * c.d_ff * c.n_layers * t / 1e9:.1f} GB",
        f"{t * c.n_heads * 2 / 1e3:.0f} KB",
        f"{counts.attention(c, [t])[0].flops / 1e12:.2f} TFLOP forward",
        f"{head / 1e9:.2f} billion logits of 8,192 tokens are {2 * head / 1e9:.1f} GB in bf16",
        f"{16 * head / 1e9:.0f} GB with a float32 copy",
        f"{6 * c.vocab_size * c.d_model / 1e9:.1f} GFLOP a token",
        f"{2 * head * c.d_model / counts.H200.flops * 1e3:.1f} ms each",
    ):
        assert figure in " ".join(text.split()), figure
    packed = cases.documents(counts.TOKENS, "chats")
    pairs = counts.attention(AQUILAMED, [counts.TOKENS])[0].flops
    share = pairs / counts.attention(AQUILAMED, packed)[0].flops
    assert f"{len(packed)} packed chats" in text and f"1/{share:.0f} of the pairs" in text


# ---------------------------------------------------------------- kernels.py


@pytest.fixture
def tiny(tmp_path) -> setting.Setting:
    torch.manual_seed(0)
    return setting.Setting(
        torch.device("cpu"), setting.TINY, torch.float32, 1, measure.Results(tmp_path / "x.jsonl")
    )


def test_a_row_of_chats_is_full():
    assert sum(cases.documents(8192, "chats")) == 8192
    assert cases.documents(8192, "one") == [8192]
    assert len(cases.documents(8192, "chats")) > 30 and min(cases.documents(48, "chats")) > 0


@pytest.mark.parametrize("op", counts.OPS)
def test_the_definition_passes_the_gate_and_then_is_timed(tiny, op):
    case = cases.build(tiny, op, cases.documents(48, "chats"))
    assert kernels.gate(tiny, case)
    kernels.measure(tiny, case, {"copy": 1e9, "matmul": 1e9})
    lines = [line for line in tiny.results.lines if line["kind"] == "kernel"]
    assert len(lines) == len(kernels.passes(op)) * len(case.works)
    assert all(len(line["samples"]) == 1 and "of_ceiling" in line["facts"] for line in lines)


def planted(case: cases.Case, change) -> cases.Case:
    """The case with our version's first output changed."""
    name = next(iter(case.works))
    right = case.works[name]

    def wrong(*inputs):
        out = right(*inputs)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    case.works = {**case.works, name: wrong}
    return case


def one_element(x):
    mask = torch.zeros_like(x)
    mask.view(-1)[7] = 0.5
    return x + mask


@pytest.mark.parametrize(
    "change",
    [
        one_element,
        lambda x: torch.where(x == x.max(), torch.nan, x),
        lambda x: x * (1 + 2e-6),
        lambda x: x + 1e-6 * x.square().detach() * 3,
        lambda x: x.detach() + 0 * x,  # right values, no gradient
    ],
    ids=["one element", "nan", "scale", "bias", "gradient"],
)
@pytest.mark.parametrize("op", ["swiglu", "attention"])
def test_the_gate_sees(tiny, op, change):
    case = planted(cases.build(tiny, op, cases.documents(48, "chats")), change)
    assert not kernels.gate(tiny, case)


def test_the_gate_sees_one_element_that_hides_in_a_norm(tiny):
    """One wrong element of half a million adds less to the norm than bfloat16's own rounding."""
    tiny.dtype = torch.bfloat16
    case = cases.build(tiny, "swiglu", [1024])
    right = next(iter(case.works.values()))(*case.inputs)
    assert kernels.distance(one_element(right), right)[0] < torch.finfo(torch.bfloat16).eps / 4
    assert kernels.gate(tiny, case) and not kernels.gate(tiny, planted(case, one_element))


def test_what_is_not_finite_is_infinitely_wrong():
    for value in (torch.nan, torch.inf):
        assert kernels.distance(torch.tensor([1, value]), torch.ones(2)) == (math.inf, math.inf)


def test_the_gate_fails_if_both_are_wrong(tiny):
    case = cases.build(tiny, "rmsnorm", [16])
    case.works = {name: lambda x, w: x * w for name in case.works}
    assert not kernels.gate(tiny, case)


def test_what_fails_is_not_timed_and_the_others_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(oracles, "swiglu", lambda gate, up: gate * up)
    monkeypatch.setattr(reference, "rope", None)  # cannot run at all
    path = tmp_path / "x.jsonl"
    command = "x --device cpu --quick --tokens 16 --ops swiglu rope rmsnorm --results"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(path)])
    with pytest.raises(SystemExit, match=r"swiglu over 16 tokens.*wrong.*rope.*TypeError"):
        kernels.main()
    names = [line["name"] for line in measure.read([path])[0] if line["kind"] == "kernel"]
    assert names and all(name.startswith("rmsnorm") for name in names)
    assert "FAILED" in capsys.readouterr().out


def test_the_interpreter_is_not_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = f"x --device cpu --quick --tokens 16 --results {tmp_path}/x.jsonl"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        kernels.main()
    assert "mean nothing" in capsys.readouterr().err


def test_a_rival_that_cannot_run_is_a_line_that_says_so(tiny):
    case = cases.build(tiny, "rmsnorm", [16])

    def broken(x, w):
        raise RuntimeError("no such kernel\nmore")

    case.works["rival"] = broken
    kernels.measure(tiny, case, {"copy": 1e9, "matmul": 1e9})
    notes = [line["facts"].get("note") for line in tiny.results.lines if not line["samples"]]
    assert notes == ["RuntimeError: no such kernel"] * 3
    case.works["definition"] = broken
    with pytest.raises(RuntimeError):
        kernels.measure(tiny, case, {"copy": 1e9, "matmul": 1e9})


def test_the_mask_of_documents():
    borders = torch.tensor([0, 1, 3], dtype=torch.int32)
    assert rivals.document_mask(borders).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_the_heads_matmuls_with_padded_rows(tiny):
    """The logits as they are, in padded rows, and of those the columns up to a multiple of 128."""
    ceilings.head(tiny, 3)
    names = [line["name"] for line in tiny.results.lines]
    assert [name for name in names if "logits" in name] == [
        "head, logits, 1,003 columns, rows 1,003 apart",
        "head, logits, 1,003 columns, rows 1,024 apart",
        "head, logits, 896 columns, rows 1,024 apart",
    ]
    assert len(names) == 9


def test_a_layer_is_judged_in_every_version_of_ours(tiny):
    """Also `auto`, what a run picks; torch.compile is not ours to judge."""
    case = cases.build(tiny, "layer", [20, 12], triton=False)
    assert kernels.gate(tiny, case) and case.ours == ["definition"] == [case.held_against]
    right = case.works["definition"]
    twice = lambda *x: 1.1 * right(*x)  # noqa: E731
    for wrong, passes in (("triton", False), ("auto", False), ("torch.compile", True)):
        case.works = dict.fromkeys(["triton", "auto", "definition", "torch.compile"], right)
        case.works[wrong] = twice
        assert kernels.gate(tiny, case) == passes, wrong
    kernels.measure(tiny, case, {"copy": 1e9, "matmul": 1e9})
    assert [line["facts"]["gate"] for line in tiny.results.lines[1:3]] == ["FAILED", "passed"]


def test_a_layers_operations():
    """32 layers and the head are the model's causal count, 48.83 GFLOP a token at 4,096 (of which
    scores computed again in backward are no part)."""
    forward, backward = counts.layer(AQUILAMED, [4096])
    again = counts.attention(AQUILAMED, [4096])[0].flops / 2
    model = 32 * ((forward + backward).flops - again) / 4096 + 6 * 621_981_696
    assert model == pytest.approx(48.83e9, rel=1e-3)


@pytest.mark.slow
def test_the_triton_kernels_pass_the_gate_in_the_interpreter(tmp_path):
    command = "-m bench.kernels --parity --device cpu --tokens 48 --results"
    run = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "x.jsonl")],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300,
    )  # fmt: skip
    rows, _ = measure.read([tmp_path / "x.jsonl"])
    assert run.returncode == 0 and len(rows) == 6
    assert all("triton" in row["name"] and row["facts"]["gate"] == "passed" for row in rows)
