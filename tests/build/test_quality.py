"""How good a document is, as a model learns it: from the scores of a large model, and from five
defects planted into real English texts.
`NANOMED_REAL_MODEL=FOLDER pytest -m slow -s tests/build/test_quality.py` prints the figures."""

import glob
import hashlib
import os
import random
import re
from collections.abc import Callable
from functools import partial
from urllib.parse import urlparse

import numpy as np
import pytest

from nanomed.build import linear, reader
from nanomed.build.classifier import Model, score_texts, spearman
from nanomed.records import read_records
from tests.build.real import real_model_folder, sources

DEFECTS = ("advertisement", "spliced", "grammar", "boilerplate", "incoherent")
# Lines to learn from, and others to be measured with.
ADVERTS = (
    [
        "Call now and save 30% on your first order.",
        "Our clinic offers the best prices in town, book today.",
        "Buy two bottles and get the third one free.",
        "Click the link below to claim your discount.",
        "Limited offer: free shipping until Sunday.",
        "Thousands of happy customers trust our product.",
        "Order this miracle supplement before it sells out.",
        "Sign up for our newsletter and win a voucher.",
    ],
    [
        "Hurry, only a few packages are left at this price.",
        "Visit our shop and ask for the special deal.",
        "Use the code HEALTH10 at checkout.",
        "Money back guarantee if you are not satisfied.",
        "Our experts will phone you at no cost.",
        "Get yours today with same day delivery.",
    ],
)
LAYOUT = (
    [
        "Home | About | Contact | Login",
        "Copyright 2019 All rights reserved.",
        "Share this on Facebook Twitter Email",
        "Skip to main content",
        "[Image: figure1.jpg]",
        "Read more » Comments (0)",
        "Loading video player ...",
        "Posted in Uncategorized | Leave a reply",
    ],
    [
        "Menu Search Sitemap Privacy policy",
        "Terms of use apply. Powered by WordPress",
        "Previous post Next post",
        "Print this page Tweet Pin it",
        "[video width=640 height=360]",
        "Related articles: see also",
    ],
)
SMALL = ("the", "a", "of", "is", "are", "was", "were", "to", "in", "and")
Document = tuple[str, str, int]  # text, its defect or "", quality


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def pieces(texts: list[str], rng: random.Random) -> list[str]:
    """Four to six sentences each, 250 to 700 characters."""
    found = []
    for text in texts:
        whole = sentences(re.sub(r"\s+", " ", text))
        for i in range(0, len(whole), 6):
            piece = " ".join(whole[i : i + 6])
            if len(whole[i : i + 6]) >= 4 and 250 < len(piece) < 700:
                found.append(piece)
    rng.shuffle(found)
    return found


def broken(rng: random.Random, sentence: str) -> str:
    """Words that changed places, in half of them, and small ones that are gone."""
    words = sentence.split()
    if rng.random() < 0.5:
        i = rng.randrange(max(1, len(words) - 5))
        part = words[i : i + 6]
        rng.shuffle(part)
        words[i : i + 6] = part
    return " ".join(w for w in words if not (w.lower() in SMALL and rng.random() < 0.6))


