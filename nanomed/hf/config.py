"""config.json: what a Hugging Face folder says about a model's shape, and how we say it.

Nothing is assumed: what a config asks for and the model cannot do is an error.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from nanomed.config import InputError, ModelConfig

# Aquila's own types, and Mistral's, are Llama's tensors under another name (BAAI's
# modeling_aquila.py, transformers' modeling_mistral.py).
MODEL_TYPES = ("aquila", "aquila3", "llama", "mistral", "qwen2", "qwen3")
ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def parse(path: Path, raw: dict[str, Any], qkv_bias: bool, o_bias: bool) -> ModelConfig:
    """The shape in a config.json. Which matrices of attention have a bias is seen from the tensors,
    since not every config says it. Raises InputError naming the field."""
    if raw.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: model_type {raw.get('model_type')!r}; known are {known}")
    _refuse_what_is_unknown(path, raw)
    n_heads = _number(path, raw, "num_attention_heads")
    if raw.get("num_key_value_heads") is None:  # each query head has its own
        raw = raw | {"num_key_value_heads": n_heads}
    d_model = _number(path, raw, "hidden_size")
    head_dim = raw.get("head_dim") and _number(path, raw, "head_dim")
    config = ModelConfig(
        vocab_size=_number(path, raw, "vocab_size"),
        n_layers=_number(path, raw, "num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=_number(path, raw, "num_key_value_heads"),
        d_ff=_number(path, raw, "intermediate_size"),
        max_seq_len=_number(path, raw, "max_position_embeddings"),
        rope_theta=_theta(path, raw),
        norm_eps=_number(path, raw, "rms_norm_eps", float),
        qkv_bias=qkv_bias,
        head_dim=head_dim if head_dim and head_dim * n_heads != d_model else 0,
        qk_norm=raw["model_type"] == "qwen3",
        o_bias=o_bias,
        rope_scaling=_rope_scaling(path, raw),
    )
    divides = head_dim or d_model % n_heads == 0
    if not divides or config.head_size % 2 or n_heads % config.n_kv_heads:
        raise InputError(
            f"{path}: hidden_size {d_model}, num_attention_heads {n_heads}, num_key_value_heads "
            f"{config.n_kv_heads} and head_dim {head_dim} do not divide one another"
        )
    return config


def _number(path: Path, raw: dict, name: str, kind: type = int) -> Any:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise InputError(f"{path}: {name} is {value!r}; expected a positive {kind.__name__}")
    return kind(value)


def _refuse_what_is_unknown(path: Path, raw: dict) -> None:
    refused = [
        ("hidden_act", raw.get("hidden_act", "silu") not in ("silu", "swish")),
        ("mlp_bias", bool(raw.get("mlp_bias"))),
        ("sliding_window", _slides(raw)),
        ("quantization_config", raw.get("quantization_config") is not None),
        ("partial_rotary_factor", raw.get("partial_rotary_factor", 1) != 1),
    ]
    for name, is_refused in refused:
        if is_refused:
            said = repr(raw[name]) if name in raw else "(by default)"
            raise InputError(f"{path}: {name} {said} is not something nanomed can do")


def _slides(raw: dict) -> bool:
    """Whether a layer sees a window of the past only, as transformers takes what is left out."""
    if raw.get("layer_types"):
        return set(raw["layer_types"]) != {"full_attention"}
    if raw["model_type"] != "mistral":
        first = raw.get("max_window_layers", 28)
        if not raw.get("use_sliding_window") or first >= raw.get("num_hidden_layers", 0):
            return False
    return raw.get("sliding_window", 4096) is not None


def _rope_scaling(path: Path, raw: dict) -> tuple[float, ...]:
    """Llama 3.1's numbers, from the older spelling or the newer, () if angles are as they were."""
    found = set()
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else ""
        known = ROPE + LLAMA3 if kind == "llama3" else ROPE
        alike = kind in ("default", "llama3") and rope.get("partial_rotary_factor", 1) == 1
        if not alike or any(rope[key] is not None for key in rope.keys() - {*known}):
            raise InputError(f"{path}: {name} {rope} is not something nanomed can do")
        if kind == "llama3":
            found.add(tuple(_number(path, rope, key, float) for key in LLAMA3))
        elif rope:
            found.add(())
    if len(found) > 1:
        raise InputError(f"{path}: rope_scaling and rope_parameters differ: {found}")
    scaling = next(iter(found), ())
    if scaling and scaling[1] >= scaling[2]:
        raise InputError(f"{path}: low_freq_factor is not below high_freq_factor: {scaling}")
    return scaling


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


def unsaid(config: ModelConfig) -> list[str]:
    """The options of a model that config.json has no word for: who loads it would get another
    model."""
    raw = render(config, torch.float32, False, [], 0)
    said = parse(Path("config.json"), raw, config.qkv_bias, config.o_bias)
    said, meant = (dataclasses.asdict(c) | {"head_dim": c.head_size} for c in (said, config))
    return [name for name in meant if said.get(name) != meant[name]]


def render(
    config: ModelConfig, dtype: torch.dtype, is_qwen2: bool, stop: list[int], pad: int
) -> dict[str, Any]:
    """config.json; RoPE and dtype in the spelling of transformers 5 and in the older one.

    The attention_bias of a Llama or Qwen3 also asks for an o_proj.bias, which export() writes as
    zeros where the model has none; a Qwen2 always has the bias of q, k and v, and no other."""
    dtype_name = str(dtype).removeprefix("torch.")
    name = "Qwen2" if is_qwen2 else "Qwen3" if config.qk_norm else "Llama"
    own = {"mlp_bias": False} if name == "Llama" else {"use_sliding_window": False}
    if not is_qwen2:
        own["attention_bias"] = config.qkv_bias
    rope = {"rope_type": "default"}
    if config.rope_scaling:
        rope = {"rope_type": "llama3", **dict(zip(LLAMA3, config.rope_scaling, strict=True))}
        own["rope_scaling"] = rope
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        **own,
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
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }
