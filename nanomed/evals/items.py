"""The items of benchmarks, read from the files that people have.

There are two layouts: a data set as downloaded, `OWNER/NAME/CONFIG/SPLIT.jsonl` or `.parquet` under
--data, and the benchmark's own files, found by their published names anywhere under --data.
Questions and options are kept to the byte, as prompts must be equal to the byte. An item without a
valid key is an error: it is never scored.
"""

import csv
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.records import BadField, read_json, read_records
from nanomed.records.exams import LETTERS, Exam, exam_of
from nanomed.records.shapes import excerpt, text_of

Records = Iterable[tuple[int | str, dict]]  # (number or name of a record in its file, record)


@dataclass(frozen=True)
class Item:
    exam: Exam
    subject: str = ""  # what the record says it is about


def _records(path: Path, split: str) -> Records:
    return ((number, record) for number, record, _ in read_records(str(path)))


@dataclass(frozen=True)
class Source:
    """One layout of a benchmark. `place` has {subject} and {split} in it: the folder of a data set,
    or a pattern with `**/` for the benchmark's own files."""

    place: str
    read: Callable[[dict], Exam]
    splits: dict[str, str] = field(default_factory=dict)  # where a split has another name here
    subject: str = ""  # the field with the item's subject
    records: Callable[[Path, str], Records] = _records


@dataclass(frozen=True)
class Split:
    """A split of a benchmark, in the order of its files."""

    items: list[Item]
    files: list[Path]
    set_aside: int = 0  # items with several right letters, which one letter cannot answer


def load(sources: Iterable[Source], data: Path, subject: str, split: str) -> Split:
    """The split in the first layout that is there. Raises InputError, naming file, record, field
    and remedy, or what was looked for."""
    for source in sources:
        if files := _files(source, data, subject, split):
            items = [item for path in files for item in _items(source, path, split)]
            single = [item for item in items if len(item.exam.answers) == 1]
            return Split(single, files, len(items) - len(single))
    places = [_place(source, subject, split) for source in sources]
    raise InputError(f"{data} has none of: {', '.join(places)}; --data names the folder above them")


def _place(source: Source, subject: str, split: str) -> str:
    place = source.place.format(subject=subject, split=source.splits.get(split, split))
    return place if "*" in place else f"{place}/{split}.jsonl (or .parquet)"


def _files(source: Source, data: Path, subject: str, split: str) -> list[Path]:
    if "*" in source.place:
        files = sorted(data.glob(_place(source, subject, split)))
        shards = []
    else:
        name = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.(jsonl|parquet)")
        folder = data / source.place.format(subject=subject, split=split)
        files = sorted(path for path in folder.rglob("*") if name.fullmatch(path.name))
        shards = [path for path in files if name.fullmatch(path.name)[1]]
    if len(files) > 1 and len(shards) < len(files):
        raise InputError(
            f"{' and '.join(map(str, files))} are both this split; let --data name a folder that "
            "holds one of them"
        )
    return files


def _items(source: Source, path: Path, split: str) -> Iterator[Item]:
    for number, record in source.records(path, source.splits.get(split, split)):
        try:
            if not isinstance(record, dict):
                raise BadField("(record)", f"expected an object, found {excerpt(record)}")
            exam = source.read(record)
        except BadField as bad:
            raise InputError(f"{path}, record {number}: {bad}") from None
        subject = record.get(source.subject) if source.subject else ""
        yield Item(exam, str(subject or ""))


# ---------------------------------------------------------------- one record


def columns(
    question: str, options: str | list[str], key: str, first: int | None = None
) -> Callable[[dict], Exam]:
    """A reader of records with one field for each option, or one that lists them. The key is a
    letter, or a number that counts from `first`."""

    def read(record: dict) -> Exam:
        if isinstance(options, list):
            texts = [_text(record, name) for name in options]
        elif isinstance(record.get(options), list):
            texts = [_text({options: text}, options) for text in record[options]]
        else:
            raise BadField(options, f"expected a list, found {excerpt(record.get(options))}")
        lettered = dict(zip(LETTERS, texts, strict=False))
        return Exam(_text(record, question), lettered, _key(record, key, lettered, first))

    return read


