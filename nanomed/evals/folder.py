"""Folders that an evaluation is written into, line by line, and gone on in after a kill."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kernels
from nanomed.build.files import line_of, make_private, same_as_before, whole_lines
from nanomed.config import InputError
from nanomed.distributed import from_main
from nanomed.locks import take
from nanomed.model.decoder import Aquila
from nanomed.run.progress import is_terminal
from nanomed.text.template import Template
from nanomed.text.tokenizer import Tokenizer
from nanomed.training.reference import sums_of_bits


def identity(model: Aquila, tokenizer: Tokenizer, template: Template | None) -> dict[str, Any]:
    """What a model says depends on, besides what it is asked: its shape, weights, code, and how a
    text becomes ids."""
    param = next(model.parameters())
    used = kernels.in_force(param.device, param.dtype, model.config.head_size)
    return {
        "model": dataclasses.asdict(model.config),
        "dtype": str(param.dtype),
        "weights": short_hash(sums_of_bits(model).cpu().numpy().tobytes()),
        "kernels": f"{used}, torch {torch.__version__}",
        "tokenizer": tokenizer.fingerprint(),
        "template": template and template.to_json(),
    }


def short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Begins a folder, or goes on in one of the same identity. Raises InputError, naming what
    differs."""
    path = out / "config.json"
    if path.exists() and "files" not in json.loads(path.read_text(encoding="utf-8")):
        raise InputError(f"{path} is not an evaluation's; choose an --out of its own")
    make_private(out)  # answers may quote patients' texts
    same_as_before(path, identity, f"an evaluation in {out}")


def settings_of(folder: Path) -> dict[str, Any]:
    """What config.json says; nothing where another program has written the folder."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
    calls it; only rank 0 writes. Raises InputError if another process is writing there."""
    done = 0
    with take(path, patience=0.0) if is_main else nullcontext() as file:
        if file:
            n_lines = len(whole_lines(path))
            done = sum(end <= n_lines for end in ends)
            whole_lines(path, ends[done - 1] if done else 0)
        done = from_main(done)
        n_done = ends[done - 1] if done else 0
        off = not (is_main and is_terminal())
        with tqdm(total=ends[-1], initial=n_done, unit=unit, disable=off) as bar:

            def write(lines: Sequence[dict]) -> None:
                if file:
                    file.write(b"".join(map(line_of, lines)).decode())
                    file.flush()
                bar.update(len(lines))

            yield done, write
