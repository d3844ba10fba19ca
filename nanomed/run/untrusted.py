"""Reads checkpoints that somebody else may have written, and runs no code that is in them.

torch.distributed.checkpoint reads `.metadata`, and every value that is no tensor, with plain
pickle, which calls whatever function a file names. Here `.metadata` goes through a reader that
admits only what it consists of, and tensors alone are loaded: torch.load(weights_only=True) reads
them already.
"""

import io
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan
from tqdm import tqdm

from nanomed.config import InputError

_METADATA = "torch.distributed.checkpoint.metadata"
ADMITTED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
    *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Chunk", "Bytes")),
    *((_METADATA, name) for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # looks a name up in a table
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32")),
    ("pathlib", "PosixPath"),  # where it was written; never opened
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in ADMITTED:
            raise InputError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads `files`, the names in the manifest, from a folder and nothing else."""

    def __init__(self, folder: Path, files: set[str]):
        super().__init__(folder)
        self.folder, self.files = folder, files

    def read_metadata(self, *_, **__) -> Metadata:
        path = self.folder / ".metadata"
        metadata = read_metadata(path)
        places = {info.relative_path for info in metadata.storage_data.values()}
        if strangers := places - self.files:
            raise InputError(f"{path} points to {sorted(strangers)}, not in manifest.json")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(path: Path) -> Metadata:
    """Raises InputError for a file that is anything but a checkpoint's description of itself."""
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        assert isinstance(metadata, Metadata), f"it holds a {type(metadata).__name__}"
        assert isinstance(metadata.storage_data, dict), "it names no shards"
        return metadata
    except Exception as error:  # broken pickles fail in any way there is
        raise InputError(f"{path} was not written by a save and is not read: {error}") from None


class Planner(DefaultLoadPlanner):
    """Moves a bar as it fills what is this rank's."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        self.bar.reset(len(central_plan.items))
        return super().finish_plan(central_plan)

    def commit_tensor(self, read_item, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self.bar.update()

    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        raise InputError(f"{read_item.dest_index.fqn} is no tensor there, and is not unpickled")
