"""A decoder with a linear head: the classifier of documents that has read before it learns.

Of the decoder's layers it takes the first three in five: the last ones serve the next token alone,
and the states before them tell more about a document. In the place of the matrix that gives logits
comes one number for each token's state; a document's score is the mean of them over its first
tokens. The head begins as ridge regression finds it from the decoder as it is, so that the first
steps spoil nothing (Kumar et al. 2022). Then head and decoder are trained together by fit(), as in
every other stage. From pre-training the decoder knows many words for the same thing; a list of
n-grams does not.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row, row_from
from nanomed.build.files import whole
from nanomed.config import SFT, ModelConfig
from nanomed.distributed import full, pick_device, shard, start
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.model.packed import pack_linears
from nanomed.run.log import RunFolder
from nanomed.run.progress import progress
from nanomed.stages import stage
from nanomed.text.segment import Segment
from nanomed.text.template import Encoder
from nanomed.training.step import Loss
from nanomed.training.trainer import fit

DEPTH = 0.6  # the share of the layers that is taken
LONGEST = 512  # tokens of a document that are read, the last of them its end
# A model of another width learns at another rate, in inverse proportion (Yang et al. 2022).
RATE, WIDTH = 1e-5, 4096
N_FIRST = 1000  # documents from which the head begins
TRAINING = {"epochs": 3, "batch_size": 16, "seq_len": LONGEST, "warmup_ratio": 0.1}
TRAINING |= {"val_fraction": 0.0, "keep_last": 1, "log_every": 20}
FROM_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


class LinearHead(nn.Module):
    """In lm_head's place. hidden[T,D] -> [n] float32, the mean over each segment's tokens"""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, row: Row, logits: bool) -> Tensor:
        return mean_of_segments(hidden @ self.weight[0] + self.bias, row)


class MeanState(nn.Module):
    """In lm_head's place. hidden[T,D] -> [n,D] float32, the mean over each segment's tokens"""

    def forward(self, hidden: Tensor, row: Row, logits: bool) -> Tensor:
        return mean_of_segments(hidden, row)


def mean_of_segments(x: Tensor, row: Row) -> Tensor:
    """x[T,...] -> [n,...] float32"""
    lengths = row.cu_seqlens.diff().long()
    return torch.segment_reduce(x.float(), "mean", lengths=lengths, unsafe=True)


class Texts:
    """Documents as fit() reads them, in memory."""

    def __init__(self, encoder: Encoder, texts: Sequence[str]):
        self.ids = [ids_of(encoder, text) for text in texts]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> list[Segment]:
        return [Segment(self.ids[i], np.zeros(len(self.ids[i]), bool))]

    def lengths_of(self, examples: np.ndarray) -> np.ndarray:
        return np.array([len(self.ids[i]) for i in examples])

    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        return np.ones(len(examples), np.int64)

    def where(self, i: int) -> tuple[str, int]:
        return "labels", i + 1


def ids_of(encoder: Encoder, text: str) -> np.ndarray:
    """[at most LONGEST] int64. A token is at most some ten characters: no more need be tokenised
    than can be read."""
    ids = encoder.tokenizer.encode(text[: 10 * LONGEST])[: LONGEST - 1]
    return np.array([*ids, encoder.document_end], np.int64)


@dataclass(frozen=True, repr=False)
class Reader:
    model: Aquila  # to be run
    encoder: Encoder
    tensors: dict[str, Tensor]  # its weights

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[texts] float64. Each is a row of its own: packed with others it would have other bits,
        and a document's score must not depend on who stands beside it in a shard."""
        device = next(self.model.parameters()).device
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = (row_from([ids_of(self.encoder, text)]).to(device) for text in texts)
        found = [self.model(row).double().cpu().numpy() for row in rows]
        torch.set_num_threads(threads)
        return np.concatenate([np.zeros(0), *found])

    def save(self, path: Path) -> None:
        with whole(path) as file:
            file.write(save({name: value.cpu() for name, value in self.tensors.items()}))


def read(path: Path, init: str) -> Reader:
    """What save() wrote of a model that began as the one in the folder `init`."""
    config, encoder = pretrained.describe(init)
    tensors = load_file(path, device=str(pick_device("auto")))
    # In memory of their own: what a matmul gives may depend on where in memory its numbers begin.
    return _reader(config, {name: value.clone() for name, value in tensors.items()}, encoder)


