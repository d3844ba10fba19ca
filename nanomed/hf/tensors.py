"""Safetensors files: which tensors a folder holds, checked before any is read, and a writer that
needs no more memory than one tensor.

A file is 8 bytes (the header's length, little endian), the header (JSON: name -> dtype, shape,
place), the tensors' bytes (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanomed.config import InputError
from nanomed.text.tokenizer_files import read_object

SHARD_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------- in


def stored(folder: str | Path) -> dict[str, tuple[Path, Spec]]:
    """Name -> (file, what it is) for every tensor in a folder. Only headers are read. Raises
    InputError for a file that is missing, cut off, or not where the index says."""
    folder = Path(folder)
    named, files = index_of(folder, "model.safetensors")
    if not files:
        raise InputError(_nothing_in(folder))
    found: dict[str, tuple[Path, Spec]] = {}
    for path in files:
        found |= _header(path)
    if named is not None:
        at = {name: path for name, (path, _) in found.items()}
        if wrong := {name for name, _ in named.items() ^ at.items()}:
            raise InputError(
                f"{folder}: index and files do not agree on {some(wrong)}; download them again"
            )
    return found


def index_of(folder: Path, name: str) -> tuple[dict[str, Path] | None, list[Path]]:
    """(tensor -> file, or None without an index; the files) of the weights called `name`. Raises
    InputError for a file that is missing or outside the folder."""
    index, single = folder / f"{name}.index.json", folder / name
    if not index.exists():
        return None, [single] if single.exists() else []
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map")
    if single.exists() and name not in weight_map.values():
        # transformers reads the single file, and an older save's index may lie beside it.
        if all((folder / str(file)).is_file() for file in weight_map.values()):
            raise InputError(
                f"{folder} holds the weights twice, as {name} and as the files that {index.name} "
                "names; remove one of the two"
            )
        return None, [single]
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {file!r} is not the name of a file in this folder")
        if not (folder / file).is_file():
            raise InputError(f"{index} names {file}, which is not there; download it again")
    named = {tensor: folder / file for tensor, file in weight_map.items()}
    return named, sorted(set(named.values()))


def _nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder} holds .bin files; they are pickles: turn them into safetensors with "
            f"python -m nanomed.hf convert {folder} NEW_FOLDER"
        )
    return f"{folder} holds neither model.safetensors nor model.safetensors.index.json"


def _header(path: Path) -> dict[str, tuple[Path, Spec]]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: {error}; cut off? download it again") from None
    for name, (dtype, _) in kinds.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is {dtype}; known are {', '.join(DTYPES)}")
    return {name: (path, Spec(name, DTYPES[d], shape)) for name, (d, shape) in kinds.items()}


def some(names: Iterable[str], n: int = 6) -> str:
    """A list that may be long, for a message."""
    names = sorted(names)
    rest = f" and {len(names) - n} more" if len(names) > n else ""
    return f"{len(names)} tensors: {', '.join(names[:n])}{rest}" if len(names) > 1 else names[0]


# ---------------------------------------------------------------- out


def plan(specs: Iterable[Spec]) -> list[tuple[str, list[Spec]]]:
    """(file name, its tensors by name), in the order given, each file of at most SHARD_BYTES."""
    shards: list[list[Spec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.n_bytes for s in shards[-1]) + spec.n_bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    by_name = [sorted(shard, key=lambda spec: spec.name) for shard in shards]
    return list(zip(file_names(len(shards)), by_name, strict=True))


def file_names(n: int) -> list[str]:
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]


def write_file(path: Path, specs: list[Spec], pieces: Iterable[tuple[Spec, Tensor]]) -> None:
    """Writes tensors as they come, in the order of `specs`; a tensor may come in several pieces,
    its rows one after another. Raises ValueError if they are not what the header says."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for spec in specs:
        place = [end, end := end + spec.n_bytes]
        kind = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
        header[spec.name] = kind | {"data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    written = dict.fromkeys(specs, 0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec, piece in pieces:
            if piece.dtype != spec.dtype or piece.shape[1:] != spec.shape[1:]:
                raise ValueError(f"{spec} came as {piece.dtype} {tuple(piece.shape)}")
            written[spec] += file.write(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    if wrong := [spec.name for spec, n in written.items() if n != spec.n_bytes]:
        raise ValueError(f"{path}: not all of {some(wrong)} was written")


def write_index(folder: Path, shards: list[tuple[str, list[Spec]]]) -> None:
    """The index that several files need."""
    weight_map = {spec.name: file for file, specs in shards for spec in specs}
    size = sum(spec.n_bytes for _, specs in shards for spec in specs)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
