"""A data set in memory, with the interface that the loader asks for."""

from collections.abc import Sequence

import numpy as np

from nanomed.store import group_key
from nanomed.text.segment import Segment


class Examples:
    """An example is a list of segments: one for a chat or a document, two for a pair."""

    def __init__(self, examples: Sequence[Sequence[tuple[Sequence[int], Sequence[bool]]]]):
        self.examples = [[Segment(*map(np.asarray, part)) for part in e] for e in examples]
        self.lengths = np.array([sum(len(s.ids) for s in e) for e in self.examples])
        labels = [sum(s.trained[1:].sum() for s in e) if len(e) == 1 else 1 for e in self.examples]
        self.divisors = np.array(labels)
        self.source = np.array([(0, i + 1) for i in range(len(self))])
        self.keys = np.array([group_key(str(i)) for i in range(len(self))], np.uint64)

    @classmethod
    def of_lengths(cls, lengths: list[int], vocab_size: int, segments: int = 1) -> "Examples":
        """Random tokens of each length; all but the first token are trained on."""
        rng = np.random.default_rng(0)
        draw = lambda n: (rng.integers(vocab_size, size=n), np.arange(n) > 0)  # noqa: E731
        return cls([[draw(n) for _ in range(segments)] for n in lengths])

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> list[Segment]:
        return self.examples[i]

    def lengths_of(self, examples: np.ndarray) -> np.ndarray:
        return self.lengths[examples]

    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        return self.divisors[examples]

    def where(self, i: int) -> tuple[str, int]:
        return "made.jsonl", int(i) + 1


class ListData(Examples):
    """Each example is a segment."""

    def __init__(self, segments: Sequence[tuple[Sequence[int], Sequence[bool]]]):
        super().__init__([[segment] for segment in segments])

    @classmethod
    def of_lengths(cls, lengths: list[int], vocab_size: int = 97) -> "ListData":
        """Random tokens, about the second half of each segment trained on."""
        rng = np.random.default_rng(0)
        return cls([(rng.integers(vocab_size, size=n), np.arange(n) >= n // 2) for n in lengths])
