"""What the scripts that build data share of their settings."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nanomed.build.labeller import Endpoint
from nanomed.config import InputError, check_limits

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")  # in a folder; each also as .gz


def flag(default: Any, help: str, paper: str = "", choices: tuple = ()) -> Any:
    words = f"{help}{f' (the paper: {paper})' if paper else ''}"
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
    has a file `within`, that file alone."""
    found = []
    for path in paths:
        inside = sorted(map(str, Path(path).rglob("*"))) if Path(path).is_dir() else [path]
        if inside != [path]:
            inside = [p for p in inside if p.removesuffix(".gz").endswith(KINDS)]
            if within and str(Path(path) / within) in inside:
                inside = [str(Path(path) / within)]
        if not inside:
            raise InputError(f"--data {path}: no file in it is {', '.join(KINDS)}")
        found += inside
    if len(set(found)) < len(found):
        raise InputError(f"--data names {max(found, key=found.count)} twice")
    return sorted(found)


def weight_files(folder: str) -> list[Path]:
    """Of a model's folder: what its result depends on."""
    found = [p for end in ("safetensors", "bin", "distcp") for p in Path(folder).rglob(f"*.{end}")]
    return sorted(found)
