"""Benchmarks, and what they show, on one page.

python evaluate.py show mmlu_anatomy --data benchmarks --shots 3       the exact prompts
"""

import argparse
import sys
from pathlib import Path

from nanomed.distributed import launch
from nanomed.evals import tasks
from nanomed.evals.requests import PROTOCOLS, requests_of


def show(argv: list[str]) -> None:
    """What a task asks: contexts to the byte, and their continuations."""
    parser = _parser("show", show.__doc__)
    parser.add_argument("task", help=f"one of {', '.join(tasks.TASKS)}")
    _items(parser)
    parser.add_argument("-n", type=int, default=2, help="items shown; default 2, with --json all")
    parser.add_argument("--json", action="store_true", help="one JSON line for each item")
    c = parser.parse_args(argv)
    (task,) = tasks.named([c.task])
    requests, _ = requests_of(task, c.data, c.shots, c.protocol)
    if c.json:
        return print("\n".join(request.to_json() for request in requests))
    for request in requests[: c.n]:
        print(f"--- {request.id}, shots {request.shots}; a space is drawn as ·")
        asked = f"{request.system}{request.context}".replace(" ", "·")
        print(asked + " ".join(f"⟦{text.replace(' ', '·')}⟧" for text in request.continuations))
        print(f"right: {request.continuations[request.gold]!r}\n")


def _parser(command: str, does: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"evaluate.py {command}", description=does, allow_abbrev=False
    )


def _items(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("samples"), help="the benchmarks' folder")
    parser.add_argument("--shots", type=int, default=0, help="answered examples before an item")
    parser.add_argument("--protocol", default="plain", choices=PROTOCOLS, help="default plain")


COMMANDS = {"show": show}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    COMMANDS[command](argv)


if __name__ == "__main__":
    launch(main)
