"""Folders that an evaluation is written into, line by line, and gone on in after a kill."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanomed.build.files import line_of, make_private, same_as_before, whole_lines
from nanomed.config import InputError
from nanomed.distributed import from_main
from nanomed.run.progress import is_terminal


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Begins a folder, or goes on in one of the same identity. Raises InputError, naming what
    differs."""
    path = out / "config.json"
    if path.exists() and "files" not in json.loads(path.read_text(encoding="utf-8")):
        raise InputError(f"{path} is not an evaluation's; choose an --out of its own")
    make_private(out)  # answers may quote patients' texts
    same_as_before(path, identity, f"an evaluation in {out}")


def finished(folder: Path) -> Path:
    """The folder itself. Raises InputError if it has no results."""
    if not (folder / "results.json").exists():
        raise InputError(f"{folder} holds no finished evaluation: it has no results.json")
    return folder


@contextmanager
def going_on(
    path: Path, ends: Sequence[int], unit: str, is_main: bool
) -> Iterator[tuple[int, Callable[[Sequence[dict]], None]]]:
    """To write a file of lines, in parts of which `ends` has the number of lines up to the end of
    each: (how many parts an earlier call has written, a function that appends lines). Every rank
    calls it; only rank 0 writes."""
    done = 0
    if is_main:
        n_lines = len(whole_lines(path))
        done = sum(end <= n_lines for end in ends)
        whole_lines(path, ends[done - 1] if done else 0)
    done = from_main(done)
    bar = tqdm(total=ends[-1], unit=unit, disable=not (is_main and is_terminal()))
    bar.update(ends[done - 1] if done else 0)
    with bar, open(path, "ab") if is_main else nullcontext() as file:

        def write(lines: Sequence[dict]) -> None:
            if file:
                file.write(b"".join(map(line_of, lines)))
                file.flush()
            bar.update(len(lines))

        yield done, write
