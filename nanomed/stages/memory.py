"""The memory that training takes on one GPU, part by part, from shapes alone.

Nothing here is fitted. Each function counts tensors that the code keeps, and the tests compare it
with what autograd and torch's own FSDP memory tracker count. D model width, F feed-forward width,
H query heads, K key/value heads, E head size, V vocabulary, L layers, T tokens in a row
(--micro_tokens), N parameters. A row of pairs has fewer tokens if answers share a prompt; what is
counted is the most, as if none did.

The peak is in backward. Weights, gradients and moments are there all the time; activations of all
layers are there when backward begins. To them comes what is needed for a moment: the head's
backward, or a layer's, whichever takes more.
"""

import torch

from kernels.chunk import most_tokens
from kernels.linear_nll_chunked import CHUNK_CUDA
from nanomed.config import DPO, OPTIMIZER_BYTES, SAVED_BYTES, WEIGHT_BYTES, ModelConfig, Run
from nanomed.model.recompute import by_layer

GIB = 2**30
RESERVE = 2.0  # GiB: CUDA context, NCCL buffers, fragmentation; 1.5 on one H200


def is_plain(c: Run) -> bool:
    """Whether a GPU runs plain PyTorch: the Triton kernels keep less."""
    return c.kernels == "reference"


def is_alone(c: Run, n_gpus: int) -> bool:
    """Whether one GPU trains without FSDP, and without its copies: training/alone.py. (With the
    plain kernels it casts gradients as FSDP does; that is rare, and counted as if it were FSDP.)"""
    return n_gpus == 1 and c.optimizer != "fsdp" and width(c) == 2 and not is_plain(c)


def width(c: Run) -> int:
    """Bytes of a number in the computation."""
    return 4 if c.dtype == "fp32" else 2


def states(config: ModelConfig, n_gpus: int, whole_gradients: bool = False) -> dict[str, float]:
    """Bytes of what FSDP shards, all in float32. Gradients that are summed once a step are whole
    until then, and become shards one unit after another."""
    n = config.n_params() / n_gpus
    weights = WEIGHT_BYTES * n
    gradients = weights * (n_gpus if whole_gradients else 1)
    return {"weights": weights, "gradients": gradients, "optimizer": OPTIMIZER_BYTES * n}


def kept_per_token(config: ModelConfig, c: Run, policy: str) -> dict[str, float]:
    """Bytes that one layer of this recompute policy keeps of a token for its backward pass."""
    b, d, f = width(c), config.d_model, config.d_ff
    if policy == "full":
        return {"layer's input": b * d}
    q, kv = config.q_size, config.kv_size
    norms = 2  # of the layer's input, and of what goes into the MLP
    kept = {
        "norms' inputs": norms * b * d,
        "q, k, v": b * (q + 2 * kv),
        "attention's output": b * q,
        "its log-sum-exp": 4 * config.n_heads,
        "gate, up": 2 * b * f,
        "dropout masks": 2 * d * (c.dropout > 0),
    }
    if isinstance(c, DPO):  # for each segment, and once for a pair's prompt
        kept["attention's output by token"] = b * q
    if config.qk_norm:  # plain: their inputs in float32, and their values before the weight
        size = 4 + b if is_plain(c) else b
        kept["inside norms of q, k"] = size * (q + kv) + 4 * (config.n_heads + config.n_kv_heads)
    if is_plain(c):
        kept["sines and cosines"] = 4 * config.head_size
    if policy == "none":
        kept |= {"norms' outputs": norms * b * d, "SwiGLU's product": b * f}
        kept["norms' scales"] = norms * 4
        if is_plain(c):
            kept |= _inside_plain(config, b, norms)
    return kept


def _inside_plain(config: ModelConfig, b: int, norms: int) -> dict[str, float]:
    """What autograd keeps between the single operations of the plain norm and SwiGLU. The norm's
    input is kept in float32 there, instead of as it came."""
    return {
        "norms' inputs in float32, instead": norms * (4 - b) * config.d_model,
        "norms' values before the weight": norms * b * config.d_model,
        "silu(gate)": b * config.d_ff,
    }


def activations(config: ModelConfig, c: Run, layers: int) -> float:
    """Bytes that the first so many layers keep of one row between forward and backward."""
    policies = by_layer(c.recompute, config.n_layers)[:layers]
    of = {policy: sum(kept_per_token(config, c, policy).values()) for policy in set(policies)}
    return c.micro_tokens * sum(of[policy] for policy in policies)


