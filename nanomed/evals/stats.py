"""How far a number can be trusted: standard errors, intervals, and tests of paired answers."""

import math
from collections.abc import Sequence

import numpy as np

N_BOOTSTRAP = 10_000


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def stderr(values: Sequence[float]) -> float:
    """Of the mean: sample standard deviation / sqrt(n); 0 for a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def pooled_stderr(sizes: Sequence[int], stderrs: Sequence[float]) -> float:
    """Of the mean over all items of K groups, as lm-eval computes it: the variances within the
    groups are pooled, sqrt(sum((n-1) n se^2) / (N-K) / N); nothing is said of the spread between
    them."""
    total, free = sum(sizes), sum(sizes) - len(sizes)
    squares = sum((n - 1) * n * se**2 for n, se in zip(sizes, stderrs, strict=True))
    return math.sqrt(squares / free / total) if free else 0.0


def macro_stderr(stderrs: Sequence[float]) -> float:
    """Of the mean of K independent means, in which each counts once."""
    return math.sqrt(sum(se**2 for se in stderrs)) / len(stderrs)


def wilson(right: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): it stays within 0 and 1, and holds for small n."""
    p, zz = right / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (middle - half) / (1 + zz), (middle + half) / (1 + zz)


def sign_test(wins: int, losses: int) -> float:
    """The two-sided probability of a split at least so uneven if both were equally likely; ties
    are left out. On the items that just one of two models has right it is McNemar's exact test."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap(
    values: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of the mean. Drawn again are whole clusters (a dialogue's turns are not
    independent of each other), by default single values."""
    labels = range(len(values)) if clusters is None else clusters
    _, which = np.unique(np.asarray(labels), return_inverse=True)
    sums, sizes = np.bincount(which, np.asarray(values, float)), np.bincount(which)
    # Clusters of the same sum and size are alike: how often each kind is drawn is multinomial.
    kinds, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(sums), counts / len(sums), N_BOOTSTRAP)
    low, high = np.quantile(drawn @ kinds[:, 0] / (drawn @ kinds[:, 1]), [0.025, 0.975])
    return float(low), float(high)
