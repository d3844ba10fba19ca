"""What a step trains on: the split, the order, the packing plan and this rank's share.

Everything is a pure function of (seed, step, rank, world size), so resuming is calling step() with
another number. The order of examples depends on (seed, epoch) alone: on another number of
processes a step has the same examples, in other rows. Nothing here grows with the data.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from nanomed.batches.mixture import Mixture
from nanomed.batches.packing import Row, filler, pack, row_from
from nanomed.batches.prompts import share_prompts
from nanomed.batches.shuffle import shuffled
from nanomed.config import DPO, InputError, Run
from nanomed.store import Documents
from nanomed.store.cache import limit_of
from nanomed.text.segment import Segment

Indices = np.ndarray | range  # of examples; a range takes no memory


class DataSet(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Sequence[Segment]: ...
    def lengths_of(self, examples: np.ndarray) -> np.ndarray: ...  # tokens of each
    def divisors_of(self, examples: np.ndarray) -> np.ndarray:
        """What each adds to its step's divisor: its labels; 1 for a DPO pair."""


def split(
    data: DataSet, fraction: float, n_train_files: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (to train on, held out) of a data set that has for each example its file and record
    (`source`[n,2]) and the hash of its group (`keys`[n] uint64). With n_train_files, the files
    after them are held out whole. Else a group's key, not chance, decides: the same question is
    never on both sides, whatever the files' order and the seed. Raises InputError for a side that
    is empty, or if nothing on the first is learned."""
    if by_file := n_train_files is not None:
        held_out = data.source[:, 0] >= n_train_files
    else:
        held_out = data.keys < limit_of(fraction)
    if held_out.all() or ((by_file or fraction > 0) and not held_out.any()):
        asked = "--val_data" if by_file else f"--val_fraction {fraction}"
        raise InputError(
            f"{asked} of {len(data)} examples leaves {held_out.sum()} held out and "
            f"{(~held_out).sum()} to train on{largest_group(data)}; give more "
            "data, another fraction, or a file of its own with --val_data"
        )
    train = np.flatnonzero(~held_out)
    if not data.divisors_of(train).any():
        raise InputError(f"none of the {len(train)} examples to train on has a token to learn")
    return train, np.flatnonzero(held_out)


def split_remark(
    name: str, data: DataSet | Documents, n_held_out: int, fraction: float
) -> list[str]:
    """A warning where the share of the data that is held out is more than 1.5 times off."""
    n = len(data)
    if fraction * n / 1.5 <= n_held_out <= fraction * n * 1.5:
        return []
    return [
        f"warning: of {n:,} {name} {fraction * n:,.0f} were to be held out, and {n_held_out:,} "
        f"are{largest_group(data)}"
    ]


def overlap_remark(data: DataSet, train: np.ndarray, held_out: np.ndarray) -> list[str]:
    """A warning where files that are held out whole have `keys` that are trained on, too."""
    if not (n := int(np.isin(data.keys[held_out], data.keys[train]).sum())):
        return []
    return [
        f"warning: {n:,} of {len(held_out):,} examples of --val_data have the questions or the "
        "`group` of examples that are trained on: of new questions their loss, and the best "
        "checkpoint by it, say little"
    ]


def largest_group(data: DataSet | Documents) -> str:
    """Why a share of data, by its `keys` and where(), is not the one that was asked for."""
    _, first, counts = np.unique(data.keys, return_index=True, return_counts=True)
    if counts.max() == 1:
        return ": a hash of each one decides, and so few do not come out evenly"
    file, record = data.where(int(first[counts.argmax()]))
    return (
        ": what has the same questions or the same `group` stays together, and the largest such "
        f"group has {counts.max():,} of them, the first in {file}, record {record}"
    )


class Loader:
    def __init__(
        self,
        c: Run,
        data: DataSet,
        rank: int = 0,
        world_size: int = 1,
        parts: tuple[Indices, Indices] | None = None,
        mixture: Mixture | None = None,
    ):
        """`parts` (to train on, held out) takes the place of split()'s, for which the files of
        c.val_data come last in data."""
        parts = parts or split(data, c.val_fraction, len(c.data) if c.val_data else None)
        self.data, (self.train, self.val), self.mixture = data, parts, mixture
        self.batch_size, self.micro_tokens, self.seed = c.batch_size, c.micro_tokens, c.seed
        self.rank, self.world_size = rank, world_size
        self.shares_prompts = isinstance(c, DPO)
        self.steps_per_epoch = -(-len(self.train) // c.batch_size)  # the last one may be short
        self.n_steps = c.steps or self.steps_per_epoch * c.epochs
        if mixture:
            mixture.check(self.n_steps, c.batch_size)
        self._background = ThreadPoolExecutor(1, "next rows")
        self._prepared: dict[int, Future[list[Row]]] = {}  # by step

    def examples(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, the same on every rank."""
        if self.mixture:
            return self.mixture.draws(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, k = divmod(step, self.steps_per_epoch)
        places = np.arange(k * self.batch_size, min((k + 1) * self.batch_size, len(self.train)))
        places = shuffled(places, len(self.train), (self.seed, epoch))
        train = self.train
        return train.start + places if isinstance(train, range) else train[places]

    def step(self, step: int) -> list[Row]:
        """This rank's rows of a step; every rank has the same number of them. Those of the next
        step are then prepared in the background, so that the device need not wait for them."""
        prepared = self._prepared.pop(step, None)
        rows = prepared.result() if prepared else list(self.rows(self.examples(step)))
        self._prepared.clear()
        if step + 1 < self.n_steps:
            following = self.rows(self.examples(step + 1))
            self._prepared[step + 1] = self._background.submit(list, following)
        return rows

    def divisor(self, step: int) -> int:
        """What the loss of the whole step, summed over all ranks, is divided by."""
        return self._divisor(self.examples(step))

    def val_divisor(self) -> int:
        return self._divisor(self.val)

    def _divisor(self, examples: Indices) -> int:
        """At least 1: the last slice of an epoch can have a single token, and so no label."""
        return max(1, int(self.data.divisors_of(np.asarray(examples)).sum()))

    def validation(self) -> Iterator[Row]:
        """This rank's rows of the held-out examples, each of which is in one row of one rank."""
        return self.rows(self.val)

    def rows(self, examples: Indices) -> Iterator[Row]:
        """This rank's rows of some examples; every rank has the same number of them."""
        examples = np.asarray(examples)
        lengths = self.data.lengths_of(examples).tolist()
        rows = pack(lengths, self.micro_tokens, self.world_size)
        for members in rows[self.rank :: self.world_size]:
            parts = [(part, i) for i in examples[members] for part in self.data[i]]
            segments = [(s.ids, s.trained, s.last_label, i) for s, i in parts]
            row = row_from(*zip(*segments, strict=True)) if segments else filler()
            yield share_prompts(row) if self.shares_prompts else row
