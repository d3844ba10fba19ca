"""What --dtype bf16 costs on a CPU is measured at the start and said."""

import timeit

import pytest
import torch

from nanomed.config import SFT
from nanomed.stages import stage

CPU = torch.device("cpu")


def test_the_cost_is_of_a_matmul_on_one_thread_in_both_dtypes(monkeypatch):
    seen = []

    def repeat(work, number, repeat):
        seen.append((work().dtype, torch.get_num_threads()))
        return [9.0, {torch.bfloat16: 8.0, torch.float32: 0.1}[seen[-1][0]]]

    monkeypatch.setattr(timeit, "repeat", repeat)
    torch.set_num_threads(2)
    assert stage.bf16_takes() == pytest.approx(80)  # the fastest of each counts
    assert torch.get_num_threads() == 2
    assert sorted(seen, key=str) == [(torch.bfloat16, 1), (torch.float32, 1)]


def test_it_is_said_where_bf16_was_asked_for_and_is_slower(monkeypatch):
    monkeypatch.setattr(stage, "bf16_takes", lambda: 80.06)
    words = stage.bf16_warning(SFT(dtype="bf16"), CPU)
    assert "WARNING: --dtype bf16" in words and "80.1 times" in words and "leave --dtype" in words
    monkeypatch.setattr(stage, "bf16_takes", lambda: 0.3)
    assert stage.bf16_warning(SFT(dtype="bf16"), CPU) == ""
    monkeypatch.setattr(stage, "bf16_takes", lambda: pytest.fail("nobody asked for bf16 here"))
    for dtype, device in (("fp32", CPU), ("auto", CPU), ("bf16", torch.device("cuda"))):
        assert stage.bf16_warning(SFT(dtype=dtype), device) == ""
