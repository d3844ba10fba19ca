"""bench/: what the kernels are compared with, and which of their passes are timed."""

import dataclasses
import inspect
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, ceilings, counts, kernels, measure, rivals, setting


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> setting.Setting:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the definitions run, not the kernels
    torch.manual_seed(0)
    return setting.Setting(
        torch.device("cpu"), setting.TINY, torch.float32, 1, measure.Results(tmp_path / "x.jsonl")
    )


def test_backward_alone_keeps_its_graph(tiny):
    """All but linear_nll's, whose logits serve one backward."""
    case = cases.build(tiny, "rmsnorm", [16])
    calls = 0

    def counted(x, w):
        nonlocal calls
        calls += 1
        return case.works["definition"](x, w)

    run = kernels.call(counted, case.inputs, "backward")
    first, second = run(), run()
    assert [x.shape for x in first] == [x.shape for x in case.inputs]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and calls == 1
    assert [op for op in counts.OPS if "backward" not in kernels.passes(op)] == ["linear_nll"]


def test_a_version_that_overwrites_its_inputs_has_its_own(tiny):
    case = cases.build(tiny, "rmsnorm", [16])
    before = [x.clone() for x in case.inputs]
    kernels.call(lambda x, w: x.detach().zero_() + w, case.inputs, "forward")()
    assert all(torch.equal(a, b) for a, b in zip(case.inputs, before, strict=True))


@pytest.mark.slow
def test_a_compiled_rivals_graph_is_kept_too():
    """At this size torch.compile's backward would write into a saved tensor, and refuse."""
    s = SimpleNamespace(on_gpu=True)
    compiled = partial(rivals.rmsnorm(s, 1e-5)["torch.compile"], eps=1e-5)
    for what in kernels.PASSES:
        run = kernels.call(compiled, [torch.randn(64, 128), torch.randn(128)], what)
        first, again = run(), run()
        assert all(map(torch.equal, kernels._tuple(first), kernels._tuple(again))), what


ONE = torch.tensor([0, 16], dtype=torch.int32)  # the borders of a row that is one document


def test_rivals_that_are_made_for_gpus_take_no_part_on_a_cpu(monkeypatch):
    monkeypatch.setattr(rivals, "installed", lambda *_: mock.Mock())
    monkeypatch.setattr(rivals, "compiled", lambda *_: {})
    for on_gpu in (True, False):
        s = SimpleNamespace(on_gpu=on_gpu, dtype=torch.float32)
        all_of = rivals.swiglu(s) | rivals.attention(s, ONE, 16) | rivals.linear_nll(s, ONE)
        found = {"Liger", "Liger (mean)", "flash-attn"} & {*all_of}
        assert len(found) == 3 * on_gpu == 3 * ("Liger" in rivals.rmsnorm(s, 1e-5))


@pytest.mark.parametrize("takes_groups", [True, False])
def test_torchs_varlen_attn_takes_part_in_bfloat16_on_a_gpu(monkeypatch, takes_groups):
    """If it takes grouped keys. An older torch's does not."""

    def newer(*tensors, window_size=(-1, -1), enable_gqa=False): ...
    def older(*tensors, window_size=(-1, -1)): ...

    torchs = {"varlen_attn": newer if takes_groups else older}
    monkeypatch.setattr(rivals, "installed", lambda _, name: torchs.get(name))
    bf16 = torch.bfloat16
    for dtype, on_gpu in ((bf16, True), (torch.float32, True), (bf16, False)):
        found = rivals.attention(SimpleNamespace(on_gpu=on_gpu, dtype=dtype), ONE, 16)
        assert ("varlen_attn" in found) == (takes_groups and dtype == bf16 and on_gpu)


def test_varlen_attn_takes_grouped_keys():
    """On the meta device, where shapes and flags are checked."""
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        pytest.skip(f"varlen_attn of torch {torch.__version__} takes no grouped keys")
    q, kv = (torch.empty(8, n, 64, dtype=torch.bfloat16, device="meta") for n in (4, 2))
    borders = torch.tensor([0, 3, 8], dtype=torch.int32)
    s = SimpleNamespace(on_gpu=True, dtype=torch.bfloat16)
    varlen = rivals.attention(s, borders, 5)["varlen_attn"]
    assert varlen(q, kv, kv, borders, 5).shape == q.shape


def test_the_heads_matmuls_are_linear_nlls_products(tiny, monkeypatch):
    """Over three chunks: one product forward, three in all, of the counted size, but for the
    weight's rows past a multiple of PAD."""
    monkeypatch.setattr(rivals, "chunk_tokens", lambda t, d: 4)
    case = cases.build(tiny, "linear_nll", [10])
    assert "its matmuls alone" not in list(case.works)[:2]  # what the gate compares
    hidden, weight = (x.requires_grad_() for x in case.inputs)
    whole = len(weight) // ceilings.PAD * ceilings.PAD
    config = dataclasses.replace(tiny.config, vocab_size=whole)
    forward, backward = counts.linear_nll(config, [10], 4)
    with FlopCounterMode(display=False) as seen:
        out = case.works["its matmuls alone"](hidden, weight)
    assert seen.get_total_flops() == forward.flops and out.shape == (10,)
    with FlopCounterMode(display=False) as seen:
        dhidden, dweight = torch.autograd.grad(out.sum(), (hidden, weight))
    assert seen.get_total_flops() == backward.flops and dweight.shape == weight.shape
    used = weight[:whole].detach()
    torch.testing.assert_close(dhidden[8:], hidden[8:].detach() @ used.T @ used)