def _reader(config: ModelConfig, tensors: dict[str, Tensor], encoder: Encoder) -> Reader:
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    config = dataclasses.replace(config, n_layers=last + 1)
    with torch.device("meta"):
        model = Aquila(config)
        model.lm_head = LinearHead(config.d_model)
    model.load_state_dict(tensors, assign=True)
    pack_linears(model.eval())
    return Reader(model, encoder, tensors)


# ---------------------------------------------------------------- training


def learn(kind: str, texts: Sequence[str], targets: np.ndarray, init: str, work: Path) -> Reader:
    """Trains the decoder in the folder `init`; its run is in `work` until it has ended, so that a
    killed one goes on. targets[texts] as linear.fit's."""
    config, encoder = pretrained.describe(init)
    data, y = Texts(encoder, texts), torch.tensor(np.asarray(targets), dtype=torch.float32)
    config = dataclasses.replace(config, n_layers=max(1, round(DEPTH * config.n_layers)))
    given = TRAINING | {"lr": RATE * WIDTH / config.d_model, "init": init}
    content = np.concatenate([*data.ids, y.numpy().view(np.int32)]).tobytes()
    content += repr((given, config, N_FIRST)).encode()  # a run that began otherwise is another
    out = work / f"run-{hashlib.sha256(content).hexdigest()[:16]}"
    c = SFT(data=[f"labels of {kind}"], out=str(out), resume="auto", **given)
    with by_itself(), start(pick_device(c.device)) as world:
        if world.device.type == "cpu":
            torch.set_num_threads(1)  # the same labels give the same bits
        model = pretrained.load(init, world.device, torch.float32)
        del model.layers[config.n_layers :]
        model.config = config
        model.lm_head = LinearHead(config.d_model).to(world.device)
        # 0 and 1 of "domain" as logits, -4 and 4: probabilities of 2 and 98%.
        begin(model, data, y if kind == "quality" else 8 * y - 4)
        dtype = stage.compute_dtype(c, world.device)
        shard(model, world, dtype)
        loader = Loader(c, data, parts=(range(len(data)), range(0)))
        run = RunFolder(c, world, {"labels": out.name})
        fit(c, model, loader, loss_of(kind, y.to(world.device)), run)
        tensors = {name: full(value).to(dtype) for name, value in model.state_dict().items()}
        run.close()
    shutil.rmtree(out)
    return _reader(config, tensors, encoder)


@torch.no_grad()
def begin(model: Aquila, data: Texts, y: Tensor) -> None:
    """Sets the head to the ridge regression of y[documents] on the mean states of N_FIRST of them.
    Its strength is the one with which each document is guessed best from the others; the singular
    values tell without fitting once for each (PRESS, Allen 1974)."""
    head, some = model.lm_head, np.linspace(0, len(data) - 1, min(N_FIRST, len(data))).astype(int)
    model.lm_head = MeanState()
    states = []
    with progress(len(some), "text", "reading before training") as bar:
        for i in some:
            states.append(model(row_from([data.ids[i]]).to(head.weight.device)))
            bar.update()
    states = torch.cat(states).double().cpu()
    model.lm_head, y, mean = head, y[some].double(), states.mean(0)
    u, s, v = torch.linalg.svd(states - mean, full_matrices=False)
    found = []
    largest = s[0].square().clamp(min=1e-30)  # equal documents differ in nothing
    for strength in largest * 10.0 ** -torch.arange(1.0, 9.0):
        along = s / (s.square() + strength) * (u.T @ y)
        wrong = y - y.mean() - u @ (s * along)
        leverage = u.square() @ (s.square() / (s.square() + strength)) + 1 / len(some)
        found.append((float((wrong / (1 - leverage)).square().mean()), v.T @ along))
    _, weight = min(found, key=lambda one: one[0])
    head.weight[0], head.bias[0] = weight, y.mean() - mean @ weight


def loss_of(kind: str, targets: Tensor) -> Loss:
    """For fit(). Of "domain" both classes weigh the same, as in the linear model."""
    share = float(targets.mean()) if kind == "domain" else 0.5

    def loss(found: Tensor, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        y = targets[row.examples]
        if kind == "domain":
            weight = torch.where(y > 0.5, 0.5 / share, 0.5 / (1 - share))
            return F.binary_cross_entropy_with_logits(found, y, weight, reduction="sum"), {}
        return F.mse_loss(found, y, reduction="sum"), {}

    return loss


@contextmanager
def by_itself() -> Iterator[None]:
    """One process trains, whatever launcher has started it with others: they wait for its files."""
    theirs = {name: os.environ.pop(name) for name in FROM_LAUNCHERS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(theirs)
