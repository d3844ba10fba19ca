"""What became of the records of a file or source: the numbers of data_report.json."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanomed.records.chats import ANSWER_FIRST
from nanomed.records.files import encoding
from nanomed.records.shapes import Chat, Document, language
from nanomed.text.template import Encoder

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
NAMES = 100  # of so many sources of a file, and unread fields of each, the report has the names
LENGTH_BITS = 11  # exact below 2,048 tokens, and a length of any size to 0.1%


class Facts(NamedTuple):
    """What the report says of an example or a document."""

    source: str
    language: str  # zh, en or other
    n_bytes: int  # of its texts in UTF-8
    notes: list[str]
    unread: list[str]
    dropped: str

    @classmethod
    def of(cls, one: Chat | Document, encoder: Encoder) -> "Facts":
        texts, system = one.texts(), getattr(one, "system", "")
        lang = one.lang if isinstance(one, Document) else language(" ".join(texts))
        n_bytes = sum(len(text.encode()) for text in texts)
        notes = one.notes + ([] if one.dropped else encoder.notes(texts, system))
        return cls(one.source, lang, n_bytes, notes, one.unread, one.dropped)


@dataclass
class Tally:
    examples: int = 0
    shortened: int = 0  # lost their oldest turns, to fit seq_len
    turns_cut: int = 0  # so many turns
    dropped: Counter[str] = field(default_factory=Counter)  # cause -> examples
    changed: Counter[str] = field(default_factory=Counter)  # what -> times
    unread: Counter[str] = field(default_factory=Counter)  # field -> records that have it
    languages: Counter[str] = field(default_factory=Counter)  # of those kept
    lengths: Counter[int] = field(default_factory=Counter)  # tokens, rounded -> examples kept
    tokens: int = 0
    trained_tokens: int = 0
    n_bytes: int = 0  # of the texts of those kept

    def count(self, facts: Facts, n_tokens: int, n_trained: int, turns_cut: int = 0) -> None:
        """One example, of which n_tokens were kept; 0 if it was dropped. However many there are,
        this stays small: lengths are rounded down to LENGTH_BITS significant bits."""
        self.examples += 1
        self.changed.update(facts.notes)
        for name in facts.unread:
            self.unread[among(self.unread, name)] += 1
        if n_tokens == 0:
            self.dropped[facts.dropped or "longer than seq_len"] += 1
            return
        self.shortened += turns_cut > 0
        self.turns_cut += turns_cut
        self.tokens += n_tokens
        self.trained_tokens += n_trained
        self.n_bytes += facts.n_bytes
        shift = max(0, n_tokens.bit_length() - LENGTH_BITS)
        self.lengths[n_tokens >> shift << shift] += 1
        self.languages[facts.language] += 1

    @classmethod
    def of(cls, parts: Iterable[dict]) -> "Tally":
        """The sum of several, each as vars() gives it, or JSON that was made of that."""
        total = cls()
        for name, value in (item for part in parts for item in part.items()):
            if isinstance(value, dict):
                getattr(total, name).update(value)
            else:
                setattr(total, name, getattr(total, name) + value)
        return total

    def report(self) -> dict:
        kept = self.lengths.total()
        return {
            "examples": self.examples,
            "kept": kept,
            "dropped": dict(self.dropped),
            "shortened": self.shortened,
            "turns_cut": self.turns_cut,
            "changed": dict(self.changed),
            "unread": dict(self.unread),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "trained_share": round(self.trained_tokens / max(1, self.tokens), 4),
            "length_percentiles": self._percentiles(),
            "language_share": {
                name: round(n / kept, 4) for name, n in sorted(self.languages.items())
            },
            "bytes": self.n_bytes,
        }

    def _percentiles(self) -> dict[str, int]:
        """The nearest length that occurs, at or below each percentile."""
        if not self.lengths:
            return {}
        found = sorted((int(length), n) for length, n in self.lengths.items())  # JSON's are texts
        up_to = np.cumsum([n for _, n in found])
        ranks = [int(p / 100 * (up_to[-1] - 1)) for p in PERCENTILES]
        where = np.searchsorted(up_to, ranks, side="right")
        return {f"p{p}": found[i][0] for p, i in zip(PERCENTILES, where, strict=True)}


def among(known: Collection[str], name: str) -> str:
    """The name under which something is counted: a file may have endless ones."""
    return name if name in known or len(known) < NAMES else "(others)"


def remarks(report: dict) -> list[str]:
    """What somebody who is about to train on these files should know."""
    lines = []
    for path, file in report["files"].items():
        for name, n in file["unread"].items():
            lines.append(f"field {name!r} of {path} is not read: {n:,} records")
        if file["encoding"] == "gb18030":
            lines.append(f"{path} is no UTF-8; read as GB18030, which makes Chinese text of it")
        first, n_read = file["changed"].get(ANSWER_FIRST, 0), file["examples"]
        if first > n_read / 2:
            lines.append(
                f"warning: in {first:,} of {n_read:,} chats of {path} the first turn is the "
                "assistant's; if the roles are swapped (gpt asks, human answers), "
                "--fields user=gpt assistant=human reads them the other way"
            )
    return lines


def report_of(files: list[str], tallies: Mapping[tuple[str, str], Tally]) -> dict:
    """What reading did with everything, with each file's records and in it with each source's;
    `tallies` is by (file, source)."""
    by_file = {path: {s: t for (p, s), t in tallies.items() if p == path} for path in files}
    return {
        **Tally.of(map(vars, tallies.values())).report(),
        "files": {
            path: {
                "encoding": encoding(path),
                **Tally.of(map(vars, sources.values())).report(),
                "sources": {name or "(none named)": t.report() for name, t in sources.items()},
            }
            for path, sources in by_file.items()
        },
    }
