"""A linear model over hashed n-grams: which documents are medical, and how good they are.

A document's features are its different runs of one, two and three tokens and the first letters of
its words (cardi-, hepat-: what one source calls by one word another calls by a relative of it),
hashed into 2^20 buckets. Each bucket has a weight; the score is their sum over the root of their
number, plus a bias. Such a model is one file of 4 MB and learns in seconds on a CPU. What it is
worth depends on the sources it has seen; so its figures are of sources it has not.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from nanomed.build.files import whole
from nanomed.build.text import U64, Ragged, distinct, mix, ngrams, tokens
from nanomed.run.progress import progress

BUCKET_BITS = 20
BEGINNINGS = (4, 6)  # letters
LONGEST = 4000  # characters of a document that are looked at
EPOCHS, BATCH, RATE = 4, 64, 0.3  # Adagrad


class Linear(NamedTuple):
    weights: np.ndarray  # [2^20] float32
    bias: float

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[texts] float64"""
        return score(self, features(texts))

    def save(self, path: Path) -> None:
        tensors = {"weights": self.weights, "bias": np.array([self.bias], np.float32)}
        with whole(path) as file:
            file.write(save(tensors))


def read(path: Path) -> Linear:
    tensors = load(path.read_bytes())
    return Linear(tensors["weights"], float(tensors["bias"][0]))


def learn(kind: str, texts: Sequence[str], targets: np.ndarray) -> Linear:
    return fit(features(texts), targets, kind)


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


def score(model: Linear, found: Ragged) -> np.ndarray:
    """[texts] float64; a text without tokens has the bias."""
    sums = np.concatenate(([0.0], np.cumsum(model.weights[found.values], dtype=np.float64)))
    return np.diff(sums[found.borders]) / np.sqrt(np.maximum(found.lengths, 1)) + model.bias


def fit(found: Ragged, targets: np.ndarray, kind: str, epochs: int = EPOCHS) -> Linear:
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
    rng, n = np.random.default_rng(0), -(-len(y) // BATCH)
    with progress(epochs * n, "batch", f"learning {kind}", line=1) as bar:  # below the task's own
        for batch in chain.from_iterable(
            np.array_split(rng.permutation(len(y)), n) for _ in range(epochs)
        ):
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
            bar.update()
    torch.set_num_threads(threads)
    return Linear(bag.weight.detach()[:, 0].numpy(), bias.item())
