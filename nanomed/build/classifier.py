"""Which documents are medical, and how good they are: a classifier that learns from labels.

Two can learn: a linear model over hashed n-grams (linear.py), in seconds on a CPU, and a decoder
with a linear head (reader.py), which knows more words and takes a GPU. The report says how well one
does on your documents. Both are used alike: trained by one task, limited on labelled documents
of the pool, judged on sources that they have not seen.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanomed.build import linear
from nanomed.build.labels import Label
from nanomed.build.shards import Doc, Finding, lottery
from nanomed.config import InputError

LANGUAGES = ("zh", "en", "other")
FOR_LIMITS = 500  # documents of the pool, at most, that choose the limits and train nothing
SOURCES = 8  # the largest ones, each left out once


class Model(Protocol):
    def __call__(self, texts: Sequence[str]) -> np.ndarray: ...  # [texts] log-odds, or 0 to 6
    def save(self, path: Path) -> None: ...


# (kind, texts, targets[texts]) -> a model; targets are 0 or 1 for "domain", 0 to 6 for "quality"
Learn = Callable[[str, Sequence[str], np.ndarray], Model]


def train(
    kind: str, labels: Sequence[Label], limit: float, learn: Learn = linear.learn
) -> tuple[Model, dict[str, Any]]:
    """The model and its facts: a limit for each language, chosen on labelled documents of the pool
    (`limit` where there are none of both kinds), and how it does on sources that it has not seen.
    The labels' order does not matter. Raises InputError if there is nothing to learn."""
    labels = sorted(set(labels), key=lambda label: (label.key, label))
    pool = [label for label in labels if label.in_pool]
    n = FOR_LIMITS if len(pool) < len(labels) else min(FOR_LIMITS, len(pool) // 2)
    chosen = set(pool[:n])
    seen = [label for label in labels if label not in chosen]
    if len({label.value for label in seen}) < 2:
        raise InputError(f"{kind}: {len(seen)} labels to learn from, all the same; give others")

    def scores(train_on: Sequence[Label], of: Sequence[Label]) -> np.ndarray:
        return score_texts(kind, learn(kind, *_columns(train_on)), _columns(of)[0])

    model = learn(kind, *_columns(seen))
    limits = dict.fromkeys(LANGUAGES, limit)
    for lang in LANGUAGES if kind == "domain" else ():
        texts, values = _columns([label for label in chosen if label.lang == lang])
        if len({*values}) == 2:
            limits[lang] = best_limit(score_texts(kind, model, texts), values)
    by_source, random = _left_out(kind, seen, limits, scores), _random_split(kind, seen, scores)
    facts = {"labels": len(seen), "labels_for_limits": len(chosen), "limits": limits}
    return model, facts | {"unseen_sources": by_source, "random_split": random}


def _columns(labels: Sequence[Label]) -> tuple[list[str], np.ndarray]:
    return [label.text for label in labels], np.array([label.value for label in labels])


def score_texts(kind: str, model: Model, texts: Sequence[str]) -> np.ndarray:
    """[texts] domain: a probability; quality: 0 to 6."""
    found = model(texts)
    return 1 / (1 + np.exp(-found)) if kind == "domain" else np.clip(found, 0, 6)


# ---------------------------------------------------------------- what a model is worth

Scores = Callable[[Sequence[Label], Sequence[Label]], np.ndarray]  # (learned from, scored)


def _left_out(
    kind: str, labels: list[Label], limits: dict[str, float], scores: Scores
) -> dict[str, Any]:
    """Each large source judged by a model that was trained without it."""
    sources = [
        source for source, _ in Counter(label.source for label in labels).most_common(SOURCES)
    ]
    tested, found, each = [], [], {}
    for source in sources if len(sources) > 1 else ():
        mine = [label for label in labels if label.source == source]
        rest = [label for label in labels if label.source != source]
        if len({label.value for label in rest}) < 2:
            continue
        found.append(scores(rest, mine))
        each[source] = {"labels": len(mine), "mean": round(float(found[-1].mean()), 4)}
        tested += mine
    return {"each": each} | _worth(kind, tested, np.concatenate(found), limits) if tested else {}


def _random_split(kind: str, labels: list[Label], scores: Scores) -> dict[str, Any]:
    """The figure that flatters: every source is on both sides. Labels are in a random order."""
    cut = len(labels) * 4 // 5
    if len({label.value for label in labels[:cut]}) < 2:
        return {}
    found = scores(labels[:cut], labels[cut:])
    return _worth(kind, labels[cut:], found, dict.fromkeys(LANGUAGES, 0.5))


def _worth(kind: str, labels: list[Label], scores: np.ndarray, limits: dict) -> dict[str, Any]:
    """F1 for each language, or the rank correlation."""
    if kind == "quality":
        return {"spearman": round(spearman(scores, _columns(labels)[1]), 4)}
    passes = scores >= [limits[label.lang] for label in labels]
    of = {lang: np.array([label.lang == lang for label in labels]) for lang in LANGUAGES}
    return {
        f"f1_{k}": round(f1(passes[m], _columns(labels)[1][m] > 0.5), 4)
        for k, m in of.items()
        if m.any()
    }


def f1(found: np.ndarray, right: np.ndarray) -> float:
    both = (found & right).sum()
    return float(2 * both / max(1, found.sum() + right.sum()))


def best_limit(scores: np.ndarray, right: np.ndarray) -> float:
    """The limit with the largest F1, half-way between two scores."""
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(right[order] > 0.5)
    values = 2 * hits / (np.arange(1, len(hits) + 1) + hits[-1])
    values[:-1][ranked[:-1] == ranked[1:]] = -1  # equal scores are on the same side
    best = int(values.argmax())
    return float((ranked[best] + ranked[min(best + 1, len(ranked) - 1)]) / 2)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks; equal values share theirs."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# ---------------------------------------------------------------- as a stage


@dataclass(frozen=True)
class Scorer:
    kind: str
    model: Path
    init: str  # the decoder's folder; "" for the linear model
    limits: dict[str, float]
    aside: float  # share of those below the limit that are put aside, chosen by a hash

    def judge(self, docs: list[Doc]) -> None:
        scores = score_texts(self.kind, _model(self.model, self.init), [doc.text for doc in docs])
        for doc, found in zip(docs, scores.tolist(), strict=True):
            limit = self.limits[doc.known["lang"]]
            aside = found < limit and lottery(doc.id) < self.aside
            doc.findings.append(Finding(self.kind, found, limit, found >= limit, {}, aside))


def write_model(
    _: int, path: Path, kind: str, labels: Callable[[], list[Label]], limit: float, init: str = ""
) -> dict[str, Any]:
    """The task that trains; its mark holds the facts."""
    learn = linear.learn
    if init:
        from nanomed.build import reader  # and torch with it

        learn = partial(reader.learn, init=init, work=path.parent)
    model, facts = train(kind, labels(), limit, learn)
    model.save(path)
    return facts


@cache
def _model(path: Path, init: str) -> Model:
    if not init:
        return linear.read(path)
    from nanomed.build import reader

    return reader.read(path, init)
