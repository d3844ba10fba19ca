"""The decoder, in one file: Llama-shaped, with grouped-query attention and q/k/v bias.

Shapes: T tokens of a packed row, D model width, F feed-forward width, H query heads,
K key/value heads, E head size, V vocabulary. There is no batch dimension: a row is a flat
sequence of independent segments (nanomed/batches/packing.py draws one).

Module names are the Hugging Face names without the `model.` prefix, so weights load as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from nanomed.batches.packing import Row
from nanomed.config import ModelConfig
from nanomed.distributed import fill
from nanomed.model.cache import Cache
from nanomed.model.recompute import rebuilt_for


class Scores(NamedTuple):
    """What the model says of each label; 0 and False where the label is -100."""

    nll: Tensor  # [T] float32, the label's negative log-likelihood
    lse: Tensor  # [T] float32, log(sum(exp(logits))); it has a gradient, as nll has
    right: Tensor  # [T] bool, whether no logit is larger than the label's


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_size, self.theta, self.scaling = c.head_size, c.rope_theta, c.rope_scaling
        self.q_proj = nn.Linear(c.d_model, c.q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.q_size, c.d_model, bias=c.o_bias)
        self.q_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None

    def forward(self, x: Tensor, row: Row, cache: Cache | None = None) -> Tensor:  # x[T,D]
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_size))  # [T,H,E], [T,K,E], [T,K,E]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rope(q, k, row.positions, self.theta, self.scaling)
        if cache is not None:
            out = cache.attend(q, k, v, row)
        else:
            out = kernels.attention(q, k, v, row.cu_seqlens, row.max_seqlen)  # [T,H,E]
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig, recompute: str):
        super().__init__()
        self.recompute = recompute
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)  # [T,F]
        if self.recompute == "lean":
            return rebuilt_for(self.down_proj, kernels.swiglu, gate, up)
        return self.down_proj(kernels.swiglu(gate, up))


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, recompute: str):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c, recompute)
        self.input_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.d_model, c.norm_eps)
        self.dropout = c.dropout
        self.recompute = recompute

    def forward(self, x: Tensor, row: Row, cache: Cache | None = None) -> Tensor:
        # Recomputing inside forward, not around the module, keeps parameter names as they are
        # and FSDP's gathering of the layer outside.
        if self.recompute == "full" and torch.is_grad_enabled():
            return checkpoint(self._forward, x, row, use_reentrant=False)
        return self._forward(x, row, cache)

    def _forward(self, x: Tensor, row: Row, cache: Cache | None = None) -> Tensor:
        attention = partial(self.self_attn, row=row, cache=cache)
        x = x + self._branch(self.input_layernorm, attention, x)
        return x + self._branch(self.post_attention_layernorm, self.mlp, x)

    def _branch(self, norm: RMSNorm, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.recompute == "lean":
            out = rebuilt_for(block, partial(kernels.rmsnorm, eps=norm.eps), x, norm.weight)
        else:
            out = block(norm(x))
        return F.dropout(out, self.dropout, self.training)


class Head(nn.Module):
    """lm_head: the logits' matrix and the loss in one module, so that FSDP gathers the matrix
    around both and a [T, V] tensor need not exist."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.vocab_size, c.d_model))

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Scores | Tensor:
        if labels is None:
            return hidden @ self.weight.T  # [T,V]
        return Scores(*kernels.linear_nll(hidden, self.weight, labels))


class Aquila(nn.Module):
    """The whole decoder. `recompute` "lean" keeps what matmuls and attention made and computes
    norms and SwiGLU's product again in backward; "full" keeps only each layer's input and runs the
    layer again. Built under `torch.device("meta")` it allocates nothing; else its weights are
    initialised."""

    def __init__(self, config: ModelConfig, recompute: str = "none"):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, recompute) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = Head(config)
        if not self.norm.weight.is_meta:
            init_weights(self)

    def forward(
        self,
        row: Row,
        logits: bool = False,
        cache: list[Cache] | None = None,
        at: Tensor | None = None,
    ) -> Scores | Tensor:
        """The scores of the row's labels; with logits=True the logits [T, V] instead, for
        inspection and plain generation.

        `cache` has for each layer what its attention sees besides the row: model/cache.py. `at[n]`
        are the places in the row that are asked for, [T] of them by default; row.labels then has
        one label for each, and a place may stand there more than once."""
        x = self.embed_tokens(row.tokens)  # [T,D]
        for i, layer in enumerate(self.layers):
            x = layer(x, row, cache[i] if cache else None)
        if at is not None:
            x = x[at]  # [n,D]
        return self.lm_head(self.norm(x), None if logits else row.labels)


def init_weights(model: Aquila, seed: int = 0) -> None:
    """Normal with standard deviation 0.02, less for what adds to the residual stream (Radford et
    al. 2019); norms 1, biases 0. Each tensor has a generator of its own, so the values do not
    depend on how the model is sharded."""
    std = {"o_proj.weight": 0.02 / (2 * model.config.n_layers) ** 0.5}
    std["down_proj.weight"] = std["o_proj.weight"]
    for number, (name, param) in enumerate(model.named_parameters()):
        whole = torch.empty(param.shape, device=param.device)
        if "norm" in name:
            whole.fill_(1)
        elif name.endswith(".bias"):
            whole.zero_()
        else:
            generator = torch.Generator(param.device).manual_seed(seed * 1_000_003 + number)
            last_two = ".".join(name.split(".")[-2:])
            whole.normal_(std=std.get(last_two, 0.02), generator=generator)
        fill(param, whole)
