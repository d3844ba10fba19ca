"""The items of benchmarks, read from the files that people have.

There are two kinds of layout: a data set as downloaded, `OWNER/NAME/CONFIG/SPLIT.jsonl` or
`.parquet` under --data, and the benchmark's own files, found by their published names anywhere
under --data. Questions and options are kept to the byte, as prompts must be equal to the byte. An
item without a valid key is an error: it is never scored.
"""

import csv
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.records import BadField, read_json, read_records
from nanomed.records.exams import LETTERS, Exam, exam_of
from nanomed.records.shapes import excerpt, text_of


@dataclass(frozen=True)
class Item:
    exam: Exam
    subject: str = ""  # what the record says it is about


_PART = re.compile(r"-\d+-of-(\d+)\.")  # of a data set's split


@dataclass(frozen=True)
class Layout:
    """Where a benchmark's items are and which fields they have; tasks.toml explains each."""

    place: str
    question: str = "question"
    options: str | Sequence[str] = ("A", "B", "C", "D")
    key: str = "answer"
    first: int | None = None
    subject: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    header: Sequence[str] = ()
    reader: str = "fields"

    def path(self, subject: str, split: str) -> str:
        place = self.place.format(subject=subject, split=self.splits.get(split, split))
        return place if "*" in place else f"{place}/**/{split}*"

    def files(self, data: Path, subject: str, split: str) -> list[Path]:
        """One file, or all numbered parts of one. Raises InputError for two copies of a split, and
        for a part that is missing."""
        files = sorted(data.glob(self.path(subject, split)))
        if "*" not in self.place:
            name = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.(jsonl|parquet)")
            files = [path for path in files if name.fullmatch(path.name)]
        n_parts = {int((_PART.search(path.name) or (0, 1))[1]) for path in files}
        if files and n_parts != {len(files)}:
            raise InputError(
                f"{' and '.join(map(str, files))}: {len(files)} files, where this split has "
                f"{' or '.join(map(str, n_parts))}; let --data name a folder that holds it once, "
                "and whole"
            )
        return files


@dataclass(frozen=True)
class Split:
    """A split of a benchmark, in the order of its files."""

    items: list[Item]
    files: list[Path]
    set_aside: int = 0  # items with several right letters, which one letter cannot answer


def load(layouts: Iterable[Layout], data: Path, subject: str, split: str) -> Split:
    """The split in the first layout that is there. Raises InputError, naming file, record, field
    and remedy, or what was looked for."""
    for layout in layouts:
        if files := layout.files(data, subject, split):
            items = [item for path in files for item in _items(layout, path, split)]
            single = [item for item in items if len(item.exam.answers) == 1]
            if not single:
                raise InputError(f"{', '.join(map(str, files))}: no item that one letter answers")
            return Split(single, files, len(items) - len(single))
    places = ", ".join(layout.path(subject, split) for layout in layouts)
    raise InputError(f"{data} has none of: {places}; --data names the folder above them")


def _items(layout: Layout, path: Path, split: str) -> Iterator[Item]:
    read = {"fields": _by_fields, "exam": _exam, "pubmedqa": _pubmedqa}[layout.reader]
    for number, record in _records(layout, path, split):
        try:
            if not isinstance(record, dict):
                raise BadField("(record)", f"expected an object, found {excerpt(record)}")
            subject = record.get(layout.subject) if layout.subject else ""
            yield Item(read(layout, record), str(subject or ""))
        except BadField as bad:
            raise InputError(f"{path}, record {number}: {bad}") from None


def _records(layout: Layout, path: Path, split: str) -> Iterator[tuple[int | str, Any]]:
    """(number or name of a record in its file, record)"""
    if layout.header:
        yield from _rows(path, layout.header)
    elif layout.reader == "pubmedqa" and path.suffix == ".json":
        yield from _pubmedqa_split(path, split)
    else:
        yield from ((number, record) for number, record, _ in read_records(str(path)))


def _rows(path: Path, header: Sequence[str]) -> Iterator[tuple[int, dict]]:
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, record {number}: {len(row)} columns, expected {len(header)}: "
                        f"{', '.join(header)}"
                    )
                yield number, dict(zip(header, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}, record {number + 1}: {error}; write the file as CSV in UTF-8"
        ) from None


