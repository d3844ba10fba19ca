"""What each op must do at least, from its shapes.

Bytes through memory, operations, and the seconds that follow from a GPU's data sheet.
`python -m bench.counts` prints the tables of docs/kernels.md.

T tokens, D model width, F feed-forward width, H query heads, K key/value heads, E head size,
V vocabulary, e bytes of an element. Bytes: each input is read once, each output written once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import table
from kernels import reference
from nanomed.config import MODELS, ModelConfig

TOKENS = 8192  # of the row that the tables count; one document, the most attention


@dataclass(frozen=True)
class Count:
    bytes: float
    flops: float = 0  # of matmuls; the others are too few to matter

    def __add__(self, other: "Count") -> "Count":
        return Count(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class GPU:
    """Data sheet: bytes and dense bf16 operations per second."""

    bandwidth: float
    flops: float

    def floor(self, count: Count) -> float:
        """Seconds: no version is faster than its bytes or its operations allow."""
        return max(count.bytes / self.bandwidth, count.flops / self.flops)


H200 = GPU(4.8e12, 989e12)
A100 = GPU(1.555e12, 312e12)


# ------- (forward, backward) of each op over a row of documents of these lengths


def rmsnorm(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """Forward reads x, writes y and 1/rms in float32; backward reads x, dy, 1/rms, writes dx. The
    weight is read by both and its gradient written once."""
    t, d = sum(lengths), c.d_model
    return Count(t * (2 * d * e + 4) + d * e), Count(t * (3 * d * e + 4) + 2 * d * e)


def rope(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """Both read and write all query and key heads, and read the positions (8 bytes each)."""
    heads = c.n_heads + c.n_kv_heads
    count = Count(sum(lengths) * (2 * heads * c.head_size * e + 8))
    return count, count


def swiglu(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """Forward reads gate and up, writes their product; backward reads gate, up and its gradient,
    writes two."""
    size = sum(lengths) * c.d_ff * e
    return Count(3 * size), Count(5 * size)


def attention(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """A token and each of its predecessors in the document are a pair. Forward takes two products
    of 2 E operations per pair and head (scores, output), backward five (scores again, dP, dQ, dK,
    dV). Forward reads q, k, v, writes the output and float32 log-sum-exps; backward reads these and
    the output's gradient, writes dq, dk, dv."""
    t, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    product = 2 * c.head_size * c.n_heads * pairs
    q, kv, lse = (size * t for size in (c.q_size * e, c.kv_size * e, c.n_heads * 4))
    return Count(2 * q + 2 * kv + lse, 2 * product), Count(4 * q + 4 * kv + lse, 5 * product)


def linear_nll(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """Every token has a label. Forward is one product (logits), backward two (dhidden,
    dweight); logits that are computed again in backward are not counted, and neither are logits
    that visit memory. A token's label, nll, lse and whether it is right: 17 bytes; backward its
    label, lse and the gradients of nll and lse: 20."""
    t, weight = sum(lengths), c.vocab_size * c.d_model
    moved, product = (t * c.d_model + weight) * e, 2 * weight * t
    return Count(moved + 17 * t, product), Count(2 * moved + 20 * t, 2 * product)


def layer(c: ModelConfig, lengths: Sequence[int], e: int = 2) -> tuple[Count, Count]:
    """The operations of a layer of the model: two for each weight of a matmul and token, twice that
    in backward, and attention's."""
    weights = c.d_model * (2 * c.q_size + 2 * c.kv_size + 3 * c.d_ff)
    forward, backward = attention(c, lengths)
    matmuls = 2 * weights * sum(lengths)
    return Count(0, matmuls + forward.flops), Count(0, 2 * matmuls + backward.flops)


OPS = {f.__name__: f for f in (rmsnorm, rope, swiglu, attention, linear_nll)}


# ---------------------------------------------------------------- what the plain version moves


class Traffic(TorchDispatchMode):
    """Sums the bytes of every tensor that an operation reads or writes. A view moves nothing, and
    what is broadcast is read once."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        aten = torch.ops.aten
        moves_nothing = function in (aten.empty_like.default, aten._unsafe_view.default)
        if not function.is_view and not moves_nothing:
            moved = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(_nbytes(x) for x in moved if isinstance(x, Tensor))
        return out


def _nbytes(x: Tensor) -> int:
    sizes = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * torch.Size(n for n, step in sizes if step).numel()


def naive(op: str, c: ModelConfig, t: int) -> tuple[int, int]:
    """Bytes that PyTorch moves, forward and backward, if each line of the plain version runs as
    operations of its own: kernels/reference.py, but every score and every logit at once. Counted on
    the meta device: nothing is computed."""
    with torch.device("meta"):
        x, wide, label = torch.empty(t, c.d_model), torch.empty(t, c.d_ff), torch.zeros(t).long()
        q, k = torch.empty(t, c.n_heads, c.head_size), torch.empty(t, c.n_kv_heads, c.head_size)
        weight, head = torch.empty(c.d_model), torch.empty(c.vocab_size, c.d_model)
    function, inputs = {
        "rmsnorm": (lambda x, w: reference.rmsnorm(x, w, 1e-5), [x, weight]),
        "rope": (lambda q, k: reference.rope(q, k, label, 1e6), [q, k]),
        "swiglu": (reference.swiglu, [wide, wide]),
        "attention": (every_score, [q, k, k]),
        "linear_nll": (lambda h, w: every_logit(h, w, label), [x, head]),
    }[op]
    inputs = [x.detach().bfloat16().requires_grad_() for x in inputs]
    with Traffic() as forward:
        out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    with Traffic() as backward:
        torch.autograd.grad(out, inputs, [torch.empty_like(x) for x in out])
    return forward.bytes, backward.bytes


def every_score(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by its formula: scores [H,T,T], masked (None: causal), softmax in float32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [H,T,E]
    if mask is None:
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    high = torch.promote_types(torch.float32, q.dtype)
    return (scores.softmax(-1, dtype=high).to(q.dtype) @ v).transpose(0, 1)


def every_logit(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The head as it is written most often: all logits, then cross-entropy in float32."""
    logits = hidden @ weight.T
    high = torch.promote_types(torch.float32, logits.dtype)
    return F.cross_entropy(logits.to(high), labels, reduction="none", ignore_index=-100)


# ---------------------------------------------------------------- the tables


def tables(c: ModelConfig, t: int) -> tuple[list[dict], list[dict]]:
    """What each op must move and compute, and what its plain version moves."""
    least, plain = [], []
    for op, count_of in OPS.items():
        found = zip(("forward", "backward"), count_of(c, [t]), naive(op, c, t), strict=True)
        for name, count, moved in found:
            bound = count.flops / H200.flops > count.bytes / H200.bandwidth
            least.append({
                "op": op, "pass": name,
                "bytes a token": round(count.bytes / t),
                "MFLOP a token": round(count.flops / t / 1e6) or None,
                "H200 µs": round(H200.floor(count) * 1e6),
                "A100-40G µs": round(A100.floor(count) * 1e6),
                "bound by": "operations" if bound else "bytes",
            })  # fmt: skip
            plain.append({
                "op": op, "pass": name,
                "fewest bytes a token": round(count.bytes / t),
                "plain version's": round(moved / t),
                "times": round(moved / count.bytes, 1),
                "H200 µs for them": round(moved / H200.bandwidth * 1e6),
            })  # fmt: skip
    return least, plain


if __name__ == "__main__":
    print(*map(table, tables(MODELS["aquilamed-7b"], TOKENS)), sep="\n\n")
