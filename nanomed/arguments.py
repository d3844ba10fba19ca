"""A stage's settings from a TOML file and the command line, and the text of --help."""

import argparse
import dataclasses
import os
import tomllib
from typing import Any, get_args, get_origin

from nanomed.config import STAGES, UNPUBLISHED, InputError, Run, beside_the_scripts, nearest


def parse(cls: type[Run], argv: list[str] | None = None, base: dict[str, Any] | None = None) -> Run:
    """Settings from, in rising order: the class's defaults, `base` (None: FRESH, if neither --init
    nor --config is given), the TOML file, the command line. Raises InputError."""
    parser = _parser(cls)
    flags, unknown = parser.parse_known_args(argv)
    given = vars(flags)
    if unknown:
        names = [f"--{f.name}" for f in dataclasses.fields(cls)]
        raise InputError(f"unknown argument {unknown[0]!r}" + nearest(unknown[0], names))
    from_file = _read_toml(cls, beside_the_scripts(given["config"])) if "config" in given else {}
    if base is None:
        base = {} if "init" in {**from_file, **given} or "config" in given else cls.FRESH
    run = cls(**{**base, **from_file, **given})
    lists = [n for n in ("data", "val_data") if hasattr(run, n)]
    found = {n: list(map(beside_the_scripts, getattr(run, n))) for n in lists}
    for name, files in found.items():
        real = [*map(os.path.realpath, files)]  # however it is spelled
        if twice := [file for i, file in enumerate(files) if real[i] in real[:i]]:
            raise InputError(f"--{name}: {twice[0]} is given twice; --epochs repeats data")
    paths = [n for n in ("tokenizer", "template") if hasattr(run, n)]
    found |= {n: beside_the_scripts(getattr(run, n)) for n in paths}
    return dataclasses.replace(run, **found)


def command_line(prog: str, about: str) -> argparse.ArgumentParser:
    """The parser of a command that is no stage; `about` stands in its --help as it is."""
    return argparse.ArgumentParser(
        prog=prog,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message)


def _parser(cls: type[Run]) -> argparse.ArgumentParser:
    script = getattr(cls, "script", "") or f"train_{cls.stage}.py"
    parser = _Parser(
        prog=script,
        usage=f"{script} [--config FILE.toml] [--FLAG VALUE ...]",
        allow_abbrev=False,  # --batch would silently mean --batch_size
        argument_default=argparse.SUPPRESS,  # what was not given leaves no trace
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for f in dataclasses.fields(cls):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        if get_origin(f.type) is list:
            # extend: `--data A --data B` are both, where argparse's default would drop A
            kind = {"type": get_args(f.type)[0], "nargs": "+", "action": "extend"}
        if kind.get("type") is str:
            kind["type"] = _text
        if f.name == "resume":
            kind |= {"nargs": "?", "const": "latest"}
        parser.add_argument(f"--{f.name}", help=_help(cls, f), **kind)
    return parser


def _text(value: str) -> str:
    """The name of a file may be bytes of another encoding, which no report could hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!a} is no UTF-8; rename the file") from None
    return value


def _help(cls: type[Run], f: dataclasses.Field) -> str:
    shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
    shown = "none" if shown == "" else "off" if shown is False else shown
    text = f.metadata["help"]
    if "default:" not in text:
        text += f"\n  default {shown}"
    if f.name in cls.FRESH:
        text += f"; for a fresh model {cls.FRESH[f.name]}"
    if f.metadata["choices"]:
        text += f"; one of {', '.join(filter(None, f.metadata['choices']))}"
    paper = dict(zip(STAGES, f.metadata["paper"], strict=False))
    given = [f"{value} ({name})" for name, value in paper.items() if value]
    unpublished = [name for name, value in paper.items() if value == UNPUBLISHED]
    if unpublished:
        given.append(f"unpublished ({', '.join(unpublished)})")
    if given:
        text += f"\n  the paper: {', '.join(given)}"
    return text.replace("%", "%%")


def _read_toml(cls: type[Run], path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--config {path}: {error}") from None
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in types:
            raise InputError(f"{path}: unknown setting {name!r}" + nearest(name, types))
        kind = get_origin(types[name]) or types[name]
        if kind is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kind:
            raise InputError(f"{path}: {name} = {value!r} must be {kind.__name__}")
    return values
