"""Which store belongs to which input: the cache's keys, and what both kinds of stores share."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanomed import locks
from nanomed.config import InputError
from nanomed.processes import rank_from_env

CACHE = Path("runs/cache")
PACKAGE = Path(__file__).parent.parent
PROBED = 16  # records of each file whose ids are a part of the key


def digest(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def hash_of_first(made: Iterable) -> str:
    """Of what the first records of a file become: a line that somebody changes to try it takes
    effect, though it has raised no number of VERSIONS."""
    return hashlib.sha256(repr([*islice(made, PROBED)]).encode()).hexdigest()


def group_key(group: str) -> int:
    """A number from 0 to 2**64 - 1 that decides on which side of the split a group stands."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big")


def limit_of(fraction: float) -> np.uint64:
    """A group whose key is below it is held out. Exact where a float of 64 bits is not."""
    return np.uint64(min(int(fraction * 2**64), 2**64 - 1))


@contextmanager
def progress(files: list[str], first: int = 0) -> Iterator[Callable[[int, int], None]]:
    """A bar over the bytes of the files from this one on, with MB/s and the time left; on rank 0's
    terminal only. It moves as it is told (a file's number, its bytes read so far)."""
    before = [0, *accumulate(map(os.path.getsize, files))]
    hidden = None if rank_from_env()[0] == 0 else True  # None: shown on a terminal only
    look = {"unit": "B", "unit_scale": True, "desc": "tokenising", "disable": hidden}
    with tqdm(total=before[-1], initial=before[first], **look) as bar:
        yield lambda file, n_bytes: bar.update(before[file] + n_bytes - bar.n)


def cached(kind: str, parts: list[str], write: Callable[[Path], None]) -> Path:
    """The folder of the store under the key of `parts`. Where it does not exist yet, one process
    of each machine writes it and the others wait, before any process group exists that could time
    out. On a disk whose locks are each machine's own several may write: the first to end wins."""
    folder = CACHE / f"{kind}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    if rank_from_env()[2] > 0:
        while not folder.exists():
            time.sleep(0.1)
        return folder
    try:
        lock = locks.take(Path(f"{folder}.lock"))  # a second launch on the same data waits here
    except InputError as error:
        raise InputError(
            f"{error}. Tokenised data is kept in {CACHE.absolute()}: start the script from a "
            "folder that you may write to"
        ) from None
    with lock:
        if not folder.exists():
            unfinished = _own(folder)
            write(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(unfinished)
    return folder


def _own(folder: Path) -> Path:
    """An empty folder beside this one that only this process writes; those of processes of this
    machine that are gone are deleted."""
    prefix = f"{folder.name}.unfinished-{os.uname().nodename}-"
    for left in folder.parent.glob(f"{prefix}*"):
        if not Path(f"/proc/{left.name.removeprefix(prefix)}").exists():
            shutil.rmtree(left, ignore_errors=True)
    own = folder.with_name(f"{prefix}{os.getpid()}")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    return own
