"""bench/step.py: its parts, its gate, its counts. It checks no speed."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

from bench import gate, results, step_gpu, step_rivals, step_scaling
from bench import step as bench_step
from bench.measure import Results, between, now, read
from bench.ours import PARTS, Ours, in_parts, model_of, settings
from bench.setting import Setting
from bench.theirs import Plain, Stepped, padded, qwen2
from nanomed.config import CPT, DPO, MODELS, SFT
from nanomed.run.log import flops_of
from tests.data import Examples


def setting(world, config, folder, dtype=torch.float32) -> Setting:
    return Setting(world.device, config, dtype, 2, Results(folder / "x.jsonl"), world)


def test_the_parts_of_a_step_are_the_whole_and_change_nothing(world, small):
    """And a DPO step, whose reference is computed at its start."""
    for cls, segments in ((CPT, 1), (DPO, 2)):
        c = settings(cls, 4, 64)
        data = Examples.of_lengths([20, 31, 9, 25], small.vocab_size, segments)
        plain, marked = (Ours(world, small, data, c, torch.float32) for _ in range(2))
        plain()
        started = now(on_gpu=False)
        seconds = in_parts(marked)
        whole = between(started, now(on_gpu=False))
        assert marked.tokens == plain.tokens == [85 * segments]
        for p, q in zip(plain.model.parameters(), marked.model.parameters(), strict=True):
            assert torch.equal(p, q)
        assert list(seconds) == list(PARTS) and min(seconds.values()) > 0
        assert sum(seconds.values()) <= whole


def test_the_gate_lets_transformers_pass_and_stops_another_model(world, small):
    plain = model_of(world, small, torch.float32, sharded=False)
    data = Examples.of_lengths([20, 31, 9], small.vocab_size)
    segments = [data[i][0] for i in range(3)]
    batch = {n: x for n, x in padded(segments).items() if n != "labels"}
    batch["labels"] = padded(segments)["labels"]
    assert [len(s.ids) for s in gate.segments_of(batch)] == [20, 31, 9]
    n = sum(int(s.trained[1:].sum()) for s in segments)

    def pass_gate(theirs):
        loss = theirs(**batch, num_items_in_batch=n).loss
        gate.gate(plain, "theirs", theirs, loss, gate.next_token_loss(plain, segments))

    pass_gate(qwen2(small, plain, torch.device("cpu")))
    other = dataclasses.replace(small, rope_theta=1e4)
    with pytest.raises(SystemExit, match="computes something else"):
        pass_gate(qwen2(other, plain, torch.device("cpu")))


def test_the_gate_takes_the_rows_that_the_transformers_loop_is_timed_on(world, small):
    """Padded chats of a step, or its full rows, each one document of which all but the first token
    is trained on. A model whose weights have moved does not pass."""
    plain = model_of(world, small, torch.float32, sharded=False)
    c = settings(CPT, 3, 64)
    data = Examples.of_lengths([20, 31, 14], small.vocab_size)
    for block, lengths in ((0, [20, 31, 14]), (16, [16, 16, 16, 16])):
        model = qwen2(small, plain, torch.device("cpu"))
        loop = Plain(model, data, c, torch.float32, lambda k: [0, 1, 2], block)
        segments = gate.segments_of(loop.batch(0))
        assert [len(s.ids) for s in segments] == lengths
        assert all(s.trained[1:].all() for s in segments)
        gate.plain_gate(plain, "loop", model, loop.batch(0))
        loop()
        assert loop.k == 1 and loop.tokens == [sum(lengths)]
        with pytest.raises(SystemExit, match="computes something else"):
            gate.plain_gate(plain, "loop", model, loop.batch(0))


def test_flops_of_the_aquilamed_step():
    """48.83 GF per token at 4,096 by the causal count; full recompute, and of the head's chunks all
    but the last again on top: a row of 16,384 tokens has two."""
    model = MODELS["aquilamed-7b"]
    head = 2 * model.vocab_size * model.d_model * 4096
    c = settings(CPT, 1, 4096)
    counted, executed = step_gpu.flops(model, [4096], c)
    assert counted == flops_of(model, 4096, 4096**2)
    assert counted / 4096 == pytest.approx(48.83e9, rel=1e-4)
    assert executed == counted
    long, full = (
        dataclasses.replace(c, **x) for x in ({"micro_tokens": 16_384}, {"recompute": "full"})
    )
    assert step_gpu.flops(model, 4 * [4096], long)[1] == 4 * counted + 2 * head
    assert step_gpu.flops(model, [4096], full)[1] == pytest.approx(counted * 4 / 3 - head)


def test_a_gpu_lines_facts_on_a_cpu(world, small, tmp_path):
    """Every stage's rows are full, and the line can be read back."""
    s = setting(world, small, tmp_path, torch.bfloat16)
    for stage, cls in (("cpt", CPT), ("sft", CPT), ("dpo", DPO)):
        data = step_gpu.examples(stage, 128, small, longest=100)
        c = dataclasses.replace(settings(cls, len(data), 128), dtype="bf16")
        ours = Ours(world, small, data, c, torch.bfloat16)
        line = step_gpu.measure(s, stage, ours, rounds=1)
        lengths = [len(s.ids) for i in range(len(data)) for s in data[i]]
        assert abs(sum(lengths) - 128 * step_gpu.N_ROWS) <= 128
        assert line["facts"]["real_tokens_per_s"] > 0 and line["facts"]["MFU"] is None
        assert not math.isnan(line["facts"]["predicted_GiB"])
    lines, _ = read([tmp_path / "x.jsonl"])
    assert [line["name"] for line in lines] == ["tiny CPT", "tiny SFT", "tiny DPO"]
    assert np.all([line["samples"][0] > 0 for line in lines])


