"""Hugging Face folders in: checked by their headers first, then read slice by slice."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nanomed.config import InputError, ModelConfig
from nanomed.distributed import from_all, local, local_rows
from nanomed.hf.config import parse
from nanomed.hf.tensors import Spec, some, stored
from nanomed.model.decoder import Aquila
from nanomed.run.progress import progress
from nanomed.text.tokenizer_files import read_object

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
O_BIAS = "self_attn.o_proj.bias"


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our parameters."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def read_config(folder: str | Path) -> ModelConfig:
    """The model in a folder, its config.json checked against every tensor's shape. Allocates
    nothing. Raises InputError for what nanomed cannot represent, and for what does not fit."""
    path = Path(folder) / "config.json"
    raw = read_object(path)
    tensors = stored(folder)
    # Aquila's configs do not say whether there is a bias: the tensors do.
    said = True if raw.get("model_type") == "qwen2" else raw.get("attention_bias")
    seen = any(name.endswith("q_proj.bias") for name in tensors)
    qkv_bias = seen if said is None else bool(said)
    config = parse(path, raw, qkv_bias, o_bias=qkv_bias and _any(tensors, O_BIAS))
    _check(path, config, tensors, _is_tied(folder))
    return config


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a model, sharded or not; each rank reads its own rows, and none the whole. Every
    rank calls it, and every rank raises InputError if one of them met a number that is none."""
    problem = ""
    try:
        with progress(len(list(model.parameters())), "tensor", "reading weights") as bar:
            for name, param, path, stored_slice in _slices(model, folder):
                _fill(name, param, path, stored_slice)
                bar.update()
    except InputError as error:
        problem = str(error)
    if problem := next(filter(None, from_all(problem)), ""):
        raise InputError(problem)


def _slices(model: nn.Module, folder: str | Path) -> Iterator[tuple[str, Tensor, Path, object]]:
    """(name, parameter, file, the stored tensor to slice), one file open at a time."""
    tensors = stored(folder)
    wanted = {hf_name(name): [param] for name, param in model.named_parameters()}
    if _is_tied(folder):
        wanted[EMBEDDING] += wanted.pop(HEAD)
    for path in sorted({path for path, _ in tensors.values()}):
        with safe_open(path, "pt") as file:
            for name in [n for n in wanted if n in tensors and tensors[n][0] == path]:
                for param in wanted[name]:
                    yield name, param, path, file.get_slice(name)


def _fill(name: str, param: Tensor, path: Path, stored_slice) -> None:
    rows = local_rows(param)
    if rows.start >= rows.stop:  # more ranks than rows
        return
    values = stored_slice[rows]
    if not values.isfinite().all():
        raise InputError(f"{path}: {name} holds numbers that are NaN or infinite")
    with torch.no_grad():
        local(param).copy_(values)


def _is_tied(folder: str | Path) -> bool:
    """Whether the head is the embedding. In the model they become two tensors."""
    return bool(read_object(Path(folder) / "config.json").get("tie_word_embeddings"))


def _check(
    path: Path, config: ModelConfig, tensors: dict[str, tuple[Path, Spec]], tied: bool
) -> None:
    with torch.device("meta"):
        model = Aquila(config)
    shapes = {hf_name(name): tuple(param.shape) for name, param in model.named_parameters()}
    found = {name: spec.shape for name, (_, spec) in tensors.items()}
    # Older versions of transformers saved RoPE's angles, which follow from theta.
    found = {n: shape for n, shape in found.items() if not n.endswith("rotary_emb.inv_freq")}
    if tied:
        found.setdefault(HEAD, found.get(EMBEDDING, ()))
        _head_is_embedding(path, tensors)
    if config.qkv_bias and not config.o_bias:  # zeros, which our own export has, say nothing
        found = {name: shape for name, shape in found.items() if not name.endswith(O_BIAS)}
    if wrong := {name for name in shapes.keys() & found.keys() if shapes[name] != found[name]}:
        name = min(wrong)
        raise InputError(
            f"{path} does not fit the weights: it asks for {name} of shape {shapes[name]}, "
            f"{tensors[name][0].name} has {found[name]}; in all {some(wrong)}"
        )
    if missing := shapes.keys() - found.keys():
        raise InputError(f"{path.parent} lacks {some(missing)}")
    if unused := found.keys() - shapes.keys():
        raise InputError(f"{path.parent} holds what the model has no place for, {some(unused)}")


def _any(tensors: dict[str, tuple[Path, Spec]], end: str) -> bool:
    """Whether one of the tensors whose names end so is not zero."""
    for name in [name for name in tensors if name.endswith(end)]:
        with safe_open(tensors[name][0], "pt") as file:
            if file.get_tensor(name).any():
                return True
    return False


def _head_is_embedding(path: Path, tensors: dict[str, tuple[Path, Spec]]) -> None:
    """Some tied models are saved with both; if they differ, one of two statements is wrong."""
    if HEAD not in tensors or EMBEDDING not in tensors:
        return
    (head_path, spec), (embedding_path, _) = tensors[HEAD], tensors[EMBEDDING]
    with safe_open(head_path, "pt") as a, safe_open(embedding_path, "pt") as b:
        head, embedding = a.get_slice(HEAD), b.get_slice(EMBEDDING)
        for start in range(0, spec.shape[0], 8192):  # a part at a time: it may be gigabytes
            if not torch.equal(head[start : start + 8192], embedding[start : start + 8192]):
                raise InputError(
                    f"{path} says tie_word_embeddings, but {HEAD} and {EMBEDDING} differ"
                )
