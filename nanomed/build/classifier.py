"""A linear model over hashed n-grams: which documents are medical, and how good they are.

A document's features are its different runs of one, two and three tokens and the first letters of
its words (cardi-, hepat-: what one source calls by one word another calls by a relative of it),
hashed into 2^20 buckets. Each bucket has a weight; the score is their sum over the root of their
number, plus a bias. Such a model is one file of 4 MB and learns in seconds on a CPU. What it is
worth depends on the sources it has seen; so its figures are of sources it has not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from nanomed.build.labels import Label
from nanomed.build.runner import whole
from nanomed.build.shards import Doc, Finding, lottery
from nanomed.build.text import U64, Ragged, distinct, mix, ngrams, tokens
from nanomed.config import InputError

BUCKET_BITS = 20
BEGINNINGS = (4, 6)  # letters
LONGEST = 4000  # characters of a document that are looked at
EPOCHS, BATCH, RATE = 4, 64, 0.3  # Adagrad


class Model(NamedTuple):
    weights: np.ndarray  # [2^20] float32
    bias: float


def features(texts: Sequence[str]) -> Ragged:
    """The buckets of every text, sorted, each once."""
    starts = [text[:LONGEST] for text in texts]
    found = tokens(starts)
    runs = [ngrams(found, n) for n in (1, 2, 3)] + [tokens(starts, n) for n in BEGINNINGS]
    keys = []
    for kind, grams in enumerate(runs):
        text = np.repeat(np.arange(len(grams), dtype=U64), grams.lengths)
        hashed = mix(grams.values + U64(kind)) >> U64(64 - BUCKET_BITS)
        keys.append(text << U64(BUCKET_BITS) | hashed)
    keys = distinct(np.concatenate(keys))
    borders = np.searchsorted(keys >> U64(BUCKET_BITS), np.arange(len(texts) + 1, dtype=U64))
    return Ragged((keys & U64((1 << BUCKET_BITS) - 1)).astype(np.int64), borders)


def score(model: Model, found: Ragged) -> np.ndarray:
    """[texts] float64; a text without tokens has the bias."""
    sums = np.concatenate(([0.0], np.cumsum(model.weights[found.values], dtype=np.float64)))
    return np.diff(sums[found.borders]) / np.sqrt(np.maximum(found.lengths, 1)) + model.bias


def fit(found: Ragged, targets: np.ndarray, kind: str, epochs: int = EPOCHS) -> Model:
    """targets[texts]: 0 or 1 for kind "domain", where both classes weigh the same; numbers for kind
    "quality". On one thread, so that the same labels give the same bits."""
    import torch
    from torch.nn import functional as F

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, else it warns
    bag = torch.nn.EmbeddingBag(1 << BUCKET_BITS, 1, mode="sum", sparse=True)
    torch.nn.init.zeros_(bag.weight)
    y = torch.tensor(np.asarray(targets), dtype=torch.float32)
    bias = torch.nn.Parameter(torch.tensor(float(y.mean()) if kind == "quality" else 0.0))
    scale = torch.tensor(np.maximum(found.lengths, 1) ** -0.5, dtype=torch.float32)
    positive = float(y.mean()) if kind == "domain" else 0.5
    weight = torch.where(y > 0.5, 0.5 / max(positive, 1e-6), 0.5 / max(1 - positive, 1e-6))
    optimizer = torch.optim.Adagrad([bag.weight, bias], lr=RATE)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(y)), -(-len(y) // BATCH)):
            borders = np.cumsum([0, *found.lengths[batch]])[:-1]
            values = torch.from_numpy(np.concatenate([found[i] for i in batch]))
            z = bag(values, torch.from_numpy(borders))[:, 0] * scale[batch] + bias
            if kind == "domain":
                loss = F.binary_cross_entropy_with_logits(z, y[batch], weight[batch])
            else:
                loss = F.mse_loss(z, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return Model(bag.weight.detach()[:, 0].numpy(), bias.item())


# ---------------------------------------------------------------- what a model is worth

LANGUAGES = ("zh", "en", "other")
FOR_LIMITS = 500  # documents of the pool, at most, that choose the limits and train nothing
SOURCES = 8  # the largest ones, each left out once


def train(kind: str, labels: Sequence[Label], limit: float) -> tuple[Model, dict[str, Any]]:
    """The model and its facts: a limit for each language, chosen on labelled documents of the pool
    (`limit` where there are none of both kinds), and how it does on sources that it has not seen.
    The labels' order does not matter. Raises InputError if there is nothing to learn."""
    labels = sorted(set(labels), key=lambda label: (label.key, label.source))
    pool = [label for label in labels if label.in_pool]
    n = FOR_LIMITS if len(pool) < len(labels) else min(FOR_LIMITS, len(pool) // 2)
    chosen = set(pool[:n])
    seen = [label for label in labels if label not in chosen]
    if len({label.value for label in seen}) < 2:
        raise InputError(f"{kind}: {len(seen)} labels to learn from, all the same; give others")
    model = _fit(kind, seen)
    limits = dict.fromkeys(LANGUAGES, limit)
    for lang in LANGUAGES if kind == "domain" else ():
        mine = [label for label in chosen if label.lang == lang]
        if len({label.value for label in mine}) == 2:
            limits[lang] = best_limit(_scores(kind, model, mine), _values(mine))
    by_source, random = _left_out(kind, seen, limits), _random_split(kind, seen)
    facts = {"labels": len(seen), "labels_for_limits": len(chosen), "limits": limits}
    return model, facts | {"unseen_sources": by_source, "random_split": random}


def _fit(kind: str, labels: Sequence[Label]) -> Model:
    return fit(features([label.text for label in labels]), _values(labels), kind)


def _values(labels: Sequence[Label]) -> np.ndarray:
    return np.array([label.value for label in labels])


def _scores(kind: str, model: Model, labels: Sequence[Label]) -> np.ndarray:
    return score_texts(kind, model, [label.text for label in labels])


def score_texts(kind: str, model: Model, texts: Sequence[str]) -> np.ndarray:
    """[texts] domain: a probability; quality: 0 to 6."""
    found = score(model, features(texts))
    return 1 / (1 + np.exp(-found)) if kind == "domain" else np.clip(found, 0, 6)


def _left_out(kind: str, labels: list[Label], limits: dict[str, float]) -> dict[str, Any]:
    """Each large source judged by a model that was trained without it."""
    sources = [
        source for source, _ in Counter(label.source for label in labels).most_common(SOURCES)
    ]
    tested, scores, each = [], [], {}
    for source in sources if len(sources) > 1 else ():
        mine = [label for label in labels if label.source == source]
        rest = [label for label in labels if label.source != source]
        if len({label.value for label in rest}) < 2:
            continue
        found = _scores(kind, _fit(kind, rest), mine)
        each[source] = {"labels": len(mine), "mean": round(float(found.mean()), 4)}
        tested += mine
        scores.append(found)
    return {"each": each} | _worth(kind, tested, np.concatenate(scores), limits) if tested else {}


def _random_split(kind: str, labels: list[Label]) -> dict[str, Any]:
    """The figure that flatters: every source is on both sides. Labels are in a random order."""
    cut = len(labels) * 4 // 5
    if len({label.value for label in labels[:cut]}) < 2:
        return {}
    model = _fit(kind, labels[:cut])
    return _worth(
        kind, labels[cut:], _scores(kind, model, labels[cut:]), dict.fromkeys(LANGUAGES, 0.5)
    )


def _worth(kind: str, labels: list[Label], scores: np.ndarray, limits: dict) -> dict[str, Any]:
    """F1 for each language, or the rank correlation."""
    if kind == "quality":
        return {"spearman": round(spearman(scores, _values(labels)), 4)}
    passes = scores >= [limits[label.lang] for label in labels]
    of = {lang: np.array([label.lang == lang for label in labels]) for lang in LANGUAGES}
    return {
        f"f1_{k}": round(f1(passes[m], _values(labels)[m] > 0.5), 4)
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
    limits: dict[str, float]
    aside: float  # share of those below the limit that are put aside, chosen by a hash

    def judge(self, docs: list[Doc]) -> None:
        scores = score_texts(self.kind, _model(self.model), [doc.text for doc in docs])
        for doc, found in zip(docs, scores.tolist(), strict=True):
            limit = self.limits[doc.known["lang"]]
            aside = found < limit and lottery(doc.id) < self.aside
            doc.findings.append(Finding(self.kind, found, limit, found >= limit, {}, aside))


def write_model(_: int, path: Path, kind: str, labels: Callable[[], list[Label]], limit: float):
    """The task that trains; its mark holds the facts."""
    model, facts = train(kind, labels(), limit)
    with whole(path) as file:
        file.write(save({"weights": model.weights, "bias": np.array([model.bias], np.float32)}))
    return facts


@cache
def _model(path: Path) -> Model:
    tensors = load(path.read_bytes())
    return Model(tensors["weights"], float(tensors["bias"][0]))
