"""What attention needs to see of tokens that are not in the row: those before, in generation, and a
beginning that many segments share. An object for each layer, asked by its attention."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from nanomed.batches.packing import Row


class Cache(Protocol):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        """Attention of the row's segments and of what the cache has: q[T,H,E], k[T,K,E], v[T,K,E]
        -> [T,H,E]. The cache keeps of k and v what later rows need."""


class LayerCache:
    """One layer's keys and values of B sequences of at most S tokens, for generation. Segment i of
    a row is sequence i: first whole prompts, then rows of one token of each, at its position. The
    memory is taken when the first ones come, in their dtype and on their device."""

    def __init__(self, n_sequences: int, max_tokens: int):
        self.n_sequences, self.max_tokens = n_sequences, max_tokens
        self.longest = 0  # no sequence has more tokens; counted here, so that no GPU is asked
        self.k = self.v = None  # [B,K,S,E]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        self._store(k, v, row)
        if row.max_seqlen > 1:
            return kernels.attention(q, k, v, row.cu_seqlens, row.max_seqlen)
        return self._attend_to_past(q, row.positions)

    def _store(self, k: Tensor, v: Tensor, row: Row) -> None:
        if self.k is None:
            shape = (self.n_sequences, k.shape[1], self.max_tokens, k.shape[2])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.longest = min(self.max_tokens, max(row.max_seqlen, self.longest + 1))
        lengths = row.cu_seqlens.diff().long()
        sequence = torch.arange(len(lengths), device=k.device)
        sequence = sequence.repeat_interleave(lengths, output_size=len(k))
        self.k[sequence, :, row.positions] = k
        self.v[sequence, :, row.positions] = v

    def _attend_to_past(self, q: Tensor, positions: Tensor) -> Tensor:
        """q[B,H,E], positions[B] -> [B,H,E]. Each sequence's newest token looks at its own past.
        The query heads that share a key/value head stand where SDPA expects successive queries,
        so nothing is repeated."""
        n = self.longest
        q = q.unflatten(1, (self.k.shape[1], -1))  # [B,K,H/K,E]
        seen = torch.arange(n, device=q.device) <= positions[:, None]  # [B,n]
        out = F.scaled_dot_product_attention(
            q, self.k[:, :, :n], self.v[:, :, :n], attn_mask=seen[:, None, None]
        )
        return out.flatten(1, 2)

    def keep(self, sequences: Tensor) -> None:
        """Forgets all but these sequences."""
        self.k, self.v = self.k[sequences], self.v[sequences]


class SharedPrefix:
    """One layer's keys and values of a beginning that many segments share: the first row is that
    beginning, alone, and every segment of every later row follows it, none sees another."""

    def __init__(self):
        self.k = self.v = None  # [P,K,E]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        if self.k is None:
            self.k, self.v = k, v
            return kernels.attention(q, k, v, row.cu_seqlens, row.max_seqlen)
        lengths = row.cu_seqlens.diff().tolist()
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        return torch.cat([self._after(*part) for part in parts])

    def _after(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of one segment: it sees the whole beginning, and of itself the past."""
        k, v = torch.cat([self.k, k]), torch.cat([self.v, v])
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(self.k))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H or K, T, E]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return out[0].transpose(0, 1)