def spoiled(
    rng: random.Random, text: str, defect: str, level: int, others: list[str], side: int
) -> str:
    """With one of DEFECTS; level 1 to 3: how much of it."""
    parts = sentences(text)
    n = len(parts)
    if defect in ("advertisement", "boilerplate"):
        bank = (ADVERTS if defect == "advertisement" else LAYOUT)[side]
        for line in rng.sample(bank, level):
            parts.insert(rng.randint(0, len(parts)), line)
    elif defect == "spliced":
        other, cut = sentences(rng.choice(others)), max(1, n * (4 - level) // 4)
        parts = parts[:cut] + other[len(other) // 2 :][: max(1, n - cut) + 1]
    elif defect == "grammar":
        for i in rng.sample(range(n), max(1, n * level // 3)):
            parts[i] = broken(rng, parts[i])
    else:
        if level == 3:
            parts = [
                rng.choice(sentences(rng.choice(others))) if i % 2 else part
                for i, part in enumerate(parts)
            ]
        order = list(range(n))
        rng.shuffle(order)
        parts = [parts[i] for i in order]
    return " ".join(parts)


def documents(texts: list[str], seed: int, side: int) -> list[Document]:
    """Three in five with a defect: quality 4, 3 or 2; the others 6."""
    rng, made = random.Random(seed), []
    for text in texts:
        defect, level = "", 0
        if rng.random() < 0.6:
            defect, level = rng.choice(DEFECTS), rng.randint(1, 3)
            text = spoiled(rng, text, defect, level, texts, side)
        made.append((text, defect, 6 - (level + 1 if level else 0)))
    return made


def with_error(measure: Callable[..., float], *samples: np.ndarray) -> str:
    """measure(*samples) and its standard error, by a bootstrap that draws from each sample."""
    rng = np.random.default_rng(0)
    drawn = [measure(*(x[rng.integers(0, len(x), len(x))] for x in samples)) for _ in range(300)]
    return f"{measure(*samples):.3f} ± {np.std(drawn):.3f}"


def auc(bad: np.ndarray, good: np.ndarray) -> float:
    bad = bad[:, None]
    return float(((bad < good) + 0.5 * (bad == good)).mean())


def rank(pairs: np.ndarray) -> float:
    """pairs[documents,2], scores and true qualities -> Spearman's correlation"""
    return spearman(pairs[:, 0], pairs[:, 1])


def worth(name: str, model: Model, texts: list[str], mixed: list[Document]) -> dict[str, float]:
    """Printed: Spearman's correlation of `mixed`, and of each defect, planted into 200 of the
    texts, the AUC against the others as they are. -> {"Spearman" and each defect: the figure},
    those of degree 3."""

    def scores(of: list[str]) -> np.ndarray:
        return score_texts("quality", model, of)

    given = np.stack([scores([text for text, *_ in mixed]), [float(q) for *_, q in mixed]], 1)
    print(f"{name}: Spearman {with_error(rank, given)}; AUC of degrees 1 and 3:")
    some, good, found = texts[:200], scores(texts[200:]), {"Spearman": rank(given)}
    for defect in DEFECTS:
        rng, shown = random.Random(5), []
        for level in (1, 3):
            bad = scores([spoiled(rng, text, defect, level, texts, 1) for text in some])
            found[defect] = auc(bad, good)
            shown.append(with_error(auc, bad, good))
        print(f"  {defect:<14}", *shown, flush=True)
    return found


def more_pieces(unseen: list[str], rng: random.Random) -> list[str]:
    """Of the files that NANOMED_TEXTS names, as a pattern: of each record's `text` six at most, and
    none that shares eight words with an unseen one."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    known = set().union(*map(runs, unseen))
    named = sorted(glob.glob(os.environ.get("NANOMED_TEXTS", "")))
    texts = [record["text"] for path in named for _, record, _ in read_records(path)]
    found = [piece for text in texts for piece in pieces([text], rng)[:6]]
    return [piece for piece in found if not known & runs(piece)]


@pytest.mark.slow
def test_planted_defects_on_a_source_that_was_not_trained_on(shared_data, tmp_path, monkeypatch):
    """PubMed's abstracts, which are benchmarks, are scored and never learned. Two plantings of each
    text that is learned, once over, take 40 minutes of one core; the scores 15 more. NANOMED_TEXTS
    may name files of more texts to learn from, for a GPU."""
    texts, rng = sources(shared_data), random.Random(0)
    of = {name: pieces(texts[name], rng) for name in ("wiki en", "c4 en", "dpo en", "alpaca en")}
    unseen = pieces(texts["pubmed en"], rng)
    names = ("wiki en", "c4 en", "dpo en")
    held_out = [text for name in names for text in of[name][:100]]
    learned = [text for name in names for text in of[name][100:]] + of["alpaca en"]
    rng.shuffle(learned)
    more = more_pieces(unseen + held_out, rng)
    learned = documents(learned, 1, 0) + documents(learned, 4, 0) + documents(more, 21, 0)
    given = [text for text, *_ in learned], np.array([float(q) for *_, q in learned])
    print(f"\n{len(learned)} documents to learn from")
    ngrams = linear.learn("quality", *given)
    monkeypatch.setitem(reader.TRAINING, "epochs", 1)
    decoder = reader.learn("quality", *given, str(real_model_folder()), tmp_path)
    mixed = documents(held_out, 2, 1)[:200], documents(unseen[:400], 3, 1)[:250]
    random.Random(6).shuffle(held_out)  # its sources lie one behind the other
    found = {}
    for name, model in (("n-grams", ngrams), ("decoder", decoder)):
        worth(f"{name}, held-out documents of its sources", model, held_out, mixed[0])
        found[name] = worth(f"{name}, PubMed", model, unseen, mixed[1])
    ranks = {name: figures.pop("Spearman") for name, figures in found.items()}
    assert ranks["decoder"] > max(0.55, ranks["n-grams"] + 0.2)
    hard = [found["decoder"].pop(defect) for defect in ("spliced", "incoherent")]
    assert min(found["decoder"].values()) > 0.9
    assert min(hard) > (0.85 if len(more) > 10_000 else 0.75)


# ---------------------------------------------------------------- scores of a large model

HELD_OUT, LEARNED = 500, 600  # documents; the n-grams learn from all others as well


def scored_documents() -> tuple[list[tuple], list[tuple]]:
    """(held out, others), of (text, score), in a random order of their sites: no site is in both,
    and no text twice."""
    if not (named := os.environ.get("NANOMED_SCORED")):
        pytest.skip("no scored documents: NANOMED_SCORED names files (JSON lines or Parquet, as a "
                    "pattern) whose records have text, score (0 to 6) and url")  # fmt: skip
    found = {}
    for path in sorted(glob.glob(named)):
        for _, record, _ in read_records(path):
            site = (urlparse(record["url"]).hostname or "").removeprefix("www.")
            order = hashlib.blake2b(site.encode(), digest_size=8).digest()
            found.setdefault(record["text"], (order, record["text"], float(record["score"])))
    scored = sorted(found.values())
    first = {order for order, *_ in scored[:HELD_OUT]}
    held_out = [(text, score) for order, text, score in scored if order in first]
    return held_out, [(text, score) for order, text, score in scored if order not in first]


@pytest.mark.slow
def test_scores_of_a_large_model_are_learned(tmp_path, monkeypatch):
    """Also among the documents with a score above 0: what has 0 is often about something else,
    which is easily seen. The decoder takes 45 minutes of one core."""
    held_out, others = scored_documents()
    texts, y = [text for text, _ in others], np.array([score for _, score in others])
    print(f"\n{len(held_out)} documents held out, {len(others)} others")
    monkeypatch.setitem(reader.TRAINING, "epochs", 1)
    learn = [(f"n-grams, {n} learned", n, linear.learn) for n in (LEARNED, len(others))]
    folder = str(real_model_folder())
    learn.append((f"decoder, {LEARNED} learned once",
                  LEARNED, partial(reader.learn, init=folder, work=tmp_path)))  # fmt: skip
    for name, n, by in learn:
        scores = score_texts("quality", by("quality", texts[:n], y[:n]), [t for t, _ in held_out])
        pairs = np.stack([scores, [score for _, score in held_out]], 1)
        above = pairs[pairs[:, 1] > 0]
        print(f"{name}: Spearman {with_error(rank, pairs)} of {len(pairs)}, "
              f"{with_error(rank, above)} of {len(above)} above 0", flush=True)  # fmt: skip
        assert rank(pairs) >= 0.7 and rank(above) >= 0.7
