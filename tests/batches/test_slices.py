"""Documents in slices: every token once, in an order that the number of processes does not change,
and losses that a direct computation gives."""

import dataclasses
import gc
import threading
import tracemalloc
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.batches.slices import Slices, names_of, report, seen
from nanomed.config import CPT, InputError
from nanomed.model.decoder import Aquila, init_weights
from tests.documents import random_documents, slices_of


def loaders(data: Slices, world_size: int = 1, **changes) -> list[Loader]:
    """One for each rank."""
    fixed = dict(batch_size=4, micro_tokens=2 * data.seq_len, seq_len=2, epochs=1, seed=3)
    c, parts = CPT(**fixed | changes), (data.train, data.val)
    return [Loader(c, data, r, world_size, parts, data.mixture) for r in range(world_size)]


def numbered(lengths: list[list[int]]) -> list[list[list[int]]]:
    """Sources of documents of these lengths; no token stands twice, and the next one in a document
    is one higher."""
    ends = list(accumulate(n for source in lengths for n in source))
    documents = iter([list(range(end - n, end)) for end, n in zip(ends, sum(lengths, []))])  # noqa: B905, RUF017
    return [[next(documents) for _ in source] for source in lengths]


LENGTHS = st.lists(
    st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=12),
    min_size=1,
    max_size=3,
)


