"""Duplicates: all exact ones, near ones as often as the formula says, and nothing else."""

import functools
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomed.build import duplicates
from nanomed.build.duplicates import BANDS, EDGE, ROWS, near_keys, survivors
from nanomed.build.shards import batched
from tests.build import corpora
from tests.build.corpora import corpus, digests, dropped, exam, kept, read, text, write

LETTER = {"zh": "", "en": " "}


@functools.cache
def shingles(document: str) -> set[tuple[str, ...]]:
    """5-grams without any of the library's code; texts here need no normalising but the case."""
    words = re.findall("[\u4e00-\u9fff]|[a-z0-9]+", document.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def jaccard(a: str, b: str) -> float:
    one, other = shingles(a), shingles(b)
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def edited(rng: random.Random, document: str, lang: str, share: float) -> str:
    """Some tokens replaced: about every fifth of a share makes one 5-gram in five another."""
    parts = list(document) if lang == "zh" else document.split(" ")
    for i in range(len(parts)):
        if rng.random() < share:
            parts[i] = (
                rng.choice("的一是在不了有和人这") if lang == "zh" else f"w{rng.randrange(99)}"
            )
    return LETTER[lang].join(parts)


# ---------------------------------------------------------------- recall and precision


def measured(lang: str, n: int, sentences: tuple[int, int], seed: int = 0) -> dict[float, list]:
    """bin of exact Jaccard -> [(candidate or not, what the formula says of its Jaccard)]."""
    rng = random.Random(f"{lang}{seed}")
    originals = [text(rng, lang, rng.randint(*sentences)) for _ in range(n)]
    copies = [
        edited(rng, t, lang, rng.choice((0.005, 0.01, 0.02, 0.03, 0.05, 0.08))) for t in originals
    ]
    keys = [near_keys(part) for docs in (originals, copies) for part in [docs]]
    same = (keys[0] == keys[1]).all(2).any(1)
    bins: dict[float, list] = {}
    for a, b, candidate in zip(originals, copies, same.tolist(), strict=True):
        alike = jaccard(a, b)
        formula = 1 - (1 - alike**ROWS) ** BANDS
        bins.setdefault(min(0.95, int(alike * 20) / 20), []).append((candidate, formula))
    return bins


def assert_as_the_formula(bins: dict[float, list], least: int) -> None:
    for low, found in sorted(bins.items()):
        if len(found) < least or low < 0.3:
            continue
        candidates, formula = np.array(found, float).T
        rare = formula.sum() < 10  # of few the distribution is no normal one: its tail is longer
        error = np.sqrt((formula * (1 - formula)).sum() + rare) / len(found)
        assert abs(candidates.mean() - formula.mean()) <= 3 * error + 1e-9, (low, len(found))


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_near_duplicates_are_found_as_often_as_the_formula_says(lang):
    bins = measured(lang, 1500, (5, 14))
    assert_as_the_formula(bins, 40)
    assert sum(len(found) >= 40 for low, found in bins.items() if low >= 0.3) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("sentences", [(1, 2), (3, 6), (20, 40)])
def test_the_same_for_short_and_long_texts_and_many_pairs(lang, sentences):
    bins = measured(lang, 20_000 if sentences[1] < 20 else 5000, sentences)
    assert_as_the_formula(bins, 200)
    print({low: (len(f), *np.array(f, float).mean(0).round(3)) for low, f in sorted(bins.items())})


def test_a_planted_bug_would_be_seen(monkeypatch):
    """Rows that are not independent of one another find too much."""
    monkeypatch.setattr(duplicates, "constants", lambda n, seed: np.full(n, 2**61 + 15, np.uint64))
    with pytest.raises(AssertionError):
        assert_as_the_formula(measured("zh", 600, (5, 14)), 40)


# ---------------------------------------------------------------- whole builds


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[list[str], Path]:
    folder = tmp_path_factory.mktemp("duplicates")
    files = corpus(folder / "raw", n_files=3, n=150, seed=5)
    exam(folder / "raw")
    extra = [
        {"text": t} for t in ("好", "好", "好 的", "ok", "ok then", "ok then", "A b c d", "A b c d")
    ]
    write(folder / "raw/tiny.jsonl", extra)
    files.append(str(folder / "raw/tiny.jsonl"))
    return files, build(files, folder / "out")


def build(files: list[str], out: Path, *more: str) -> Path:
    """Nothing goes but duplicates."""
    rules = ("--min_tokens", "0", "--private", "keep", "--max_repetition", "1")
    return corpora.build(files, out, *rules, *more)


def documents(files: list[str]) -> dict[tuple[str, int], str]:
    return {(f, i): r["text"] for f in files for i, r in enumerate(read(Path(f)), 1)}


def test_every_exact_duplicate_goes_and_the_first_stays(built):
    files, out = built
    texts, seen, expected = documents(files), set(), set()
    for place in sorted(texts):
        expected |= {place} if texts[place].strip() in seen else set()
        seen.add(texts[place].strip())
    found = [d for d in dropped(out) if d["reason"] == "exact_duplicate"]
    assert {(d["file"], d["record"]) for d in found} == expected and len(expected) > 20
    for d in found:
        survivor = d["survivor"]["file"], d["survivor"]["record"]
        assert texts[survivor].strip() == texts[d["file"], d["record"]].strip()
        assert survivor not in expected and d["value"] == d["limit"] == 1


def test_a_near_duplicate_goes_only_for_one_that_stays_and_is_as_like_it_as_its_line_says(built):
    files, out = built
    texts = documents(files)
    found = [d for d in dropped(out) if d["reason"] == "near_duplicate"]
    gone = {(d["file"], d["record"]) for d in found}
    assert len(found) > 20
    for d in found:
        survivor = d["survivor"]["file"], d["survivor"]["record"]
        exact = jaccard(texts[survivor], texts[d["file"], d["record"]])
        assert exact >= 0.8 == d["limit"] and d["value"] == pytest.approx(exact, abs=1e-4)
        assert survivor < (d["file"], d["record"]) and survivor not in gone
    left = [(r["text"], r["nanomed"]["id"]) for r in kept(out, "4-near")]
    pairs = [(a, b) for (a, _), (b, _) in itertools.combinations(left, 2) if jaccard(a, b) >= 0.95]
    assert pairs == []  # the formula finds 99.99% of them


def test_survivors_depend_on_neither_shards_nor_the_order_of_files(built, tmp_path):
    files, out = built
    expected = kept(out)
    for name, chars, order in (("1", 10**8, files), ("many", 3000, files[::-1])):
        other = build(order, tmp_path / name, "--shard_chars", str(chars))
        assert [r["nanomed"]["id"] for r in kept(other)] == [r["nanomed"]["id"] for r in expected]
        here, there = (
            {name: d for name, d in digests(x / "final").items() if name.endswith(".gz")}
            for x in (out, other)
        )
        assert here == there
        lines = [{k: v for k, v in d.items() if k != "text"} for d in dropped(other)]
        key = lambda d: (d["reason"], d["file"], d["record"])  # noqa: E731
        assert sorted(lines, key=key) == sorted(
            [{k: v for k, v in d.items() if k != "text"} for d in dropped(out)], key=key
        )


def test_every_record_is_kept_or_dropped_at_each_stage(built):
    files, out = built
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert [s["name"] for s in stages] == [
        "read", "exact", "rules", "domain", "near", "quality", "decontaminate",
    ]  # fmt: skip
    assert stages[0]["read"] == len(documents(files))
    for before, stage in itertools.pairwise(stages):
        assert stage["read"] == before["kept"] == stage["kept"] + sum(stage["dropped"].values())
    assert stages[-1]["kept"] == len(kept(out))
    assert len(dropped(out)) == sum(sum(s["dropped"].values()) for s in stages)
    for d in dropped(out):
        assert {"file", "record", "reason", "value", "limit"} <= set(d)
    for folder in out.glob("[0-9]-*"):
        for done in folder.glob("0*.done.json"):
            said = json.loads(done.read_text())
            stem = done.name.removesuffix(".done.json")
            lines = read(folder / f"{stem}.dropped.jsonl")
            n_kept = len(read(folder / f"{stem}.jsonl.gz"))
            assert said["read"] == n_kept + len(lines) and sum(said["dropped"].values()) == len(
                lines
            )


# ---------------------------------------------------------------- parts


SAME = text(random.Random(6), "zh", 12)


def test_a_key_that_all_have_makes_a_line_of_pairs_and_not_a_square(tmp_path):
    files = [write(tmp_path / "same.jsonl", [{"text": f"{SAME} {i}"} for i in range(400)])]
    exam(tmp_path)
    out = build(files, tmp_path / "out")
    pairs = [json.loads(p.read_text())["pairs"] for p in (out / "4-near/pairs").glob("*.json")]
    assert max(pairs) < 2 * 400
    assert len(kept(out)) == 1


EDGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30)