def head_moment(config: ModelConfig, c: Run, n_gpus: int) -> dict[str, float]:
    """Bytes while linear_nll runs backward, or right after, while the head's gradient is summed
    over the GPUs. No layer has gone back yet, nor the last norm."""
    b, t, matrix = width(c), c.micro_tokens, config.vocab_size * config.d_model
    norm = (2 * b + 4 * is_plain(c)) * config.d_model * t  # plain: its input in float32
    kept = {"activations": activations(config, c, config.n_layers) + norm}
    dhidden = b * config.d_model * t
    # The head's gradient is summed in float32, then cast; the plain version still has the last
    # chunk's gradient and hidden then.
    part = b * chunk(config, c) * config.d_model  # of hidden
    loss = {"loss's chunk": loss_chunk(config, c) + part, "gradients here": 4 * matrix + dhidden}
    if not is_plain(c):  # and its gradient, in float32 and rounded
        loss["loss's chunk"] += part + 4 * chunk(config, c) * config.d_model
    if is_alone(c, n_gpus):  # added to the sum chunk by chunk
        return kept | loss | {"gradients here": dhidden}
    cast = {"gradients here": (4 + (b if b < 4 else 0)) * matrix + dhidden}
    if is_plain(c):
        cast["loss's chunk"] = b * chunk(config, c) * config.vocab_size + part
    # By now hidden is let go: its gradient has taken its place.
    summed = {"gradients here": b * matrix, "FSDP": 4 * matrix * (1 + 1 / n_gpus)}
    if c.sum_gradients == "step":  # added to what is counted as whole, which goes as it is sent
        summed = {"FSDP": 4 * matrix}
    layer = b * layer_params(config)  # the last one stays gathered
    summed["FSDP"] += layer
    gathered = {"FSDP": b * matrix + layer}
    moments = loss | gathered, cast | gathered, summed
    return kept | max(moments, key=lambda parts: sum(parts.values()))


