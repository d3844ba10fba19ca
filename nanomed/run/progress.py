"""Bars for what takes longer than a few seconds, where somebody looks."""

import os
import sys

from tqdm import tqdm

from nanomed.processes import rank_from_env


def progress(total: int, unit: str, what: str, line: int = 0) -> tqdm:
    """A bar that goes when its work is done; on rank 0's terminal only, `line` lines below the
    cursor."""
    hidden = rank_from_env()[0] > 0 or not is_terminal()
    return tqdm(total=total, unit=unit, desc=what, leave=False, disable=hidden, position=line)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