def test_the_table_of_growth(world, small, tmp_path, monkeypatch):
    """Its rows are full and are of the lengths that they say; the ratio is of rates, not of times,
    and stands beside the longest row."""
    s, seen = setting(world, small, tmp_path), []

    def timed(sides, rounds, **_):
        for name, side in sides.items():
            if name != "again":
                rows = side.loader.step(0)
                seen.append([len(rows), *(n for r in rows for n in r.cu_seqlens.diff().tolist())])
        size = {name: name[1] if name != "again" else 64 for name in sides}
        return {name: [n / 1000, n / 500] for name, n in size.items()}

    with monkeypatch.context() as patch:
        patch.setattr(step_scaling, "interleaved", timed)
        lines = step_scaling.growth(s, 32, (64, 128), (8,))
    assert seen == [[1, 32, 32], [1, 32, 32, 32, 32], [1, *[8] * 8]]
    assert [line["facts"].get("of_the_rate_at_64") for line in lines] == [
        None, "no difference (1.00 to 1.00)", None
    ]  # fmt: skip
    assert step_scaling.growth(s, 32, (64, 128), (8,))


def test_fsdp2_is_held_against_a_loop_that_takes_the_same_steps(
    world, small, tmp_path, monkeypatch
):
    s, weights = setting(world, small, tmp_path), []

    def timed(sides, rounds, *_, **__):
        for name, side in sides.items():
            if name != "again":
                side()
                weights.append(list(side.model.parameters()))
        return {name: [1.0 if "unsharded" in name else 2.0] * rounds for name in sides}

    monkeypatch.setattr(step_scaling, "interleaved", timed)
    step_scaling.fsdp(s, 32, 64)
    for p, q in zip(*weights, strict=True):
        assert isinstance(p, DTensor) and not isinstance(q, DTensor)
        assert p.dtype == q.dtype == torch.bfloat16
        torch.testing.assert_close(p.to_local(), q)
    assert [line["facts"] for line in s.results.lines] == [
        {},
        {"FSDP2_takes": "2.00 (2.00 to 2.00)"},
    ]


def test_a_ratio_is_over_all_turns_whose_steps_differ(world, small, tmp_path, monkeypatch):
    """In the first turn the other's step has 10 tokens and takes 4 s, in the second 30 and 3 s."""
    took = {"ours": [1.0, 1.0], "again": [1.0, 1.0], "theirs": [4.0, 3.0]}
    monkeypatch.setattr(bench_step, "interleaved", lambda *_, **__: took)
    sides = {
        name: types.SimpleNamespace(tokens=tokens, dtype=torch.float32, setting="")
        for name, tokens in (("ours", [10, 10]), ("again", [10, 10]), ("theirs", [10, 30]))
    }
    s = setting(world, small, tmp_path)
    bench_step.compare(s, "SFT", sides)
    assert s.results.lines[-1]["facts"]["nanomed_is_faster_by"] == "1.75 (1.00 to 4.00)"
    assert s.results.lines[-1]["facts"]["real_tokens_per_s"] == 6


def test_rivals_run_in_the_cpus_faster_dtype_too(world, tmp_path, monkeypatch):
    """nanomed first in float32, what a run on a CPU computes in."""
    given = types.SimpleNamespace(quick=True, rounds=0, dtypes=None, results=tmp_path / "x.jsonl")
    data = Examples.of_lengths([20, 31], bench_step.VOCABULARY)
    for takes, more in ((0.3, ["nanomed, bf16"]), (80.0, [])):
        monkeypatch.setattr(bench_step, "bf16_takes", lambda takes=takes: takes)
        b = bench_step.Bench(given, world, tmp_path)
        sides = bench_step.nanomed(b, data, settings(CPT, 2, 64))
        assert list(sides) == ["nanomed", "nanomed, again", *more]
        assert sides["nanomed"].dtype == torch.float32
        loops = dict(bench_step.loops(b, "loop", data, sides["nanomed"].c, lambda k: [0, 1]))
        assert [x.dtype for x in loops.values()] == [torch.float32, torch.bfloat16][: 1 + len(more)]


