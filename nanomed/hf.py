"""Hugging Face folders in and out: safetensors, config.json and tokenizer files that transformers
loads with no custom code.

The tensors' names are ours with `model.` before all but lm_head. The architecture is
LlamaForCausalLM: its attention_bias also asks for an o_proj.bias, which is written as zeros.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomed.config import InputError, ModelConfig
from nanomed.distributed import full, local_rows
from nanomed.hf_tokenizer import write_tokenizer
from nanomed.model import Aquila
from nanomed.template import CHATML, Template
from nanomed.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9


def export(
    model: Aquila,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    template: Template = CHATML,
    replace: bool = False,
) -> None:
    """Writes the model to a new folder, tensor by tensor: no rank ever holds all of it. Every
    rank of a sharded model calls it. Raises InputError if the folder is not empty, unless
    `replace` says that it is an older export of the same run."""
    folder = Path(folder)
    main = not dist.is_initialized() or dist.get_rank() == 0
    if not replace and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; export to a new folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_json(
            unfinished / "config.json", to_hf_config(model.config, dtype, tokenizer, template)
        )
        write_tokenizer(unfinished, tokenizer, template, model.config.max_seq_len)
    index, n_shards = {}, 0
    for shard in _shards(model, dtype):
        n_shards += 1
        if main:
            name = f"model-{n_shards:05d}.safetensors"
            save_file(shard, unfinished / name, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, name)
    if main:
        _name_shards(unfinished, index, n_shards)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    if dist.is_initialized():
        dist.barrier()


def _shards(model: Aquila, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Whole tensors by Hugging Face name, in groups of at most SHARD_BYTES."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in _tensors(model):
        tensor = tensor.to(dtype).cpu().contiguous()
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _tensors(model: Aquila) -> Iterator[tuple[str, Tensor]]:
    for name, param in model.named_parameters():
        yield _hf_name(name), full(param.detach())
        if name.endswith("v_proj.bias"):
            o_bias = _hf_name(name).replace("v_proj", "o_proj")
            yield o_bias, torch.zeros(model.config.d_model)


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _name_shards(folder: Path, index: dict[str, str], n_shards: int) -> None:
    """The names that transformers expects, now that the number of shards is known."""
    final = {
        f"model-{i:05d}.safetensors": f"model-{i:05d}-of-{n_shards:05d}.safetensors"
        for i in range(1, n_shards + 1)
    }
    if n_shards == 1:
        final = {"model-00001.safetensors": "model.safetensors"}
    for old, new in final.items():
        (folder / old).rename(folder / new)
    if n_shards > 1:
        size = sum((folder / name).stat().st_size for name in final.values())
        weight_map = {name: final[file] for name, file in index.items()}
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": weight_map},
        )


def to_hf_config(
    config: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer, template: Template
) -> dict:
    """config.json; theta and dtype in the spelling of transformers 5 and in the older one."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "attention_bias": config.qkv_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": [tokenizer.special[template.turn_end]],
        "pad_token_id": tokenizer.special[template.document_end],
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- in


def load(folder: str | Path) -> Aquila:
    """The model in a Hugging Face folder: one process, float32, on the CPU."""
    with torch.device("meta"):
        model = Aquila(read_config(folder))
    model.to_empty(device="cpu")
    load_weights(model, folder)
    return model


def read_config(folder: str | Path) -> ModelConfig:
    """The shape in a folder's config.json. Raises InputError for what nanomed cannot represent."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    try:
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise InputError(f"{path}: rope type {rope} is not supported")
        theta = raw.get("rope_theta", rope.get("rope_theta"))
        if theta is None:
            raise InputError(f"{path}: no rope_theta; nanomed does not guess it")
        if raw["model_type"] not in ("llama", "qwen2"):
            raise InputError(f"{path}: model_type {raw['model_type']!r}; known are llama and qwen2")
        if raw.get("tie_word_embeddings", False):
            raise InputError(f"{path}: tied embeddings are not supported")
        return ModelConfig(
            vocab_size=raw["vocab_size"],
            n_layers=raw["num_hidden_layers"],
            d_model=raw["hidden_size"],
            n_heads=raw["num_attention_heads"],
            n_kv_heads=raw.get("num_key_value_heads", raw["num_attention_heads"]),
            d_ff=raw["intermediate_size"],
            max_seq_len=raw["max_position_embeddings"],
            rope_theta=float(theta),
            norm_eps=raw["rms_norm_eps"],
            qkv_bias=raw.get("attention_bias", raw["model_type"] == "qwen2"),
        )
    except KeyError as error:
        raise InputError(f"{path}: the field {error} is missing") from None


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a model, sharded or not, from a folder's safetensors; each rank reads its own rows.
    Raises InputError unless every tensor is used and every parameter filled."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors file")
    missing = {_hf_name(name): param for name, param in model.named_parameters()}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if name.endswith("o_proj.bias") and not file.get_tensor(name).any():
                    continue
                if name not in missing:
                    raise InputError(f"{path}: tensor {name} has no place in the model")
                _fill_slice(path, name, missing.pop(name), file.get_slice(name))
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing)}")


def _fill_slice(path: Path, name: str, param: Tensor, stored) -> None:
    if list(stored.get_shape()) != list(param.shape):
        raise InputError(
            f"{path}: {name} has shape {stored.get_shape()}, config.json says {list(param.shape)}"
        )
    rows = local_rows(param) if isinstance(param, DTensor) else slice(None)
    local = param.to_local() if isinstance(param, DTensor) else param
    with torch.no_grad():
        local.copy_(stored[rows])
