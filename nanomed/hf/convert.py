"""Published .bin shards into safetensors. A .bin file is a pickle, which can run code when it is
read: torch's restricted reader admits tensors and nothing else."""

import pickle
import shutil
from pathlib import Path

import torch
from torch import Tensor

from nanomed.config import InputError
from nanomed.hf.tensors import DTYPE_NAMES, Spec, file_names, index_of, write_file, write_index

# What a folder needs beside its weights; custom code is not among it.
BESIDE = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.md", "LICENSE*", "*.pdf")


def convert(source: Path, folder: Path) -> None:
    """One file after the other, mapped into memory; tensors keep dtype and bytes. Raises
    InputError, and leaves no folder, if a file is not what it should be."""
    named, files = index_of(source, "pytorch_model.bin")
    if not files:
        raise InputError(f"{source} holds neither pytorch_model.bin nor its index")
    if folder.exists():
        raise InputError(f"{folder} exists; convert to a new folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        shards = []
        for path, name in zip(files, file_names(len(files)), strict=True):
            shards.append((name, _convert_file(path, unfinished / name)))
        _check_names(source, named, shards)
        if len(shards) > 1:
            write_index(unfinished, shards)
        for path in {path for pattern in BESIDE for path in source.glob(pattern)}:
            if not path.name.startswith("pytorch_model"):
                shutil.copyfile(path, unfinished / path.name)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert_file(path: Path, target: Path) -> list[Spec]:
    tensors = _read(path)
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    specs.sort(key=lambda spec: spec.name)
    write_file(target, specs, ((spec, tensors[spec.name]) for spec in specs))
    return specs


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path} cannot be read as plain tensors: {first_line}; cut off, of a torch before "
            "1.6, or it holds code, which nanomed does not run"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected tensors by name, found {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise InputError(f"{path}: {name} is {kind}; known are {list(DTYPE_NAMES.values())}")
    return content


def _check_names(source: Path, named: dict[str, Path] | None, shards: list) -> None:
    found = [spec.name for _, specs in shards for spec in specs]
    if named is not None and sorted(found) != sorted(named):
        differ = sorted(set(found) ^ set(named)) or sorted(found)
        raise InputError(f"{source}: index and files do not agree on {', '.join(differ[:6])}")
