"""A file's lock, between processes and machines: whoever holds it is the one that writes there."""

import fcntl
import math
import time
from pathlib import Path
from typing import IO

from nanomed.config import InputError


def take(path: Path, patience: float = math.inf) -> IO[str]:
    """The opened file, its folder made, its lock taken; it is held until the file is closed. Raises
    InputError if the folder cannot be written, or if another holds the lock for more than
    `patience` seconds. Where the disk has no locks it goes on without, and says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # the data may be patients'
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}") from None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > until:
                file.close()
                raise InputError(f"another process is writing to {path.parent}") from None
            time.sleep(0.1)
        except OSError as error:
            print(
                f"WARNING: the disk of {path.parent} has no file locks ({error.strerror}), so "
                "nothing keeps a second process from writing there. Lustre has them if it is "
                "mounted with -o flock"
            )
            return file
