"""Errors, intervals and paired tests against values worked out by hand, or by another way."""

import math
import statistics

import numpy as np
import pytest

from nanomed.evals import stats


def test_the_standard_error_of_a_mean():
    values = [1, 0, 0, 1, 1, 0, 1]
    assert stats.stderr(values) == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert stats.stderr([1]) == 0.0


def test_the_pooled_error_of_groups():
    """2 and 3 values: variances 1/2 and 1/3 with 1 and 2 degrees of freedom pool to 7/18."""
    errors = [stats.stderr([0, 1]), stats.stderr([0, 1, 1])]
    assert stats.pooled_stderr([2, 3], errors) == pytest.approx(math.sqrt((0.5 + 2 / 3) / 3 / 5))


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (312, 500, 0.581, 0.665),
        (380, 500, 0.721, 0.795),
        (12, 500, 0.014, 0.041),
        (0, 10, 0, 0.278),
    ],
)
def test_wilsons_interval(right, n, low, high):
    """The first three are the paper's wins in 500, as worked out apart from this code."""
    assert stats.wilson(right, n) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize(
    "wins, losses, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (8, 1, 2 * 10 / 512),
        (4, 4, 1.0),
        (30, 10, 0.00221),
    ],
)
def test_the_exact_sign_test(wins, losses, p):
    assert stats.sign_test(wins, losses) == pytest.approx(p, rel=2e-2)
    assert stats.sign_test(losses, wins) == stats.sign_test(wins, losses)


def test_the_papers_c_eval_difference_is_no_signal():
    """57 and 60 of 113: however the items fall, at least three are right for one model alone."""
    assert min(stats.sign_test(3 + k, k) for k in range(54)) == 0.25


def drawn_one_by_one(values, clusters) -> tuple[float, float]:
    rng, names = np.random.default_rng(5), sorted(set(clusters))
    parts = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in names]
    means = []
    for _ in range(4000):
        chosen = [parts[i] for i in rng.integers(len(parts), size=len(parts))]
        means.append(sum(map(sum, chosen)) / sum(map(len, chosen)))
    return tuple(np.quantile(means, [0.025, 0.975]))


def test_the_bootstrap_draws_whole_clusters():
    rng = np.random.default_rng(0)
    clusters = [f"dialogue {i}" for i in range(30) for _ in range(1 + i % 4)]
    level = rng.normal(size=30)
    values = [float(level[int(c.split()[1])]) for c in clusters]  # turns of a dialogue are alike
    ours = stats.bootstrap(values, clusters)
    assert ours == pytest.approx(drawn_one_by_one(values, clusters), abs=0.03)
    alone = stats.bootstrap(values)
    assert ours[1] - ours[0] > 1.3 * (alone[1] - alone[0])  # as if turns were independent
    assert stats.bootstrap(values, clusters) == ours


def test_the_bootstrap_of_shares_is_about_twice_the_standard_error():
    values = [1] * 60 + [0] * 40
    low, high = stats.bootstrap(values)
    assert (high - low) / 2 == pytest.approx(1.96 * stats.stderr(values), rel=0.06)
