"""Tasks for the runner, in a module of their own: each of its processes imports it."""

import os
import signal
from pathlib import Path

from nanomed.build.files import whole
from nanomed.config import InputError


def square(i: int, folder: Path) -> dict[str, int]:
    with whole(folder / f"{i}.txt") as file:
        file.write(str(i * i).encode())
    return {"square": i * i}


def dies_once(i: int, folder: Path) -> dict[str, int]:
    if i == 2 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(i, folder)


def fails(i: int, folder: Path) -> dict[str, int]:
    if i == 1:
        raise InputError("record 7 cannot be read")
    return square(i, folder)
