"""Labelled documents: from files, or from a labeller that is asked about documents of the pool.

A labelled document is a record with its `text` and a `domain` (a name of prompts.toml) or a
`quality` (0 to 6); `in_pool` says that it is one of the corpus that is being built. A labeller is
asked twice about each. Where its two answers differ (medicine or not, two points of quality) the
document is left out.
"""

import hashlib
import tomllib
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from nanomed.build.files import line_of, whole
from nanomed.build.labeller import Endpoint, Request, is_one_of, parse_object, quoted
from nanomed.build.pipeline import Build
from nanomed.build.shards import Doc, Tally, lottery, packed, read_shard, text_of
from nanomed.config import InputError
from nanomed.records import language, read_records
from nanomed.records.shapes import blank, source_of

LONGEST = 3000  # characters of a document that a labeller is shown
TEMPERATURE = 0.7  # at 0 the second answer would be the first one again
DIFFER = {"domain": 1, "quality": 2}  # two values as far apart are a disagreement


class Label(NamedTuple):
    text: str
    value: float  # domain: 1 if it is the wanted one, else 0; quality: 0 to 6
    source: str
    lang: str
    in_pool: bool  # whether it is a document of the corpus that is being built
    key: str  # a hash of the text: its place in any order


@cache
def prompts() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("prompts.toml").read_text("utf-8"))


def value_of(kind: str, answer: Any) -> float:
    return float(answer == prompts()[kind]["wanted"]) if kind == "domain" else float(answer)


def read_labels(kind: str, paths: list[str], fields: Sequence[str] = ()) -> list[Label]:
    """The labels of one kind in files. Raises InputError naming file, record and field."""
    found = []
    for path in paths:
        for number, record, _ in read_records(path, fields):
            if not isinstance(record, dict) or record.get(kind) is None:
                continue
            answers = prompts()[kind]["answers"]
            if not is_one_of(record[kind], answers):
                where = f"{path}, record {number}: field {kind!r}"
                raise InputError(f"{where}: {record[kind]!r} is none of {answers}")
            if blank(text := text_of(path, number, record)):
                raise InputError(f"{path}, record {number}: a label without a text")
            source = source_of(record) or Path(path).name
            in_pool = bool(record.get("in_pool"))
            found.append(_label(text, value_of(kind, record[kind]), source, in_pool))
    return found


def _label(text: str, value: float, source: str, in_pool: bool) -> Label:
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return Label(text, value, source, language(text), in_pool, key)


# ---------------------------------------------------------------- asking


def sample(build: Build, folder: Path, paths: list[Path], tally: Tally, n: int) -> list[Doc]:
    """About n documents of the pool, as many Chinese as English, chosen by a hash of their id."""
    totals = {lang: sum(size[0] for key, size in tally.flow.items() if key.endswith(f"\t{lang}"))
              for lang in ("zh", "en")}  # fmt: skip
    shares = {lang: n / 2 / total for lang, total in totals.items() if total}
    out = folder / "sample"
    task = partial(write_sample, paths=paths, out=out, shares=shares)
    build.runner.run(out, task, len(paths))
    chosen = [out / f"{i:05d}.jsonl.gz" for i in range(len(paths))]
    return [doc for path in chosen for doc in read_shard(path)]


def write_sample(i: int, paths: list[Path], out: Path, shares: dict[str, float]):
    with whole(out / f"{i:05d}.jsonl.gz") as raw, packed(raw) as file:
        for doc in read_shard(paths[i]):
            if lottery(doc.id) < shares.get(doc.known["lang"], 0.0):
                file.write(line_of({**doc.record, "nanomed": {"id": doc.id, **doc.known}}))
    return {}


def ask(endpoint: Endpoint, kind: str, docs: list[Doc], retry_failed: bool) -> list[Label]:
    """What both answers about each document agree on."""
    allowed = {kind: prompts()[kind]["answers"]}
    requests = [request(kind, doc.text, doc.known["lang"], i) for i in (0, 1) for doc in docs]
    answers = endpoint.ask_parsed(requests, lambda t: parse_object(t, allowed), retry_failed)
    found, dropped = [], Counter()
    for doc, *both in zip(docs, answers[: len(docs)], answers[len(docs) :], strict=True):
        if None in both:
            dropped["with an answer that cannot be read"] += 1
            continue
        values = [value_of(kind, answer[kind]) for answer in both]
        if abs(values[0] - values[1]) >= DIFFER[kind]:
            dropped["on which two answers differ"] += 1
            continue
        found.append(_label(doc.text, sum(values) / 2, doc.known["source"], in_pool=True))
    others = ", ".join(f"{n:,} {why}" for why, n in sorted(dropped.items()))
    print(f"{kind}: {len(docs):,} documents, {len(found):,} labelled; {others or 'all'}")
    return found


def request(kind: str, text: str, lang: str, round: int) -> Request:
    spec = prompts()[kind]
    words = spec["zh" if lang == "zh" else "en"]
    answers = ", ".join(map(str, spec["answers"]))
    user = words["user"].format(text=quoted(text[:LONGEST]), answers=answers)
    messages = [{"role": "system", "content": words["system"]}, {"role": "user", "content": user}]
    return Request(messages, spec["max_tokens"], TEMPERATURE, round)
