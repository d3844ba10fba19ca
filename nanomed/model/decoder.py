"""The decoder, in one file: Llama-shaped, with grouped-query attention and q/k/v bias.

Shapes: T tokens of a packed row, L the places of its segments (T but in DPO), D model width,
F feed-forward width, H query heads, K key/value heads, E head size, V vocabulary. There is no batch
dimension: a row is a flat sequence of independent segments (nanomed/batches/packing.py draws one).

Module names are the Hugging Face names without the `model.` prefix, so weights load as they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
from nanomed.batches.packing import Row
from nanomed.config import ModelConfig
from nanomed.distributed import fill
from nanomed.model.cache import Cache


class Scores(NamedTuple):
    """What the model says of each label; 0 and False where the label is -100."""

    nll: Tensor  # [L] float32, the label's negative log-likelihood
    lse: Tensor  # [L] float32, log(sum(exp(logits))); it has a gradient, as nll has
    right: Tensor  # [L] bool, whether no logit is larger than the label's


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rmsnorm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        self.theta, self.scaling = config.rope_theta, config.rope_scaling
        self.q_proj = nn.Linear(config.d_model, config.q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, config.kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, config.kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.q_size, config.d_model, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None

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
            q, k, v = row.by_place(q), row.by_place(k), row.by_place(v)  # [L,...]; L is mostly T
            out = row.by_token(kernels.attention(q, k, v, row.cu_seqlens, row.max_seqlen))
        return self.o_proj(out.flatten(1))  # out[T,H,E]


class SwiGLU(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return kernels.swiglu(gate, up)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, row: Row, cache: Cache | None = None) -> Tensor:  # x[T,D]
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), row, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Head(nn.Module):
    """lm_head: the logits' matrix and the loss in one module, so that FSDP gathers the matrix
    around both and a [T, V] tensor need not exist."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def forward(self, hidden: Tensor, row: Row, logits: bool) -> Scores | Tensor:
        if logits:
            return hidden @ self.weight.T  # [T,V]
        return Scores(*kernels.linear_nll(hidden, self.weight, row.labels, row.scored))


class Aquila(nn.Module):
    """The whole decoder. `dropout` is the share of each residual branch set to 0 in training.
    Built under `torch.device("meta")` it allocates nothing; else its weights are initialised."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.config = config
        weight = torch.empty(config.vocab_size, config.d_model)  # nn.Embedding itself would draw
        # numbers, for which "meta" imports torch._dynamo: a third of the time of a start.
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.n_layers))
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
        """The scores of the row's labels; with logits=True the logits [L, V] instead, for
        inspection and plain generation.

        `cache` has for each layer what its attention sees besides the row: model/cache.py. `at[n]`
        are the tokens of the row that are asked for, by default one for each place; row.labels then
        has one label for each, and a token may stand there more than once."""
        x = self.embed_tokens(row.tokens)  # [T,D]
        for i, layer in enumerate(self.layers):
            x = layer(x, row, cache[i] if cache else None)
        x = row.by_place(x) if at is None else x[at]  # [L or n, D]
        return self.lm_head(self.norm(x), row, logits)


def init_weights(model: Aquila, seed: int = 0) -> None:
    """Normal with standard deviation 0.02, less for what adds to the residual stream (Radford et
    al. 2019); norms 1, biases 0. Each tensor has a generator of its own, so the values do not
    depend on how the model is sharded. A GPU draws other numbers than a CPU from the same seed."""
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
