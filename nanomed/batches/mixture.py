"""Which source the next slice comes from: a mixture with exact proportions and no memory.

Two sources with weights w and W - w: of the first d draws the one has floor(d w / W), the other the
rest (as Bresenham's line steps through pixels). More sources are shared out one after
another: the first against all others, the second against all but the first, and so on. So draw d's
source, and how often that source was drawn before, follow from d alone, in exact integers. After d
draws each source has been drawn d times its weight, give or take as many draws as there are
sources.

A first reader may take it on trust: draws(start, stop) are the examples of draws start to stop - 1.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

from nanomed.batches.shuffle import shuffled
from nanomed.config import InputError


def path_and_weight(entry: str) -> tuple[str, Fraction | None]:
    """("store", 7/10) of "store:0.7". What does not end with a number is a path as it stands.
    Raises InputError for a weight that is not positive."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", entry)
    if not match:
        return entry, None
    if (weight := Fraction(match[2])) <= 0:
        raise InputError(f"--data {entry}: the weight after the colon must be above 0")
    return match[1], weight


def check_weights(entries: list[str], weights: list[Fraction | None]) -> None:
    without = [e for e, weight in zip(entries, weights, strict=True) if weight is None]
    if without and len(without) < len(entries):
        raise InputError(
            f"--data: {', '.join(without)} has no weight and others have one; give every source "
            "one (FILE:0.3), or none of them: then each slice of all comes once per epoch"
        )


class Mixture:
    """Draws from several sources; each is gone through in a new order each time."""

    def __init__(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[Fraction],
        seed: int,
        passes: int = 1,
    ):
        """sizes: how many examples each source has; its indices follow the former's. passes: how
        often a source may be gone through; 0: as often as it takes."""
        self.names, self.sizes, self.seed, self.passes = names, sizes, seed, passes
        scale = lcm(*(weight.denominator for weight in weights))
        self.weights = [int(weight * scale) for weight in weights]

    def draws(self, start: int, stop: int) -> np.ndarray:
        """[stop-start] int64: the examples of draws start to stop-1."""
        source, before = self.sources(start, stop)
        examples = np.empty(stop - start, np.int64)
        first = 0
        for s, size in enumerate(self.sizes):
            mine = np.flatnonzero(source == s)
            passes, places = np.divmod(before[mine], size)
            for n in np.unique(passes).tolist():
                these = passes == n
                order = shuffled(places[these], size, (self.seed, n, s))
                examples[mine[these]] = first + order
            first += size
        return examples

    def sources(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of draws start to stop-1: [stop-start] the source, and how often it was drawn before."""
        left = np.arange(start, stop).astype(object)  # Python's integers: exact for every weight
        source = np.full(stop - start, len(self.weights) - 1)
        before = np.zeros(stop - start, np.int64)
        open_ = np.arange(stop - start)  # the draws that no source has taken yet
        for s, weight in enumerate(self.weights):
            total = sum(self.weights[s:])
            count = left * weight // total
            taken = ((left + 1) * weight // total > count).astype(bool)
            source[open_[taken]], before[open_[taken]] = s, count[taken].astype(np.int64)
            open_, left = open_[~taken], (left - count)[~taken]
        return source, before

    def counts(self, n: int) -> list[int]:
        """How many of the first n draws each source has."""
        counts, left = [], n
        for s, weight in enumerate(self.weights):
            counts.append(left * weight // sum(self.weights[s:]))
            left -= counts[-1]
        return counts

    def check(self, n_steps: int, batch_size: int) -> None:
        """Raises InputError if a source would be gone through more often than `passes` times."""

        def used_up(steps: int) -> list[int]:
            counts = self.counts(steps * batch_size)
            return [s for s, n in enumerate(counts) if n > self.passes * self.sizes[s]]

        if not self.passes or not used_up(n_steps):
            return
        step = bisect_left(range(n_steps), True, key=lambda steps: bool(used_up(steps)))
        first = used_up(step)[0]
        times = "one pass" if self.passes == 1 else f"{self.passes} passes"
        raise InputError(
            f"--data: {self.names[first]} runs out in step {step:,} of {n_steps:,}: it has "
            f"{self.sizes[first]:,} slices to train on, for {times} (--epochs); ask for fewer "
            f"--steps (at most {step - 1:,}), change the weights, or see slices again with --repeat"
        )
