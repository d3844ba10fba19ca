"""The key/value cache of generation: what attention needs to see of the tokens before."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanomed.batches.packing import Row


class LayerCache:
    """One layer's keys and values of B sequences of at most S tokens, for generation. The memory
    is taken when the first ones come, in their dtype and on their device."""

    def __init__(self, n_sequences: int, max_tokens: int):
        self.n_sequences, self.max_tokens = n_sequences, max_tokens
        self.longest = 0  # no sequence has more tokens; counted here, so that no GPU is asked
        self.k = self.v = None  # [B,K,S,E]

    def store(self, k: Tensor, v: Tensor, row: Row) -> None:  # k, v[T,K,E]
        if self.k is None:
            shape = (self.n_sequences, k.shape[1], self.max_tokens, k.shape[2])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        self.longest = min(self.max_tokens, max(row.max_seqlen, self.longest + 1))
        lengths = row.cu_seqlens.diff().long()
        sequence = torch.arange(len(lengths), device=k.device)
        sequence = sequence.repeat_interleave(lengths, output_size=len(k))
        self.k[sequence, :, row.positions] = k
        self.v[sequence, :, row.positions] = v

    def attend(self, q: Tensor, positions: Tensor) -> Tensor:  # q[B,H,E], positions[B] -> [B,H,E]
        """Each sequence's newest token looks at its own past. The query heads that share a
        key/value head stand where SDPA expects successive queries, so nothing is repeated."""
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


def new_cache(model: nn.Module, n_sequences: int, max_tokens: int) -> list[LayerCache]:
    """Room for the keys and values of n_sequences of at most max_tokens, in every layer."""
    return [LayerCache(n_sequences, max_tokens) for _ in model.layers]