def test_every_side_of_the_comparison_names_its_setting(world, small):
    data, pairs = (Examples.of_lengths([20, 31], small.vocab_size, n) for n in (1, 2))
    ours = Ours(world, small, data, settings(CPT, 2, 64), torch.bfloat16)
    assert ours.setting == "packed rows of up to 72 tokens, float32 weights cast to bfloat16"
    ours = Ours(world, small, pairs, settings(DPO, 2, 64), torch.float32)
    assert ours.setting == "packed rows of up to 72 tokens, float32, reference computed before"
    for block, words in ((0, "padded to the longest of the batch"), (16, "full rows of 16 tokens")):
        loop = Plain(ours.model, data, ours.c, torch.float32, lambda k: [0, 1], block)
        assert loop.setting.startswith(f"transformers {transformers.__version__}: {words}")


def test_the_page_says_which_setting_of_trl_is_the_fastest():
    def line(name, rate, ratio):
        facts = {"real_tokens_per_s": rate} | ({"nanomed_is_faster_by": ratio} if ratio else {})
        return {"name": name, "facts": facts}

    lines = [
        line("SFT: nanomed", 900, None),
        line("SFT: TRL as shipped", 100, "6.49 (2.56 to 8.51)"),
        line("SFT: TRL by length", 200, "1.52 (1.10 to 4.12)"),
        line("SFT: TRL packing", 300, "1.86 (1.61 to 2.13)"),
        line("CPT: transformers loop, full rows", 950, "0.95 (0.90 to 0.97)"),
        line("CPT: TRL packing", 300, "no difference (0.97 to 1.02)"),
        line("CPT: TRL off", 200, "1.72 (1.56 to 1.82)"),
    ]
    sft, cpt = results.fastest(lines)
    assert "SFT: of the 3 settings of TRL, *packing* is the fastest" in sft
    assert "1.86 times (1.61 to 2.13) as fast as it" in sft and "by length" not in sft
    assert "*packing* is the fastest" in cpt and "as fast (no difference" in cpt
    assert results.fastest(lines[:1]) == []


def test_a_trainers_step_counts_the_tokens_of_all_its_batches():
    """Without padding; the gate sees the first batch alone, with its loss and divisor."""
    ids = torch.ones(2, 5, dtype=torch.int64)
    batches = [{"input_ids": ids, "attention_mask": ids.tril()}, {"input_ids": ids}] * 2

    class Trainer:
        add_callback = lambda self, side: setattr(self, "side", side)  # noqa: E731
        remove_callback = lambda *_: None  # noqa: E731

        def training_step(self, model, inputs, divisor):
            return 2.0

        def train(self):
            control = types.SimpleNamespace(should_training_stop=False)
            for i, inputs in enumerate(batches):
                self.training_step(None, inputs, 7)
                if i % 2:
                    self.side.on_step_end(None, None, control)

    seen = []
    side = Stepped(Trainer(), torch.float32, "", lambda *x: seen.append(x))
    side()
    side()
    side.close()
    assert [*map(int, side.tokens)] == [3 + 10, 3 + 10] and seen == [(batches[0], 2.0, 7)]


@pytest.mark.slow
def test_trl_beside_nanomed_as_on_a_gpu(world, small, tmp_path):
    """Trainers share weights and AdamW's state; a step's tokens are those of all its batches, and
    each starts from nanomed's weights. What cannot run or computes something else has no time, and
    does not stop the others."""
    s = setting(world, small, tmp_path, torch.bfloat16)
    data = Examples.of_lengths([20, 31, 14, 9] * 4, small.vocab_size)
    sides = step_rivals.Sides(s, settings(SFT, 4, 64), data, tmp_path)
    [plan] = step_rivals.plans(4, 64, 74, on_gpu=False)
    plan = {
        "padded": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
        "broken": dict(packing=True, max_length=None),
        "packed": plan["packing, no checkpointing"] | dict(gradient_accumulation_steps=3),
    }
    assert step_rivals.measure(sides, plan) == []
    facts = {line["name"]: line["facts"] for line in s.results.lines}
    assert list(facts) == [
        "SFT: TRL broken", "SFT: nanomed", "SFT: nanomed, again", "SFT: TRL padded",
        "SFT: TRL packed",
    ]  # fmt: skip
    assert facts["SFT: TRL broken"]["note"].startswith("ValueError: When packing is enabled")
    assert 64 < facts["SFT: TRL packed"]["tokens_a_step"] <= 3 * 64
    assert "max_length=64" in facts["SFT: TRL packed"]["setting"]
    assert sides.their_adamw.state[next(sides.theirs.parameters())]["step"] == 8
    assert len(results.fastest(s.results.lines)) == 1

    sides.theirs.model.rotary_emb.inv_freq.mul_(0.9)
    assert step_rivals.measure(sides, {"another RoPE": plan["packed"]}) == ["another RoPE"]
    assert "something else" in s.results.lines[-1]["facts"]["note"]
