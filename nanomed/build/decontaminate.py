"""Decontamination: a document that holds a benchmark's question goes.

A question is found by its runs of N tokens: a document that has at least half of them (coverage)
goes; one that has any is counted in the report. Case, punctuation, tags, full-width forms and
invisible characters hide nothing (nanomed/build/text.py).

A question of fewer than N tokens is a single run of all of them, which must stand between spaces
or punctuation: 传染源是指 is an exam question, and begins many a sentence. Some say too little
alone and are searched for together with their options: those of fewer than SHORTEST tokens, those
that several records of a file ask ("Which of the following is true?"), and the mere terms of
matching questions, which share their options. If that is too short as well, or there are no
options, a question is not protected; the report counts those.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from nanomed.build.shards import Doc, Finding, Judge
from nanomed.build.text import Lookup, ngrams, tokens, without_tags
from nanomed.config import InputError
from nanomed.records import read_records
from nanomed.records.exams import LETTERS
from nanomed.records.files import kind_of, read_rows

N, SHORTEST, TERM = 8, 5, 13  # tokens
SHARED = 3  # records
# Shares of a question's runs; of one's with its options, since some options are true sentences; a
# question of fewer than TERM tokens must be there whole.
COVERAGE, WITH_OPTIONS = 0.5, 0.8
# Names of fields, in lower case. Every other one holds no question.
QUESTIONS = {
    *("question", "questions", "sent1", "stem", "query", "instruction", "instruct", "input", "ask"),
    *("description", "problem", "prompt", "问", "题目"),
}
OPTION = re.compile(r"[A-Ja-j]|(?:op|option|ending|choice)s?_?[a-jA-J0-9]?")


@dataclass(frozen=True)
class Item:
    file: str
    record: int
    question: str
    options: str  # all of them; "" if there are none


def items_of(path: str) -> list[Item]:
    """The questions in a benchmark's file, whatever its layout: JSON, CSV with a header or without
    one (MMLU), an object of records (PubMedQA), cases with several questions (CMB-Clin). A record
    without a question has one that is empty, and so not protected."""
    found = []
    for number, record in _records(path):
        asked = [
            Item(path, number, question, "\n".join(_options(part)))
            for part in _parts(record)
            for question in _questions(part)
        ]
        found += asked or [Item(path, number, "", "")]
    if not any(item.question for item in found):
        raise InputError(
            f"--decontaminate {path}: no record has a question; a field with one is called "
            f"{', '.join(sorted(QUESTIONS))}"
        )
    return found


def _records(path: str) -> Iterator[tuple[int, Any]]:
    if kind_of(path) == ".csv":
        rows = [row for _, row, _ in read_rows(path)]
        if all(len(row) > 2 and row[-1].strip() in LETTERS for row in rows):  # MMLU has no header
            for number, (question, *options, _) in enumerate(rows, 1):
                yield number, {"question": question, "options": options}
            return
    yield from ((number, record) for number, record, _ in read_records(path))


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _parts(value: Any) -> Iterator[dict]:
    """All objects in a record."""
    if isinstance(value, dict):
        yield value
    for child in _children(value):
        yield from _parts(child)


def _questions(part: dict) -> list[str]:
    """What is asked. A dialogue is known by how it begins, not by "thank you, doctor"."""
    if history := _texts(part.get("history")):
        return history[:1]
    asked = [value for name, value in part.items() if name.lower() in QUESTIONS]
    return [text for value in asked for text in _texts(value)]


def _options(part: dict) -> list[str]:
    return [t for name, value in part.items() if OPTION.fullmatch(name) for t in _texts(value)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value.strip() else []
    return [text for child in _children(value) for text in _texts(child)]


# ---------------------------------------------------------------- index


class Index:
    """What is searched for. An entry is an item's question, or that with its options."""

    def __init__(self, items: list[Item]):
        asked = Counter((item.file, item.question.strip()) for item in items)
        offered = Counter((item.file, item.options) for item in items if item.options)
        n_asked = tokens([item.question for item in items]).lengths.tolist()
        both = [f"{item.question}\n{item.options}" for item in items]
        n_both = tokens(both).lengths.tolist()
        entries, needed = [], []  # (item, text, its number of tokens), the coverage
        for i, item in enumerate(items):
            is_term = offered[item.file, item.options] > 1 and n_asked[i] < TERM
            is_common = asked[item.file, item.question.strip()] >= SHARED
            if n_asked[i] >= SHORTEST and not (is_term or is_common):
                needed.append(COVERAGE if n_asked[i] >= TERM else 1.0)
                entries.append((i, item.question, n_asked[i]))
            elif item.options and n_both[i] >= N:
                lettered = map(" ".join, zip("ABCDEFGHIJ", item.options.split("\n"), strict=False))
                for whole in (both[i], "\n".join([item.question, *lettered])):
                    needed.append(WITH_OPTIONS)
                    entries.append((i, whole, n_both[i]))
        self.items, self.owner = items, [i for i, _, _ in entries]
        self.needed, lengths = needed, np.array([n for _, _, n in entries], np.int64)
        self.size = np.zeros(len(entries), np.int64)  # [entries]: how many different runs it has
        self.runs: dict[int, tuple[Lookup, np.ndarray, np.ndarray]] = {}
        for n in np.unique(np.minimum(N, lengths)).tolist():
            mine = np.flatnonzero(np.minimum(N, lengths) == n)
            grams = ngrams(tokens([entries[k][1] for k in mine]), n)
            entry = np.repeat(mine, grams.lengths)
            order = np.lexsort((entry, grams.values))
            values, entry = grams.values[order], entry[order]
            new = np.ones(len(values), bool)
            new[1:] = (np.diff(values) > 0) | (np.diff(entry) > 0)  # a run counts once in an entry
            values, entry = values[new], entry[new]
            self.size += np.bincount(entry, minlength=len(entries))
            lookup = Lookup(values)
            borders = np.append(np.searchsorted(values, lookup.values), len(values))
            self.runs[n] = lookup, borders, entry

    def unprotected(self) -> Counter[str]:
        """The number of items in each file that are not searched for."""
        found = set(self.owner)
        return Counter(item.file for i, item in enumerate(self.items) if i not in found)

    def hits(self, texts: list[str]) -> dict[int, tuple[bool, float, float, Item]]:
        """Of each text that has a run of an item: (whether it goes, the coverage, what that may
        be, the item)."""
        found, best = tokens(texts), {}
        for n, (lookup, borders, entries) in self.runs.items():
            grams = ngrams(found, n)
            at, run = lookup.find(grams.values)
            text = np.searchsorted(grams.borders, at, "right") - 1
            if n < N:
                edges = {t: _edges(texts[t]) for t in {*text.tolist()}}  # once for each text
                place = zip(text.tolist(), (at - grams.borders[text]).tolist(), strict=True)
                stands = np.array([{k, k + n} <= edges[t] for t, k in place], bool)
                text, run = text[stands], run[stands]
            text, run = np.divmod(np.unique(text * len(lookup.values) + run), len(lookup.values))
            counts = borders[run + 1] - borders[run]
            first = np.repeat(borders[run] - np.cumsum(counts) + counts, counts)
            entry = entries[first + np.arange(len(first))]
            pairs, times = np.unique(
                np.repeat(text, counts) * len(self.owner) + entry, return_counts=True
            )
            text, entry = np.divmod(pairs, len(self.owner))
            share = times / self.size[entry]
            for t, e, part in zip(text.tolist(), entry.tolist(), share.tolist(), strict=True):
                hit = part >= self.needed[e], part, self.needed[e], self.items[self.owner[e]]
                best[t] = max(best.get(t, hit), hit, key=lambda h: h[:2])
        return best


@cache
def index_of(files: tuple[str, ...]) -> Index:
    return Index([item for path in files for item in items_of(path)])


@dataclass(frozen=True)
class Benchmarks:
    files: tuple[str, ...]

    def judge(self, docs: list[Doc]) -> None:
        found = index_of(self.files).hits([doc.text for doc in docs])
        for i, (goes, part, needed, item) in found.items():
            where = {"benchmark": item.file, "item": item.record, "question": item.question[:80]}
            docs[i].findings.append(Finding("contaminated", part, needed, not goes, where))


def judge_of(files: list[str]) -> Judge | str:
    """As a stage of a build: its judge, or why it does not run."""
    if not files:
        return "no benchmark is protected: give --decontaminate FILES"
    return Benchmarks(tuple(files)).judge


def _edges(text: str) -> set[int]:
    """Numbers of tokens that have spaces or punctuation before them, or the text's ends."""
    pieces = re.split(r"[\W_]+", unicodedata.normalize("NFKC", without_tags(text)))
    return {0, *np.cumsum(tokens(pieces).lengths).tolist()}