@given(LENGTHS, st.integers(2, 9), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_every_token_is_an_input_once_and_a_label_once(lengths, seq_len, batch_size, world_size):
    """But for the documents' first tokens, which have no predecessor; and no piece sees another."""
    sources = numbered(lengths)
    documents = [ids for source in sources for ids in source]
    document_of = {i: d for d, ids in enumerate(documents) for i in ids}
    ranks = loaders(slices_of(sources, seq_len), world_size, batch_size=batch_size)
    inputs, targets = [], []
    for step in range(ranks[0].n_steps):
        n_labels = 0
        for row in (row for loader in ranks for row in loader.step(step)):
            if row.examples[0] < 0:
                continue
            tokens, labels = row.tokens.tolist(), row.labels.tolist()
            assert len(tokens) <= 2 * seq_len
            inputs += tokens
            targets += [label for label in labels if label >= 0]
            for token, label in zip(tokens, labels, strict=True):
                is_last = token == documents[document_of[token]][-1]
                assert label == (-100 if is_last else token + 1)
            n_labels += sum(label >= 0 for label in labels)
            for piece in row.tokens.split(row.cu_seqlens.diff().tolist()):
                assert len({document_of[i] for i in piece.tolist()}) == 1
        assert max(1, n_labels) == ranks[0].divisor(step)
    everything = [i for ids in documents for i in ids]
    assert sorted(inputs) == everything
    assert sorted(targets) == [i for ids in documents for i in ids[1:]]


def test_slices_are_full_but_for_each_sources_last():
    data = slices_of([random_documents(20, 0), random_documents(9, 1)], 16)
    lengths = data.lengths_of(np.arange(len(data)))
    n_first = -(-data.n_tokens[0] // 16)
    full = np.ones(len(data), bool)
    full[[n_first - 1, len(data) - 1]] = False
    assert (lengths[full] == 16).all() and lengths.sum() == data.n_tokens.sum()
    assert data.source_of(np.arange(len(data))).tolist() == [0] * n_first + [1] * (
        len(data) - n_first
    )
    for i in range(len(data)):
        assert sum(len(segment.ids) for segment in data[i]) == lengths[i]


WEIGHTS = [None, [Fraction(7, 10), Fraction(3, 10)]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_order_is_the_same_on_any_number_of_ranks_and_after_a_resume(world_size, weights):
    """3 passes; a loader that begins at step 7 knows nothing of what was drawn before."""
    data = slices_of([random_documents(16, 0), random_documents(8, 1)], 16, weights, passes=0)
    (alone,), ranks = loaders(data, epochs=3), loaders(data, world_size, epochs=3)
    resumed = loaders(data, world_size, epochs=3)
    for step in range(alone.n_steps):
        wanted = alone.examples(step).tolist()
        for group in (ranks, resumed) if step >= 7 else (ranks,):
            rows = [row for loader in group for row in loader.step(step)]
            got = {i for row in rows for i in row.examples.tolist() if i >= 0}
            assert got == set(wanted)
            n_tokens = sum(len(row.tokens) for row in rows if row.examples[0] >= 0)
            assert n_tokens == data.lengths_of(alone.examples(step)).sum()
    if weights:
        drawn = np.concatenate([alone.examples(step) for step in range(alone.n_steps)])
        assert (data.source_of(drawn) == 0).sum() == len(drawn) * 7 // 10


def test_each_epoch_has_another_order_and_every_slice():
    (loader,) = loaders(slices_of([random_documents(40, 0), random_documents(20, 1)], 16), epochs=2)
    steps = [loader.examples(step).tolist() for step in range(loader.n_steps)]
    half = loader.steps_per_epoch
    first, second = (sum(part, []) for part in (steps[:half], steps[half:]))  # noqa: RUF017
    assert sorted(first) == sorted(second) == list(loader.train) and first != second


@pytest.mark.parametrize("weights", WEIGHTS)
def test_nothing_grows_with_the_data(weights):
    """A source of 10**15 tokens opens and gives any step as fast as a small one."""
    data = slices_of([[[1] * 40], [[1] * 40]], 16)
    for source in data.sources:
        source.train.n_tokens = 10**15
    pairs = zip(data.sources, weights or [None] * 2, strict=True)
    data = Slices([dataclasses.replace(s, weight=w) for s, w in pairs], 16, passes=0)
    tracemalloc.start()
    (loader,) = loaders(data, batch_size=768)
    for step in (0, 10**9, loader.steps_per_epoch // 2):
        examples = loader.examples(step)
        assert len(examples) == len(set(examples)) == 768 and data.lengths_of(examples).sum()
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_losses_equal_each_piece_seen_alone(small):
    """The labels at the cuts included; whatever rows the slices stand in."""
    torch.manual_seed(0)
    model = Aquila(small)
    init_weights(model)
    documents = random_documents(30, 0)
    data = slices_of([documents], 16)
    stream = [(i, d) for d, ids in enumerate(documents) for i in ids]
    wanted, n_cut = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(stream), 16):
            piece = stream[start : start + 16]
            for d in {d for _, d in piece}:
                at = [start + k for k, (_, owner) in enumerate(piece) if owner == d]
                following = [stream[t + 1] if t + 1 < len(stream) else (0, -1) for t in at]
                ids = [stream[t][0] for t in at]
                logp = model(row_from([ids]), logits=True).log_softmax(-1)
                for k, (label, owner) in enumerate(following):
                    if owner == d:
                        wanted -= logp[k, label].item()
                        n_cut += k + 1 == len(at)
        (loader,) = loaders(data)
        rows = [row for step in range(loader.n_steps) for row in loader.step(step)]
        total = sum(model(row).nll.double().sum().item() for row in rows)
    assert n_cut > 20 and total == pytest.approx(wanted, rel=1e-6)
    assert sum(loader.divisor(k) for k in range(loader.n_steps)) == len(stream) - len(documents)


# ---------------------------------------------------------------- in the background


def test_what_fails_in_the_background_fails_the_step():
    data = slices_of([random_documents(40, 0)], 16)
    (loader,) = loaders(data)
    broken = int(loader.examples(2)[0])
    read = data._pieces

    def failing(i: int):
        if i == broken:
            raise OSError("the disk is gone")
        return read(i)

    data._pieces = failing
    loader.step(0)
    loader.step(1)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.step(2)


def test_the_next_rows_are_prepared_while_a_step_runs():
    """By one thread, which ends with its loader; nothing is prepared beyond the last step."""
    data = slices_of([random_documents(40, 0)], 16)
    (loader,) = loaders(data)
    others = set(threading.enumerate())
    names, read = [], data._pieces
    data._pieces = lambda i: names.append(threading.current_thread().name) or read(i)
    n = [len(loader.examples(k)) for k in range(loader.n_steps)]
    for step in range(loader.n_steps):
        loader.step(step)
    assert sum(name == "MainThread" for name in names) == n[0] and len(names) == sum(n)
    threads = set(threading.enumerate()) - others
    (thread,) = {t for t in threads if t.name.startswith("next rows")}
    del loader
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


# ---------------------------------------------------------------- names and numbers


def test_short_names_that_no_two_sources_share():
    assert names_of(["a/x.jsonl.gz", "store/"]) == ["x", "store"]
    assert names_of(["zh/r.jsonl", "en/r.jsonl", "y.txt"]) == ["zh-r.jsonl", "en-r.jsonl", "y"]
    for again in ("a", "a/", "./a"):  # a shell completes a folder's name with its slash
        with pytest.raises(InputError, match="a is given twice"):
            names_of(["a", "b.txt", again])


def test_how_often_each_source_is_seen():
    sources = [[[1] * 100], [[2] * 50]]  # 10 and 5 slices
    plain = loaders(slices_of(sources, 10), epochs=2)[0]
    assert seen(plain) == [2.0, 2.0]
    assert seen(loaders(slices_of(sources, 10), steps=1)[0]) == pytest.approx([4 / 15] * 2)
    weights = [Fraction(1), Fraction(1)]
    mixed = loaders(slices_of(sources, 10, weights, passes=0), steps=10)[0]
    assert seen(mixed) == [2.0, 4.0]
    told = report(mixed)["sources"]["source1"]
    assert (told["weight"], told["seen"], told["train"]["slices"]) == (0.5, 4.0, 5)
