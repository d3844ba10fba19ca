"""What became of the records of a file or source: the numbers of data_report.json."""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from nanomed.records.shapes import Chat, PreferencePair, language

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass
class Tally:
    examples: int = 0
    shortened: int = 0  # lost their oldest turns, to fit seq_len
    turns_cut: int = 0  # so many turns
    dropped: Counter[str] = field(default_factory=Counter)  # cause -> examples
    changed: Counter[str] = field(default_factory=Counter)  # what -> times
    languages: Counter[str] = field(default_factory=Counter)  # of those kept
    lengths: array = field(default_factory=lambda: array("I"))  # tokens, of those kept
    trained_tokens: int = 0

    def count(
        self, example: Chat | PreferencePair, n_tokens: int, n_trained: int, turns_cut: int
    ) -> None:
        """One example, of which n_tokens were kept; 0 if it was dropped."""
        self.examples += 1
        self.changed.update(example.notes)
        if n_tokens == 0:
            self.dropped[example.dropped or "longer than seq_len"] += 1
            return
        self.shortened += turns_cut > 0
        self.turns_cut += turns_cut
        self.lengths.append(n_tokens)
        self.trained_tokens += n_trained
        self.languages[language(" ".join(text for _, text in example.turns))] += 1

    @classmethod
    def of(cls, parts: Iterable["Tally"]) -> "Tally":
        """The sum of several."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    def report(self) -> dict:
        kept, tokens = len(self.lengths), sum(self.lengths)
        values = np.percentile(self.lengths, PERCENTILES).round().astype(int) if kept else ()
        return {
            "examples": self.examples,
            "kept": kept,
            "dropped": dict(self.dropped),
            "shortened": self.shortened,
            "turns_cut": self.turns_cut,
            "changed": dict(self.changed),
            "tokens": tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_tokens / max(1, tokens), 4),
            "length_percentiles": {
                f"p{p}": int(v) for p, v in zip(PERCENTILES, values, strict=bool(kept))
            },
            "language_share": {
                name: round(n / kept, 4) for name, n in sorted(self.languages.items())
            },
        }
