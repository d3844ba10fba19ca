"""The rules: what a text must and must not be, whatever it is about.

Each rule gives every text a value and has a limit; limits are settings, values are in the report.

    length      tokens                                                      at least
    special     share of characters that are neither letters nor ordinary   at most
    repetition  share of runs of 10 tokens that stand there before          at most
    toxic       words of a list per 1,000 characters                        at most
    private     addresses, telephone numbers and the like                   at most
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from nanomed.build import private
from nanomed.build.shards import Doc, Finding, systems_of, text_of
from nanomed.build.text import U64, Lookup, Ragged, ngrams, ordinary, tokens
from nanomed.config import InputError
from nanomed.records.files import read_lines

RUN = 10  # tokens
WORDS = Path(__file__).with_name("words.txt")
BROKEN = ("锟斤拷", "烫烫烫", "屯屯屯")  # letters that text in another encoding turns into


def special(texts: Sequence[str]) -> np.ndarray:
    """[texts] float64"""
    flags, borders = ordinary(texts)
    before = np.concatenate(([0], np.cumsum(1 - flags)))[borders]  # not ordinary
    broken = np.array([sum(len(mark) * text.count(mark) for mark in BROKEN) for text in texts])
    return (np.diff(before) + broken) / np.maximum(np.diff(borders), 1)


def repetition(found: Ragged) -> np.ndarray:
    """[texts] float64"""
    runs = ngrams(found, RUN)
    text = np.repeat(np.arange(len(runs), dtype=U64), runs.lengths)
    keyed = np.sort(text << U64(44) | runs.values >> U64(20))  # 44 bits tell a text's runs apart
    again = (keyed[1:][keyed[1:] == keyed[:-1]] >> U64(44)).astype(np.int64)
    return np.bincount(again, minlength=len(runs)) / np.maximum(runs.lengths, 1)


def toxic(found: Ragged, texts: Sequence[str], words: Path = WORDS) -> np.ndarray:
    """[texts] float64"""
    hits = np.zeros(len(texts))
    for n, lookup in words_in(words).items():
        runs = ngrams(found, n)
        at, _ = lookup.find(runs.values)
        hits += np.bincount(np.searchsorted(runs.borders, at, "right") - 1, minlength=len(texts))
    return 1000 * hits / np.maximum([len(text) for text in texts], 1)


@cache
def words_in(path: Path) -> dict[int, Lookup]:
    """The words of a file by their number of tokens. Raises InputError."""
    lines = [line for _, line, _ in read_lines(str(path)) if line[0] != "#"]
    lengths = tokens(lines).lengths
    if not all(lengths):
        raise InputError(f"{path}: {lines[lengths.argmin()]!r} is no word: it has no letter")
    of_length = {n: [w for w, m in zip(lines, lengths, strict=True) if m == n] for n in lengths}
    return {n: Lookup(ngrams(tokens(words), n).values) for n, words in of_length.items()}


@dataclass(frozen=True)
class Limits:
    length: float
    special: float
    repetition: float
    toxic: float
    private: str  # "drop", "mask" or "keep"
    words: Path = WORDS

    def judge(self, docs: list[Doc]) -> None:
        texts = [doc.text for doc in docs]
        found = tokens(texts)
        values = {
            "length": found.lengths,
            "special": special(texts),
            "repetition": repetition(found),
            "toxic": toxic(found, texts, self.words),
        }
        for i, doc in enumerate(docs):
            for name, of_texts in values.items():
                value, limit = float(of_texts[i]), getattr(self, name)
                keeps = value >= limit if name == "length" else value <= limit
                doc.findings.append(Finding(name, value, limit, keeps))
            n = left = _n_private(doc) if self.private != "keep" else 0
            if n and self.private == "mask":
                doc.record = private.masked(doc.record)
                doc.text = text_of("", 0, doc.record)
                doc.known["tokens"] = int(tokens([doc.text]).lengths[0])
                left = _n_private(doc)  # over the border of two turns
            doc.findings.append(Finding("private", n, 0.0, left == 0))


def _n_private(doc: Doc) -> int:
    texts = [doc.text, *systems_of(doc.record, doc.known.get("chat", False))]
    return sum(len(private.found(text)) for text in texts)
