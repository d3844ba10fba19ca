"""How good a document is, as a model learns it: five defects planted into real English texts.
`NANOMED_REAL_MODEL=FOLDER pytest -m slow -s tests/build/test_quality.py` prints the figures."""

import random
import re

import numpy as np
import pytest

from nanomed.build import linear, reader
from nanomed.build.classifier import Model, score_texts, spearman
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


def worth(name: str, model: Model, of: list[Document]) -> tuple[float, dict[str, float]]:
    """(Spearman, the AUC of each defect against the good ones), printed, by degree as well."""
    texts, defects, quality = zip(*of, strict=True)
    scores, defects, quality = (
        score_texts("quality", model, texts),
        np.array(defects),
        np.array(quality),
    )
    good = scores[defects == ""]

    def auc(bad: np.ndarray) -> float:
        bad = scores[bad][:, None]
        return float(((bad < good) + 0.5 * (bad == good)).mean())

    rank = spearman(scores, quality.astype(float))
    print(f"{name}: Spearman {rank:.3f}; AUC, in all and of degrees 1, 2, 3:")
    aucs = {defect: auc(defects == defect) for defect in DEFECTS}
    for defect, whole in aucs.items():
        degrees = [auc((defects == defect) & (quality == q)) for q in (4, 3, 2)]
        print(f"  {defect:<14} {whole:.3f}  ", *(f"{value:.2f}" for value in degrees), flush=True)
    return rank, aucs


@pytest.mark.slow
def test_planted_defects_on_a_source_that_was_not_trained_on(shared_data, tmp_path, monkeypatch):
    """PubMed's abstracts, which are benchmarks, are scored and never learned. Two plantings of each
    text that is learned, once over, take 40 minutes of one core."""
    texts, rng = sources(shared_data), random.Random(0)
    of = {name: pieces(texts[name], rng) for name in ("wiki en", "c4 en", "dpo en", "alpaca en")}
    unseen = documents(pieces(texts["pubmed en"], rng)[:400], 3, 1)[:250]
    names = ("wiki en", "c4 en", "dpo en")
    held_out = documents([text for name in names for text in of[name][:100]], 2, 1)[:200]
    learned = [text for name in names for text in of[name][100:]] + of["alpaca en"]
    rng.shuffle(learned)
    learned = documents(learned, 1, 0) + documents(learned, 4, 0)
    given = [text for text, *_ in learned], np.array([float(q) for *_, q in learned])
    print(f"\n{len(learned)} documents to learn from")
    ngrams = linear.learn("quality", *given)
    monkeypatch.setitem(reader.TRAINING, "epochs", 1)
    decoder = reader.learn("quality", *given, str(real_model_folder()), tmp_path)
    ranks = {}
    for name, model in (("n-grams", ngrams), ("decoder", decoder)):
        worth(f"{name}, held-out documents of its sources", model, held_out)
        ranks[name], aucs = worth(f"{name}, PubMed", model, unseen)
    assert ranks["decoder"] > max(0.55, ranks["n-grams"] + 0.2)
    assert min(aucs["advertisement"], aucs["grammar"], aucs["boilerplate"]) > 0.8
