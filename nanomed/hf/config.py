"""config.json: what a Hugging Face folder says about a model's shape, and how we say it.

Nothing is assumed: what a config asks for and the model cannot do is an error.
"""

import json
from pathlib import Path
from typing import Any

import torch

from nanomed.config import InputError, ModelConfig

# Aquila's own types are Llama's tensors under another name (BAAI's modeling_aquila.py).
MODEL_TYPES = ("aquila", "aquila3", "llama", "qwen2")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def parse(path: Path, raw: dict[str, Any], qkv_bias: bool) -> ModelConfig:
    """The shape in a config.json. Whether q, k and v have a bias is seen from the tensors, since
    not every config says it. Raises InputError naming the field."""
    if raw.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: model_type {raw.get('model_type')!r}; known are {known}")
    _refuse_what_is_unknown(path, raw)
    n_heads = _number(path, raw, "num_attention_heads")
    config = ModelConfig(
        vocab_size=_number(path, raw, "vocab_size"),
        n_layers=_number(path, raw, "num_hidden_layers"),
        d_model=_number(path, raw, "hidden_size"),
        n_heads=n_heads,
        # Left out where each query head has its own key/value head.
        n_kv_heads=_number(path, {"num_key_value_heads": n_heads} | raw, "num_key_value_heads"),
        d_ff=_number(path, raw, "intermediate_size"),
        max_seq_len=_number(path, raw, "max_position_embeddings"),
        rope_theta=_theta(path, raw),
        norm_eps=_number(path, raw, "rms_norm_eps", float),
        qkv_bias=qkv_bias,
    )
    if config.d_model % n_heads or config.head_size % 2 or n_heads % config.n_kv_heads:
        raise InputError(
            f"{path}: hidden_size {config.d_model}, num_attention_heads {n_heads} and "
            f"num_key_value_heads {config.n_kv_heads} do not divide one another"
        )
    if (head_dim := raw.get("head_dim") or config.head_size) != config.head_size:
        raise InputError(f"{path}: head_dim {head_dim} is not hidden_size / num_attention_heads")
    return config


def _number(path: Path, raw: dict, name: str, kind: type = int) -> Any:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise InputError(f"{path}: {name} is {value!r}; expected a positive {kind.__name__}")
    return kind(value)


def _refuse_what_is_unknown(path: Path, raw: dict) -> None:
    layer_types = set(raw.get("layer_types") or ())
    refused = [
        ("hidden_act", raw.get("hidden_act", "silu") != "silu"),
        ("mlp_bias", bool(raw.get("mlp_bias"))),
        ("use_sliding_window", bool(raw.get("use_sliding_window"))),
        ("layer_types", bool(layer_types - {"full_attention"})),
        ("quantization_config", raw.get("quantization_config") is not None),
        ("partial_rotary_factor", raw.get("partial_rotary_factor", 1) != 1),
    ]
    for name, is_refused in refused:
        if is_refused:
            raise InputError(f"{path}: {name} {raw[name]!r} is not something nanomed can do")
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else ""
        if kind != "default" or rope.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"{path}: {name} {rope} is not something nanomed can do")


def _theta(path: Path, raw: dict) -> float:
    """From the older spelling, the newer, or both if they agree. transformers would take 10000
    where there is none, silently."""
    newer = (raw.get("rope_parameters") or {}).get("rope_theta")
    found = {"rope_theta": raw.get("rope_theta"), "rope_parameters.rope_theta": newer}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise InputError(
            f"{path}: no rope_theta and no rope_parameters; nanomed does not guess it: look it up "
            "in the model's own code or card and write it in"
        )
    if len(set(found.values())) > 1:
        raise InputError(f"{path}: two different values: {found}")
    name = next(iter(found))
    return _number(path, found, name, float)


def render(
    config: ModelConfig, dtype: torch.dtype, is_qwen: bool, stop: list[int], pad: int
) -> dict[str, Any]:
    """config.json; theta and dtype in the spelling of transformers 5 and in the older one.

    A Llama's attention_bias also asks for an o_proj.bias, which export() writes as zeros; a Qwen2
    always has the bias of q, k and v, and no other."""
    dtype_name = str(dtype).removeprefix("torch.")
    kind = (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        if is_qwen
        else {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": config.qkv_bias,
            "mlp_bias": False,
        }
    )
    return kind | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }
