"""What the scripts that build data share of their settings."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nanomed.build.labeller import Endpoint
from nanomed.config import InputError, check_limits
from nanomed.processes import rank_from_env
from nanomed.records.encodings import BAD
from nanomed.records.files import kind_of

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")  # in a folder; .gz and .zst too


def flag(default: Any, help: str, paper: str = "", choices: tuple = ()) -> Any:
    words = help + f"\n  the paper: {paper}" * bool(paper)
    return field(default=default, metadata={"help": words, "paper": (), "choices": choices})


@dataclass(frozen=True)
class Paid:
    """Settings of an endpoint that may cost something. They change nothing in the result."""

    FRESH: ClassVar[dict[str, Any]] = {}

    config: str = flag("", "TOML file with any of these settings; flags come after it and win")
    max_cost: float = flag(-1.0, "most that the endpoint may cost in all; -1: no limit")
    price_in: float = flag(-1.0, "price of a million tokens that it reads; -1: not given")
    price_out: float = flag(-1.0, "price of a million tokens that it writes; -1: not given")
    send_texts_to: str = flag("", "host that texts may be sent to, if it is not this machine")
    retry_failed: bool = flag(False, "ask again where its answer could not be read")

    def __post_init__(self) -> None:
        check_limits(self, [])

    def endpoint(self, url: str, model: str, answers: Path) -> Endpoint:
        return Endpoint(
            url,
            model,
            answers,
            price_in=None if self.price_in < 0 else self.price_in,
            price_out=None if self.price_out < 0 else self.price_out,
            max_cost=None if self.max_cost < 0 else self.max_cost,
            send_texts_to=self.send_texts_to,
        )


def files_of(paths: list[str], within: str = "") -> list[str]:
    """Files as they are, folders with all they hold, in the order of their names. Of a folder that
    has a file `within`, that file alone. What a folder holds and is not read is said."""
    found = []
    for path in paths:
        if not Path(path).is_dir():
            found.append(path)
            continue
        inside = sorted(_inside(path))
        if (alone := str(Path(path, within))) in inside:
            found.append(alone)
            continue
        left = [name for name in inside if kind_of(name) not in KINDS]
        if len(left) == len(inside):
            raise InputError(f"--data {path}: no file in it is {', '.join(KINDS)}")
        found += sorted({*inside} - {*left})
        if left and rank_from_env()[0] == 0:
            print(f"{path}: {len(left):,} files of other endings are not read: {left[0]!a}, ...")
    if bad := next(filter(BAD.search, found), None):
        raise InputError(f"{bad!a} is no UTF-8; rename the file")
    if len(set(found)) < len(found):
        raise InputError(f"--data names {max(found, key=found.count)} twice")
    return sorted(found)


def _inside(path: str) -> Iterator[str]:
    """All files in a folder and behind its links, each once: links may lead back."""
    met: set[str] = set()
    for folder, inner, names in os.walk(path, followlinks=True):
        for held in (inner, names):
            real = {os.path.realpath(Path(folder, n)): n for n in sorted(held, reverse=True)}
            held[:] = [name for where, name in real.items() if where not in met]
            met |= real.keys()
        yield from (str(Path(folder, name)) for name in names)


def weight_files(folder: str) -> list[Path]:
    """Of a model's folder: what its result depends on."""
    found = [p for end in ("safetensors", "bin", "distcp") for p in Path(folder).rglob(f"*.{end}")]
    return sorted(found)