def _text(record: dict, name: str) -> str:
    value = record.get(name)
    if value is None:
        raise BadField(name, "is missing")
    return str(value) if isinstance(value, int | float) else text_of(value, name)


def _key(record: dict, name: str, options: dict[str, Any], first: int | None) -> str:
    value, letters = record.get(name), list(options)
    if first is None and isinstance(value, str) and value.strip() in options:
        return value.strip()
    if first is not None and str(value).strip().lstrip("-").isdigit():
        place = int(value) - first
        if 0 <= place < len(letters):
            return letters[place]
    last = letters[-1] if first is None else first + len(letters) - 1
    known = f"{letters[0] if first is None else first} to {last}"
    raise BadField(
        name,
        f"{excerpt(value)} is no key, which is {known} here; an item without its key cannot be "
        "scored: give a split with published answers",
    )


def listed(record: dict) -> Exam:
    """Any layout that nanomed/records/exams.py reads, in whatever case its fields are written."""
    lower = {name.lower(): value for name, value in record.items()}
    if "anwer" in lower:  # as FreedomIntelligence/Apollo spells it
        lower["answer"] = lower.pop("anwer")
    if exam := exam_of(lower):
        return exam
    raise BadField("options", f"not in this record, whose fields are {', '.join(record)[:200]}")


DECISIONS = {"A": "yes", "B": "no", "C": "maybe"}


def pubmedqa(record: dict) -> Exam:
    contexts, decision = record.get("CONTEXTS"), record.get("final_decision")
    if not isinstance(contexts, list):
        raise BadField("CONTEXTS", f"expected a list of texts, found {excerpt(contexts)}")
    letters = [letter for letter, word in DECISIONS.items() if word == decision]
    if not letters:
        raise BadField("final_decision", f"{excerpt(decision)} is none of yes, no, maybe")
    context = "\n".join(text_of(part, "CONTEXTS") for part in contexts)
    return Exam(_text(record, "QUESTION"), DECISIONS, letters[0], context=context)


# ---------------------------------------------------------------- files of their own kind


def without_header(*names: str) -> Callable[[Path, str], Records]:
    """A reader of csv files whose first row is an item already."""

    def records(path: Path, split: str) -> Records:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file, strict=True), 1):
                if len(row) != len(names):
                    raise InputError(
                        f"{path}, record {number}: {len(row)} columns, expected {len(names)}: "
                        f"{', '.join(names)}"
                    )
                yield number, dict(zip(names, row, strict=True))

    return records


def pubmedqa_records(path: Path, split: str) -> Records:
    """ori_pqal.json is one object of 1,000 items by PMID; "test" and "train" are what PubMedQA's
    own split_dataset.py makes of it (half for the test, and of the other half the first of ten
    folds for development), in its order."""
    _, whole, _ = next(iter(read_json(str(path))))
    if not isinstance(whole, dict) or not all(isinstance(v, dict) for v in whole.values()):
        raise InputError(f"{path}: expected one object of items by PMID, as ori_pqal.json is")
    if len(whole) != 1000:
        raise InputError(
            f"{path} has {len(whole)} items and not the 1,000 of ori_pqal.json, of which alone it "
            "is known which are the test's"
        )
    rng = random.Random(0)
    rest, test = _parts(whole, list(whole), 2, rng)
    _, *train = _parts(whole, rest, 10, rng)
    chosen = {"test": test, "train": [pmid for fold in train for pmid in fold]}[split]
    return ((pmid, whole[pmid]) for pmid in chosen)


def _parts(whole: dict, pmids: list[str], n: int, rng: random.Random) -> list[list[str]]:
    """n parts of about equal size with the labels in equal shares."""
    labelled = {
        word: [i for i in pmids if whole[i].get("final_decision") == word] for word in WORDS
    }
    for same in labelled.values():
        rng.shuffle(same)
    parts: list[list[str]] = [[] for _ in range(n)]
    for same in labelled.values():
        size = math.ceil(len(same) / n)
        for i, part in enumerate(parts):
            part += same[i * size : (i + 1) * size]
    if len(parts[-1]) != len(parts[0]):  # the last one is short: each of the others gives it one
        for part in parts[:-1]:
            moved = rng.choice(part)
            part.remove(moved)
            parts[-1].append(moved)
    return parts


WORDS = tuple(DECISIONS.values())
