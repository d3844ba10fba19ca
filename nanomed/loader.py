"""What a step trains on: the split, the order, the packing plan and this rank's share.

Everything is a pure function of (seed, step, rank, world size), so resuming is calling step() with
another number. The order of examples depends on (seed, epoch) alone: on another number of
processes a step has the same examples, in other rows.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from nanomed.config import InputError, Run
from nanomed.packing import Row, filler, pack, row_from


class DataSet(Protocol):
    lengths: np.ndarray  # [n] tokens of each example
    divisors: np.ndarray  # [n] what each adds to its step's divisor: labels; 1 for a DPO pair
    keys: np.ndarray  # [n] uint64, decides the split
    source: np.ndarray  # [n, 2] the file's number and the record's in it

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]: ...


def split(
    data: DataSet, fraction: float, n_train_files: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (to train on, held out). Files after the first n_train_files are held out whole; if
    there are none, a group's key, not chance, decides: the same question is never on both sides,
    whatever the files' order and the seed."""
    if n_train_files is not None and (of_val := data.source[:, 0] >= n_train_files).any():
        return np.flatnonzero(~of_val), np.flatnonzero(of_val)
    held_out = is_held_out(data.keys, fraction)
    if held_out.all() or (fraction > 0 and not held_out.any()):
        raise InputError(
            f"--val_fraction {fraction} of {len(data)} examples leaves "
            f"{held_out.sum()} held out and {(~held_out).sum()} to train on; give more data, "
            "another fraction, or a file of its own with --val_data"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def is_held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """keys are uniform in [0, 2**64); exact where a float of 64 bits is not."""
    return keys < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


class Loader:
    @classmethod
    def of(cls, c: Run, data: DataSet, rank: int = 0, world_size: int = 1) -> "Loader":
        """As the settings say; the files of c.val_data come last in data."""
        return cls(
            data,
            *split(data, c.val_fraction, len(c.data)),
            batch_size=c.batch_size,
            micro_tokens=c.micro_tokens,
            epochs=c.epochs,
            max_steps=c.steps,
            seed=c.seed,
            rank=rank,
            world_size=world_size,
        )

    def __init__(
        self,
        data: DataSet,
        train: np.ndarray,
        val: np.ndarray,
        *,
        batch_size: int,
        micro_tokens: int,
        epochs: int,
        max_steps: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data, self.train, self.val = data, train, val
        self.batch_size, self.micro_tokens, self.seed = batch_size, micro_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = -(-len(train) // batch_size)  # the last one may be short
        self.n_steps = max_steps or self.steps_per_epoch * epochs

    def examples(self, step: int) -> np.ndarray:
        """The indices of the examples of a step, the same on every rank."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[k * self.batch_size : (k + 1) * self.batch_size]

    @lru_cache(maxsize=1)  # noqa: B019 - one loader lives as long as its process
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.train)

    def step(self, step: int) -> list[Row]:
        """This rank's rows of a step; every rank has the same number of them."""
        return list(self.rows(self.examples(step)))

    def divisor(self, step: int) -> int:
        """What the loss of the whole step, summed over all ranks, is divided by."""
        return int(self.data.divisors[self.examples(step)].sum())

    def val_divisor(self) -> int:
        return int(self.data.divisors[self.val].sum())

    def validation(self) -> Iterator[Row]:
        """This rank's rows of the held-out examples, each of which is in one row of one rank."""
        return self.rows(self.val)

    def rows(self, examples: np.ndarray) -> Iterator[Row]:
        """This rank's rows of some examples; every rank has the same number of them."""
        rows = pack(self.data.lengths[examples].tolist(), self.micro_tokens, self.world_size)
        for members in rows[self.rank :: self.world_size]:
            segments = [(*part, i) for i in examples[members] for part in self.data[i]]
            yield row_from(*zip(*segments, strict=True)) if segments else filler()
