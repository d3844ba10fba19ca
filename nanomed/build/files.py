"""Files that a kill leaves whole, and what they depend on. A file gets its name when it is
complete; a file of lines goes on after its last whole line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nanomed.config import InputError


def make_private(folder: Path) -> None:
    """Makes a folder that only its user can read, as all that are missing above it: data may be
    patients', and mkdir's own `parents` would leave those open."""
    if not folder.exists():
        make_private(folder.parent)
        folder.mkdir(exist_ok=True, mode=0o700)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when it is complete and on the disk. The unfinished one is this
    process's own: the worker of a run that was killed may still be at the same task."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def write_json(path: Path, value: Any) -> None:
    with whole(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")


# ---------------------------------------------------------------- lines


def line_of(value: Any) -> bytes:
    """What JSON has no form for, as Parquet's dates, is written as its text."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half an emoji in a field that is not the text
        return json.dumps(value, default=str).encode() + b"\n"


def read_lines(path: Path) -> list[Any]:
    """Of a file's whole lines; the last may be half written. A text may hold U+2028, which ends no
    line here."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def whole_lines(path: Path, most: int | None = None) -> list[bytes]:
    """The first `most` lines of a file, which is made if it is not there. What it holds after them
    is cut off, and so is half a line at its end, which a kill has left."""
    lines = path.read_bytes().split(b"\n")[:-1][:most] if path.exists() else []
    with open(path, "ab") as file:
        file.truncate(sum(len(line) + 1 for line in lines))
    return lines


# ---------------------------------------------------------------- settings


def same_as_before(path: Path, identity: dict[str, Any], what: str) -> None:
    """Writes to `path` what `what` depends on. Raises InputError, naming what differs, if something
    else stands there."""
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, identity)
    elif different := differences(json.loads(path.read_text(encoding="utf-8")), identity):
        raise InputError(f"{what} is there with other settings: {different}. Choose another --out")


def differences(was: dict[str, Any], now: dict[str, Any]) -> str:
    """In words; "" if there are none."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(f"{n} was {was.get(n)!s:.200}, is {now.get(n)!s:.200}" for n in names)