def loss_chunk(config: ModelConfig, c: Run) -> float:
    """Bytes of the logits that exist at once."""
    tokens = chunk(config, c)
    if not is_plain(c):
        return width(c) * tokens * -(-config.vocab_size // 128) * 128
    # Plain: in float32, and as they come from the matmul or as the gradient goes into one.
    return (4 + width(c)) * tokens * config.vocab_size


def chunk(config: ModelConfig, c: Run) -> int:
    """The most tokens whose logits exist at once. linear_nll shares a row's trained tokens out
    evenly over as few chunks as it can, so no chunk has more than this."""
    return min(c.micro_tokens, CHUNK_CUDA if is_plain(c) else most_tokens(config.d_model))


def layer_moment(config: ModelConfig, c: Run, n_gpus: int, layers: int) -> dict[str, float]:
    """Bytes while the last of the first so many layers runs backward through its MLP, its widest
    part. There are what is computed again, and the gradients of product, gate and up. FSDP has this
    layer's and the next one's matrices gathered, and the gradients of the one before on their way
    into the sum."""
    b, d, f = width(c), config.d_model, config.d_ff
    again, policy = 0.0, by_layer(c.recompute, config.n_layers)[layers - 1]
    if policy == "full":
        again = sum(kept_per_token(config, c, "none").values())
    elif policy == "lean":  # SwiGLU's product and, if plain, silu(gate)
        again = (1 + is_plain(c)) * b * f
    # The product is let go before gate's and up's gradients come; lean's is not.
    gradients = b * ((3 if policy == "lean" else 2) * f + d)
    parts = {
        "activations": activations(config, c, layers),
        "computed again": again * c.micro_tokens,
        "gradients here": gradients * c.micro_tokens,
    }
    if not is_alone(c, n_gpus):
        parts["FSDP"] = (2 * b + 4 + 4 / n_gpus) * layer_params(config)
    return parts


def embedding_moment(config: ModelConfig, c: Run) -> dict[str, float]:
    """Bytes while one GPU alone adds the embedding's gradient, the last one, to its sum: as it came
    and in float32. Under FSDP the head's gradient takes as much, with all activations beside it."""
    matrix, b = config.vocab_size * config.d_model, width(c)
    return {"gradients here": (b + 4) * matrix + b * config.d_model * c.micro_tokens}


def layer_params(config: ModelConfig) -> int:
    """How many parameters one layer has; all have the same number."""
    return (config.n_params() - (2 * config.vocab_size + 1) * config.d_model) // config.n_layers


def memory(config: ModelConfig, c: Run, n_gpus: int) -> dict[str, float]:
    """GiB on each GPU at the peak, by part, if a copy of the model is sharded over so many. What
    `auto` of --sum_gradients comes to is for link.py to say: here it is after each row."""
    # The last layer but one, and the last that is computed again as a whole.
    n_full = by_layer(c.recompute, config.n_layers).count("full")
    at = {max(1, config.n_layers - 1), max(1, min(n_full, config.n_layers - 1))}
    moments = [head_moment(config, c, n_gpus), *(layer_moment(config, c, n_gpus, n) for n in at)]
    if is_alone(c, n_gpus):
        moments.append(embedding_moment(config, c))
    peak = max(moments, key=lambda parts: sum(parts.values()))
    parts = states(config, n_gpus, c.sum_gradients == "step") | peak
    if c.optimizer == "split_bf16":
        parts["optimizer"] /= 2
    if c.optimizer == "split_host":  # the weights' upper halves are what stays here
        parts |= {"weights": parts["weights"] / 2, "optimizer": 0.0}
    return {name: size / GIB for name, size in parts.items()} | {"reserve": RESERVE}


def in_host(config: ModelConfig, c: Run) -> dict[str, float]:
    """GiB of the host's memory that --optimizer split_host takes on a GPU: always, and while a
    checkpoint is saved or read."""
    n = config.n_params() / GIB
    parts = {"moments and lower halves": (WEIGHT_BYTES / 2 + OPTIMIZER_BYTES) * n}
    parts["float32 weights of a checkpoint"] = WEIGHT_BYTES * n
    if c.save == "background":
        parts["copy of a save in the background"] = SAVED_BYTES * n
    return parts


WHAT = {
    "weights": f"{WEIGHT_BYTES} bytes x parameters / GPUs: float32",
    "gradients": f"{WEIGHT_BYTES} bytes x parameters / GPUs: float32; whole if summed once a step",
    "optimizer": f"{OPTIMIZER_BYTES} bytes x parameters / GPUs: AdamW's two moments in float32",
    "activations": "{c.micro_tokens:,} tokens in a row, recompute {c.recompute}",
    "loss's chunk": "the logits that exist at once",
    "computed again": "of one layer",
    "gradients here": "of what the part that is running backward made, before they are summed",
    "FSDP": "matrices gathered, and gradients on their way into the sum",
    "reserve": "CUDA context, NCCL, fragmentation",
}
WHAT_OF = {
    "split_bf16": {"optimizer": f"{OPTIMIZER_BYTES // 2} bytes x parameters: moments in bfloat16"},
    "split_host": {
        "weights": "2 bytes x parameters: their upper halves, which are bfloat16",
        "optimizer": "moments and the weights' lower halves are in the host's memory",
    },
}


def lines(config: ModelConfig, c: Run, n_gpus: int, limit: float, remedy: str) -> list[str]:
    """The parts as text, with the remedy if they do not fit `limit` GiB."""
    parts = memory(config, c, n_gpus)
    total = sum(parts.values())
    fits = "fits" if total <= limit else f"DOES NOT FIT; {remedy}"
    what = WHAT | WHAT_OF.get(c.optimizer, {})
    head = f"memory: {total:.1f} GiB predicted of {limit} GiB on each GPU: {fits}"
    return [head] + [
        f"  {name:15} {size:6.2f} GiB  {what[name].format(c=c)}" for name, size in parts.items()
    ]


def compared(config: ModelConfig, c: Run, n_gpus: int) -> str:
    """The most that this process had allocated on its GPU, beside what was predicted."""
    measured = torch.cuda.max_memory_allocated() / GIB
    predicted = sum(memory(config, c, n_gpus).values()) - RESERVE  # it is outside torch's tensors
    return (
        f"memory: {measured:.2f} GiB at most allocated on this GPU, {predicted:.2f} GiB predicted "
        f"for full rows of {c.micro_tokens:,} tokens ({measured / predicted - 1:+.0%})"
    )
