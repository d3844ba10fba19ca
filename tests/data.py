"""A data set in memory, with the interface that the loader asks for."""

import numpy as np

from nanomed.store import group_key
from nanomed.text.segment import Segment


class ListData:
    def __init__(self, segments: list[tuple[list[int], list[bool]]]):
        self.segments = [Segment(np.array(ids), np.array(flags)) for ids, flags in segments]
        self.lengths = np.array([len(ids) for ids, _ in segments])
        self.divisors = np.array([sum(flags[1:]) for _, flags in segments])
        self.source = np.array([(0, i + 1) for i in range(len(segments))])
        self.keys = np.array([group_key(str(i)) for i in range(len(segments))], np.uint64)

    @classmethod
    def of_lengths(cls, lengths: list[int], vocab_size: int = 97) -> "ListData":
        """Random tokens, about the second half of each segment trained on."""
        rng = np.random.default_rng(0)
        return cls(
            [
                (rng.integers(vocab_size, size=n).tolist(), [i >= n // 2 for i in range(n)])
                for n in lengths
            ]
        )

    def __len__(self) -> int:
        return len(self.segments)

    def lengths_of(self, examples: np.ndarray) -> np.ndarray:
        return self.lengths[examples]

    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        return self.divisors[examples]

    def __getitem__(self, i: int) -> list[Segment]:
        return [self.segments[i]]

    def where(self, i: int) -> tuple[str, int]:
        return "made.jsonl", int(i) + 1