# ---------------------------------------------------------------- one record


def _by_fields(layout: Layout, record: dict) -> Exam:
    if isinstance(layout.options, str):
        listed = record.get(layout.options)
        if not isinstance(listed, list):
            raise BadField(layout.options, f"expected a list, found {excerpt(listed)}")
        texts = [_text({layout.options: text}, layout.options) for text in listed]
    else:
        texts = [_text(record, name) for name in layout.options]
    options = dict(zip(LETTERS, texts, strict=False))
    return Exam(_text(record, layout.question), options, _key(layout, record, options))


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    if value is None:
        raise BadField(name, "is missing")
    return str(value) if isinstance(value, int | float) else text_of(value, name)


def _key(layout: Layout, record: dict, options: dict[str, str]) -> str:
    first, keys = layout.first, list(options)
    if first is not None:
        keys = [str(first + i) for i in range(len(options))]
    value = str(record.get(layout.key)).strip()
    if value not in keys:
        raise BadField(
            layout.key,
            f"{excerpt(record.get(layout.key))} is no key, which is {keys[0]} to {keys[-1]} here; "
            "an item without its key cannot be scored: give a split with published answers",
        )
    return LETTERS[keys.index(value)]


def _exam(layout: Layout, record: dict) -> Exam:
    """Any layout that nanomed/records/exams.py reads, in whatever case its fields are written."""
    lower = {name.lower(): value for name, value in record.items()}
    if "anwer" in lower:  # as FreedomIntelligence/Apollo spells it
        lower["answer"] = lower.pop("anwer")
    if exam := exam_of(lower):
        return exam
    raise BadField("options", f"not in this record, whose fields are {', '.join(record)[:200]}")


# ---------------------------------------------------------------- PubMedQA

DECISIONS = {"A": "yes", "B": "no", "C": "maybe"}


def _pubmedqa(layout: Layout, record: dict) -> Exam:
    contexts, decision = record.get("CONTEXTS"), record.get("final_decision")
    if not isinstance(contexts, list):
        raise BadField("CONTEXTS", f"expected a list of texts, found {excerpt(contexts)}")
    letters = [letter for letter, word in DECISIONS.items() if word == decision]
    if not letters:
        raise BadField("final_decision", f"{excerpt(decision)} is none of yes, no, maybe")
    context = "\n".join(text_of(part, "CONTEXTS") for part in contexts)
    return Exam(_text(record, "QUESTION"), DECISIONS, letters[0], context=context)


def _pubmedqa_split(path: Path, split: str) -> Iterator[tuple[str, dict]]:
    """ori_pqal.json is one object of 1,000 items by PMID; "test" and "train" are what PubMedQA's
    own split_dataset.py makes of it (half for the test, and of the other half the first of ten
    folds for development), in its order."""
    _, whole, _ = next(iter(read_json(str(path))))
    if not isinstance(whole, dict) or len(whole) != 1000:
        raise InputError(
            f"{path}: expected one object of 1,000 items by PMID, as ori_pqal.json is; of other "
            "files it is not known which items are the test's"
        )
    rng = random.Random(0)
    rest, test = _parts(whole, list(whole), 2, rng)
    _, *train = _parts(whole, rest, 10, rng)
    chosen = {"test": test, "train": [pmid for fold in train for pmid in fold]}[split]
    yield from ((pmid, whole[pmid]) for pmid in chosen)


def _parts(whole: dict, pmids: list[str], n: int, rng: random.Random) -> list[list[str]]:
    """n parts of about equal size with the labels in equal shares."""
    parts: list[list[str]] = [[] for _ in range(n)]
    labelled = [[i for i in pmids if whole[i]["final_decision"] == w] for w in DECISIONS.values()]
    for same in labelled:
        rng.shuffle(same)
        size = math.ceil(len(same) / n)
        for i, part in enumerate(parts):
            part += same[i * size : (i + 1) * size]
    if len(parts[-1]) != len(parts[0]):  # the last one is short: each of the others gives it one
        for part in parts[:-1]:
            moved = rng.choice(part)
            part.remove(moved)
            parts[-1].append(moved)
    return parts