@given(EDGES)
def test_survivors_are_those_of_the_definition(pairs):
    pairs = [(min(p), max(p)) for p in pairs if p[0] != p[1]]
    edges = np.array([(a, b, 1.0) for a, b in pairs], EDGE)
    gone: dict[int, int] = {}
    for b in range(13):
        stays = [a for a in range(b) if (a, b) in pairs and a not in gone]
        if stays:
            gone[b] = stays[0]
    found = edges[survivors(edges)]
    assert dict(zip(found["later"].tolist(), found["earlier"].tolist(), strict=True)) == gone


def test_a_neighbour_of_a_neighbour_stays():
    """A ~ B ~ C, and A is not like C."""
    edges = np.array([(1, 2, 0.9), (2, 3, 0.9)], EDGE)
    assert edges[survivors(edges)]["later"].tolist() == [2]


def test_keys_do_not_depend_on_the_batch():
    rng = random.Random(3)
    texts = [text(rng, rng.choice(("zh", "en")), rng.randint(1, 9)) for _ in range(60)] + [
        "",
        "!",
        "好",
    ]
    together = near_keys(texts)
    for i, one in enumerate(texts):
        assert (near_keys([one])[0] == together[i]).all()
    assert (together[-3:-1] == 0).all() and together[-1].all()
    assert list(batched([])) == []
