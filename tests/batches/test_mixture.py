"""Orders and mixtures without any model: bijections, proportions, no memory of what was drawn."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.batches.mixture import Mixture, check_weights, path_and_weight
from nanomed.batches.shuffle import shuffled
from nanomed.config import InputError

# ---------------------------------------------------------------- shuffle


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_place_once(n, seed, epoch):
    assert sorted(shuffled(np.arange(n), n, (seed, epoch))) == list(range(n))


def test_an_order_longer_than_any_memory():
    n = 10**15 + 37
    places = np.random.default_rng(0).choice(10**15, 100_000)
    values = shuffled(places, n, (1, 2))
    assert len(np.unique(values)) == len(np.unique(places)) and 0 <= values.min() < values.max() < n
    assert abs(values.mean() / n - 0.5) < 0.005  # 5 standard deviations of a uniform mean
    assert (shuffled(places[::-1], n, (1, 2)) == values[::-1]).all()


@pytest.mark.parametrize("n", [5, 31])
def test_every_value_is_as_likely_at_every_place(n):
    """Over many keys; and so is every value right after every other one."""
    n_keys = 800
    orders = np.stack([shuffled(np.arange(n), n, (7, k)) for k in range(n_keys)])
    at, after = np.zeros((n, n)), np.zeros((n, n))
    for place in range(n):
        np.add.at(at, (place, orders[:, place]), 1)
        if place:
            np.add.at(after, (orders[:, place - 1], orders[:, place]), 1)
    after = after[~np.eye(n, dtype=bool)]
    for counts, expected in ((at, n_keys / n), (after, n_keys / n)):
        assert abs(counts - expected).max() < 6 * expected**0.5


def test_an_order_is_far_from_the_given_one():
    n = 100_000
    order = shuffled(np.arange(n), n, (0, 0))
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.015  # 5 standard deviations
    assert (np.diff(order) == 1).sum() < 10  # of a random order about 1
    other = shuffled(np.arange(n), n, (0, 1))
    assert (order == other).sum() < 10 and abs(np.corrcoef(order, other)[0, 1]) < 0.015


# ---------------------------------------------------------------- mixture


def mixture_of(weights, sizes=None, seed=0, passes=0) -> Mixture:
    names = [f"source {s}" for s in range(len(weights))]
    return Mixture(names, sizes or [10**7] * len(weights), weights, seed, passes)


def test_proportions_of_many_slices():
    """Within 0.1% at the end, and within as many slices as there are sources at every moment."""
    weights = [Fraction(w) for w in ("1", "5e-2", "0.17", "2.345678901234567")]
    n = 400_000
    source, before = mixture_of(weights).sources(0, n)
    total = float(sum(weights))
    for s, weight in enumerate(weights):
        so_far = np.cumsum(source == s)
        share = float(weight) / total
        assert abs(so_far[-1] / (share * n) - 1) < 1e-3
        assert abs(so_far - share * np.arange(1, n + 1)).max() < len(weights)
        assert (before[source == s] == np.arange(so_far[-1])).all()  # each index of it once


@given(
    st.lists(st.integers(1, 10**20), min_size=1, max_size=5),
    st.integers(0, 10**12),
    st.integers(0, 300),
)
@settings(max_examples=60, deadline=None)
def test_a_draw_follows_from_its_number(weights, start, n):
    mixture = mixture_of([Fraction(w) for w in weights])
    source, before = mixture.sources(start, start + n)
    done = mixture.counts(start)
    for s, index in zip(source, before, strict=True):
        assert index == done[s]
        done[s] += 1
    assert done == mixture.counts(start + n) and sum(done) == start + n


def test_each_source_comes_in_a_new_order_in_each_pass():
    mixture = mixture_of([Fraction(3), Fraction(1)], sizes=[40, 25], seed=5)
    draws = mixture.draws(0, 160)  # 120 of the first, 3 passes; 40 of the second, 1.6
    first, second = draws[draws < 40], draws[draws >= 40] - 40
    passes = [first[:40], first[40:80], first[80:]]
    assert all(sorted(one) == list(range(40)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert sorted(second[:25]) == list(range(25)) and len(set(second[25:])) == 15
    assert (mixture.draws(57, 103) == draws[57:103]).all()
    other = mixture_of([Fraction(3), Fraction(1)], sizes=[40, 25], seed=6).draws(0, 160)
    assert (other != draws).any() and ((other < 40) == (draws < 40)).all()


def test_a_source_that_runs_out():
    mixture = mixture_of([Fraction(3), Fraction(1)], sizes=[60, 60], passes=1)
    mixture.check(n_steps=10, batch_size=8)  # 60 of the first source, all it has
    with pytest.raises(InputError, match=r"source 0 runs out in step 11 of 25.*most 10.*--repeat"):
        mixture.check(n_steps=25, batch_size=8)
    mixture_of([Fraction(3), Fraction(1)], [60, 60], passes=2).check(n_steps=20, batch_size=8)
    mixture_of([Fraction(3), Fraction(1)], [60, 60], passes=0).check(n_steps=1000, batch_size=8)


# ---------------------------------------------------------------- what the user writes


@pytest.mark.parametrize(
    "entry, path, weight",
    [
        ("store:0.7", "store", "7/10"),
        ("a/b.jsonl:3", "a/b.jsonl", "3"),
        ("x:y:1e-3", "x:y", "1/1000"),
        ("x:.5", "x", "1/2"),
        ("C:files", "C:files", None),
        ("store:0.7x", "store:0.7x", None),
        ("nan:nan", "nan:nan", None),
        ("plain.jsonl", "plain.jsonl", None),
        (":0.5", ":0.5", None),
    ],
)
def test_weights_are_numbers_after_the_last_colon(entry, path, weight):
    assert path_and_weight(entry) == (path, weight and Fraction(weight))


@pytest.mark.parametrize("entry", ["a:0", "a:-1", "a:0.0", "a:-2e5"])
def test_weights_are_positive(entry):
    with pytest.raises(InputError, match=f"--data {entry}: the weight .* must be above 0"):
        path_and_weight(entry)


def test_weights_for_all_or_none():
    check_weights(["a", "b"], [None, None])
    check_weights(["a:1", "b:2"], [Fraction(1), Fraction(2)])
    with pytest.raises(InputError, match="b has no weight and others have one"):
        check_weights(["a:1", "b"], [Fraction(1), None])
