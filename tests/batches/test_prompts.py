"""A pair's prompt, computed once: the rows, and that the model says the same of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.batches.loader import Loader
from nanomed.batches.packing import filler, row_from
from nanomed.batches.prompts import share_prompts
from nanomed.config import DPO, SFT
from nanomed.model.decoder import Aquila
from nanomed.run.log import Meter
from tests.training.test_dpo import PairData

S1, U1, C1, C2, E, R1 = range(1, 7)
IDS = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # so few tokens that many are alike


def test_the_drawing_at_the_top_of_prompts_py():
    segments = [S1, U1, C1, C2, E], [S1, U1, R1, E]
    row = row_from(segments, [[False, False, True, True, True], [False, False, True, True]])
    shared = share_prompts(row)
    assert shared.tokens.tolist() == [S1, U1, C1, C2, E, R1, E]
    assert shared.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert shared.token_at.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6]
    assert shared.place_of.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert shared.labels.tolist() == [-100, C1, C2, E, -100, -100, R1, E, -100]
    assert shared.cu_seqlens.tolist() == [0, 5, 9]


@given(st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_what_begins_alike_in_a_pair_and_nothing_else_stands_once(pairs):
    segments = [prompt + answer for prompt, *answers in pairs for answer in answers]
    row = row_from(segments)
    shared = share_prompts(row)
    for name in ("tokens", "positions"):
        assert shared.by_place(getattr(shared, name)).tolist() == getattr(row, name).tolist()
    assert shared.by_token(shared.token_at).tolist() == list(range(len(shared.tokens)))
    alike = 0
    for a, b in zip(segments[::2], segments[1::2], strict=True):
        same = [x == y for x, y in zip(a, b, strict=False)]
        alike += same.index(False) if False in same else len(same)
    assert len(shared.tokens) == len(row.tokens) - alike
    assert all((getattr(shared, name) == getattr(row, name)).all() for name in ("labels", "scored"))


SEGMENTS = [[5, 9, 11, 4, 60], [5, 9, 33, 2, 8, 7], [8, 3, 7], [8, 3, 7, 20], [5, 9, 11], [40, 1]]


def test_the_model_says_the_same_and_sends_the_same_back(small):
    """In float64, so that little but the order of sums is left. The pairs have a prompt of two
    tokens, an answer that the other one begins with, and no prompt."""
    model = Aquila(small).double()
    other = copy.deepcopy(model)
    row, weights = row_from(SEGMENTS), torch.arange(23) % 7 - 3.0
    shared = share_prompts(row)
    assert len(shared.tokens) == len(row.tokens) - 5
    scores, expected = model(shared), other(row)
    for ours, theirs in zip(scores[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # float32, as all scores
    assert (scores.right == expected.right).all()
    torch.testing.assert_close(
        model(shared, logits=True), other(row, logits=True), rtol=1e-12, atol=1e-12
    )
    (model(shared, logits=True).logsumexp(-1) * weights).sum().backward()
    (other(row, logits=True).logsumexp(-1) * weights).sum().backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()  # norms are float32


def loader_of(cls) -> Loader:
    c = cls(batch_size=8, micro_tokens=256, seq_len=64, epochs=1)
    return Loader(c, PairData(16), parts=(np.arange(12), np.arange(12, 16)))


def test_the_rows_of_dpo_share_prompts_and_no_others():
    shared, plain = loader_of(DPO), loader_of(SFT)
    for rows, others in [
        (shared.step(0), plain.step(0)),
        (shared.validation(), plain.validation()),
    ]:
        for row, other in zip(rows, others, strict=True):
            assert len(row.tokens) < len(row.labels) == len(other.labels)
            assert other.token_at is None and len(other.tokens) == len(other.labels)
            assert row.by_place(row.tokens).tolist() == other.tokens.tolist()


def test_rates_are_of_the_segments_tokens_and_flops_of_those_that_are_computed(small):
    meter, row = Meter(small, 1), row_from(SEGMENTS)
    assert meter.count(share_prompts(row)) == 23
    assert meter.count(share_prompts(filler())) == 0
    assert (meter.tokens, meter.computed, meter.squares) == (23, 18, 25 + 36 + 9 + 16 + 9 + 4)
    meter.count(replace(row, examples=row.examples))
    assert (meter.tokens, meter.computed) == (46, 41)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filler_shares_too_and_has_no_gradient(small, dtype):
    model = Aquila(small).to(dtype)
    model(share_prompts(filler())).nll.sum().backward()
    assert not any(p.grad.any() for p in model.parameters())
