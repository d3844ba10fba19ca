"""Packed rows: how segments of different lengths become one flat tensor without padding.

Two short chats in one row (S system, U user, A assistant, E end of turn; -- is -100):

    tokens      S1 U1 A1 A1 E  S2 U2 A2 E
    trained     .  .  x  x  x  .  .  x  x        which tokens are learned
    labels      -- A1 A1 E  -- -- A2 E  --       the same, one position earlier, as targets
    positions   0  1  2  3  4  0  1  2  3        restart with each segment
    cu_seqlens  0              5           9     the borders
    examples    0, 1                             each segment's index in its data set

A segment sees only itself: attention reads cu_seqlens, and the last label of a segment is -100
because its next token belongs to somebody else. Only pre-training cuts a document that is longer
than what is left of a slice. The part before the cut then keeps its last label, the token that the
document goes on with in another row. One document, cut before X, behind the end of another:

    tokens      D1 E  D2 D2                      the other row: X  D2 E
    labels      E  -- D2 X                                      D2 E  --
    positions   0  1  0  1                                      0  1  2
    cu_seqlens  0     2     4                                   0        3
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from nanomed.text.segment import IGNORE, Segment

# A rank with nothing left to do runs this: two segments (DPO reads them in pairs) of two tokens
# (a single token would recompile a compiled layer), no label, hence zero gradients.
FILLER = [Segment(np.zeros(2, np.int64), np.zeros(2, bool))] * 2


@dataclass
class Row:
    """What the model eats, for every stage. T tokens in n segments of L places together; L is T,
    unless a token stands in two segments (nanomed/batches/prompts.py)."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [L] int64, the next token or -100
    positions: Tensor  # [T] int64, restart at 0 with each segment
    cu_seqlens: Tensor  # [n+1] int32, the segments' borders among the places
    max_seqlen: int  # the longest segment
    examples: Tensor  # [n] int64, each segment's index in its data set; -1 in a filler
    scored: Tensor | None = None  # int64, the places in `labels` that are not -100, if known
    token_at: Tensor | None = None  # [L] int64, the token at each place; None: 0, 1, 2, ...
    place_of: Tensor | None = None  # [T] int64, each token's first place; None: 0, 1, 2, ...

    def by_place(self, x: Tensor) -> Tensor:  # x[T, ...], of each token -> [L, ...]
        return x if self.token_at is None else x.index_select(0, self.token_at)

    def by_token(self, x: Tensor) -> Tensor:  # x[L, ...], of each place -> [T, ...]
        return x if self.place_of is None else x.index_select(0, self.place_of)

    def to(self, device: torch.device) -> "Row":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                if device.type == "cuda":  # else the copy would wait for all that is queued there
                    value = value.pin_memory()
                moved[name] = value.to(device, non_blocking=True)
        return Row(**moved)


def row_from(
    segments: Sequence[Sequence[int]],
    trained: Sequence[Sequence[bool]] | None = None,
    last_labels: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
) -> Row:
    """Packs segments of token ids into one row, in the order given: row_from(*zip(*segments)).

    `trained` has one flag per token (None: all but each segment's first, which has no
    predecessor), `last_labels` each segment's last label (None: -100), `examples` one index per
    segment (None: 0, 1, 2, ...).
    Raises ValueError for an empty segment or lengths that do not match.
    """
    lengths = np.array([len(s) for s in segments])
    if len(segments) == 0 or lengths.min() == 0:
        raise ValueError("a row needs at least one segment, and a segment at least one token")
    if trained is not None and [len(t) for t in trained] != lengths.tolist():
        raise ValueError("every segment needs as many trained flags as tokens")
    borders = np.concatenate(([0], np.cumsum(lengths)))
    tokens = np.concatenate([np.asarray(s, np.int64) for s in segments])
    if trained is None:
        flags = np.ones(len(tokens), bool)
    else:
        flags = np.concatenate([np.asarray(t, bool) for t in trained])
    # labels[t] = tokens[t+1] where that one is trained and in the same segment.
    flags[borders[:-1]] = False
    labels = np.full(len(tokens), IGNORE, np.int64)
    labels[:-1] = np.where(flags[1:], tokens[1:], IGNORE)
    if last_labels is not None:
        labels[borders[1:] - 1] = last_labels
    positions = np.arange(len(tokens)) - np.repeat(borders[:-1], lengths)
    examples = range(len(segments)) if examples is None else examples
    return Row(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        examples=torch.tensor(list(examples), dtype=torch.int64),
        scored=torch.from_numpy(np.flatnonzero(labels != IGNORE)),
    )


def filler() -> Row:
    return row_from(*zip(*FILLER, strict=True), examples=[-1, -1])


def pack(lengths: Sequence[int], capacity: int, world_size: int) -> list[list[int]]:
    """Distributes examples over rows of at most `capacity` tokens: [row] -> the examples' indices.

    The number of rows is a multiple of world_size (row r goes to rank r % world_size) and rows
    are about equally full, so that no rank waits for another; a row may be empty. Longest first,
    each into the emptiest row: at most 4/3 of the best possible longest row (Graham 1969).
    Raises ValueError if one example is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(f"an example of {longest} tokens does not fit a row of {capacity}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n_rows = max(1, -(-sum(lengths) // (capacity * world_size))) * world_size
    while (rows := _fill(order, lengths, capacity, n_rows)) is None:
        n_rows += world_size * max(1, n_rows // (100 * world_size))  # 1%: few tries
    return rows


def _fill(
    order: Sequence[int], lengths: Sequence[int], capacity: int, n_rows: int
) -> list[list[int]] | None:
    """None if the emptiest row is once too full for the next example."""
    rows: list[list[int]] = [[] for _ in range(n_rows)]
    heap = [(0, row) for row in range(n_rows)]  # (tokens in the row, row)
    for i in order:
        used, row = heap[0]
        if used + lengths[i] > capacity:
            return None
        heapq.heapreplace(heap, (used + lengths[i], row))
        rows[row].append(i)
    return rows
