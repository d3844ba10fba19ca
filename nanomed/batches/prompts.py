"""The prompt of a preference pair, computed once for both of its answers.

A pair as two segments (S system, U user, C chosen, R rejected, E end of turn), and the row that has
it. What is said of places is said of the two segments, as if each had all of its tokens:

    places      S1 U1 C1 C2 E  S1 U1 R1 E        what attention and the loss see
    labels      -- C1 C2 E  -- -- R1 E  --
    cu_seqlens  0              5           9
    tokens      S1 U1 C1 C2 E        R1 E        what the rest of the model computes
    positions   0  1  2  3  4        2  3
    token_at    0  1  2  3  4  0  1  5  6        for each place its token
    place_of    0  1  2  3  4        7  8        for each token its first place

A token sees only what is before it, so the model says the same of it in both segments, and its
gradient is the sum of what the two send back: nothing but the order of sums changes.
"""

from dataclasses import replace

import numpy as np
import torch

from nanomed.batches.packing import Row


def share_prompts(row: Row) -> Row:
    """The same row, in which the tokens that segments 2i and 2i + 1 both begin with stand once."""
    tokens, borders = row.tokens.numpy(), row.cu_seqlens.tolist()
    first = np.arange(len(tokens))  # of each place, the first place of its token
    for a, b, end in zip(borders[:-1:2], borders[1::2], borders[2::2], strict=True):
        n = min(b - a, end - b)
        different = np.flatnonzero(tokens[a : a + n] != tokens[b : b + n])
        n = different[0] if len(different) else n
        first[b : b + n] = first[a : a + n]
    place_of, token_at = np.unique(first, return_inverse=True)
    return replace(
        row,
        tokens=torch.from_numpy(tokens[place_of]),
        positions=row.positions[place_of],
        token_at=torch.from_numpy(token_at),
        place_of=torch.from_numpy(place_of),
    )
