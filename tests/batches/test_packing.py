import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.batches import packing
from nanomed.batches.packing import FILLER, IGNORE, filler, pack, row_from


def test_the_drawing_at_the_top_of_packing_py():
    chat_1 = [1, 11, 21, 22, 9], [False, False, True, True, True]
    chat_2 = [2, 12, 23, 9], [False, False, True, True]
    ids, trained = zip(chat_1, chat_2, strict=True)
    row = row_from(ids, trained)
    assert row.tokens.tolist() == [1, 11, 21, 22, 9, 2, 12, 23, 9]
    assert row.labels.tolist() == [-100, 21, 22, 9, -100, -100, 23, 9, -100]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert row.cu_seqlens.tolist() == [0, 5, 9]
    assert row.max_seqlen == 5
    assert row.examples.tolist() == [0, 1]
    dtypes = row.tokens.dtype, row.labels.dtype, row.cu_seqlens.dtype, row.examples.dtype
    assert dtypes == (torch.int64, torch.int64, torch.int32, torch.int64)


def test_without_flags_all_but_each_first_token_is_a_label():
    assert row_from([[5, 6, 7], [8, 9]]).labels.tolist() == [6, 7, -100, 9, -100]


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1), min_size=1))
@settings(max_examples=200, deadline=None)
def test_no_label_crosses_a_border(segments):
    """Whatever the flags, the last label of a segment is nobody's next token."""
    ids = [[token for token, _ in s] for s in segments]
    trained = [[flag for _, flag in s] for s in segments]
    row = row_from(ids, trained)
    labels = row.labels.split(row.cu_seqlens.diff().tolist())
    for segment, flags, part in zip(ids, trained, labels, strict=True):
        wanted = [t if f else IGNORE for t, f in zip(segment[1:], flags[1:], strict=True)]
        assert part.tolist() == [*wanted, IGNORE]


@pytest.mark.parametrize("segments", [[], [[]], [[1], []]])
def test_empty_segments_are_refused(segments):
    with pytest.raises(ValueError, match="at least one"):
        row_from(segments)


def test_flags_of_another_length_are_refused():
    with pytest.raises(ValueError, match="as many trained flags"):
        row_from([[1, 2]], [[True]])


def test_filler_has_two_segments_of_two_tokens_and_no_label():
    row = filler()
    assert row.cu_seqlens.tolist() == [0, 2, 4] and len(FILLER) == 2
    assert (row.labels == IGNORE).all() and (row.examples == -1).all()


@given(
    st.lists(st.integers(1, 64), max_size=80), st.integers(64, 200), st.integers(1, 5), st.data()
)
@settings(max_examples=200, deadline=None)
def test_pack_keeps_its_promises(lengths, capacity, world_size, data):
    rows = pack(lengths, capacity, world_size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))  # each once
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads, default=0) <= capacity
    assert len(rows) % world_size == 0 and rows
    if len(loads) > 1 and lengths:  # the emptiest-first rule: no row is ahead by more than one
        assert max(loads) - min(loads) <= max(lengths)


def test_pack_uses_few_rows():
    """2,000 chats of the length of real ones: within 2% of as few rows as tokens allow."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 2000).clip(10, 2048).astype(int).tolist()
    rows = pack(lengths, 4096, 2)
    assert len(rows) <= -(-sum(lengths) // 4096) * 1.02 + 2


def test_a_whole_data_set_is_packed_in_few_tries(monkeypatch):
    """The reference of DPO and a validation pack all examples at once. Where most pairs take more
    than half a row, a try for each row more would take hours for 100,000 of them."""
    lengths = np.random.default_rng(0).integers(1500, 4096, 4000).tolist()
    tries, fill = [], packing._fill
    monkeypatch.setattr(packing, "_fill", lambda *a: tries.append(a[-1]) or fill(*a))
    rows = pack(lengths, 4096, 2)
    assert len(tries) <= 40 and len(rows) <= 1.01 * 3174  # row by row it takes 3,174
    assert len(rows) % 2 == 0 and sorted(i for row in rows for i in row) == list(range(4000))


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="65 tokens does not fit a row of 64"):
        pack([3, 65], 64, 1)
