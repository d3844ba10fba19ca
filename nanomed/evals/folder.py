"""Folders that an evaluation is written into, line by line, and gone on in after a kill."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanomed.config import InputError


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Begins a folder, or goes on in one of the same identity. Raises InputError, naming what
    differs."""
    path = out / "config.json"
    identity = json.loads(json.dumps(identity))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if "files" not in found:
            raise InputError(f"{path} is not an evaluation's; choose an --out of its own")
        if names := [n for n in {**found, **identity} if found.get(n) != identity.get(n)]:
            both = "; ".join(
                f"{n} was {found.get(n)!s:.200}, is {identity.get(n)!s:.200}" for n in names
            )
            raise InputError(f"{out} holds another evaluation: {both}. Choose another --out")
        return
    out.mkdir(parents=True, exist_ok=True, mode=0o700)  # answers may quote patients' texts
    write_json(path, identity)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lines(path: Path) -> list[dict]:
    """Of a file of whole lines. A text may hold U+2028, which ends no line here."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def cut_back(path: Path, borders: Sequence[int]) -> int:
    """How many of the borders (numbers of lines, rising) a file of lines has reached; what it holds
    after the last one, half a line at its end included, is cut off."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    reached = sum(border <= len(lines) for border in borders)
    kept = lines[: borders[reached - 1] if reached else 0]
    with open(path, "ab") as file:
        file.truncate(sum(len(line) + 1 for line in kept))
    return reached


@contextmanager
def appending(path: Path, writes: bool) -> Iterator[Callable[[str], None]]:
    """A function that appends text to the file, at once; on ranks that do not write it does
    nothing."""
    if not writes:
        yield lambda text: None
        return
    with open(path, "ab") as file:

        def write(text: str) -> None:
            file.write(text.encode())
            file.flush()

        yield write
