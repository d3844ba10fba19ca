"""Which store belongs to which input: the cache's keys, its locks, and what both kinds share."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from nanomed.config import InputError

CACHE = Path("runs/cache")
PACKAGE = Path(__file__).parent.parent
# The code that turns files into ids.
READERS = ("records/__init__", "records/files", "records/shapes", "records/chats")
FORMATTER = (*READERS, "text/template", "text/tokenizer", "text/tokenizer_files", "store/cache")


def code(names: tuple[str, ...]) -> dict[str, str]:
    """Each file's SHA-256: the version of the code that a store was written by."""
    return {name: digest(PACKAGE / f"{name}.py") for name in names}


def digest(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def group_key(group: str) -> int:
    """A number from 0 to 2**64 - 1 that decides on which side of the split a group stands."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def ranks() -> tuple[int, int]:
    """(rank, rank on this node) as torchrun sets them. nanomed.distributed asks the same, but
    imports torch, which the tokenising processes do without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))


def progress(files: list[str], done: int = 0) -> tqdm:
    """A bar over the bytes of the files, with MB/s and the time left; on rank 0's terminal only."""
    total = sum(os.path.getsize(path) for path in files)
    hidden = None if ranks()[0] == 0 else True  # None: shown on a terminal only
    return tqdm(
        total=total, initial=done, unit="B", unit_scale=True, desc="tokenising", disable=hidden
    )


def cached(kind: str, parts: list[str], write: Callable[[Path], None]) -> Path:
    """The folder of the store under the key of `parts`. Where it does not exist yet, one process
    of each machine writes it and the others wait, before any process group exists that could time
    out."""
    folder = CACHE / f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    if ranks()[1] > 0:
        while not folder.exists():
            time.sleep(0.1)
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)  # the data may be patients'
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second launch on the same data waits here
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write(unfinished)
            unfinished.rename(folder)
    return folder
