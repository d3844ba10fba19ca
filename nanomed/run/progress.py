"""Bars for what takes longer than a few seconds, where somebody looks."""

import os
import sys

from tqdm import tqdm


def progress(total: int, unit: str, what: str, line: int = 0) -> tqdm:
    """A bar that goes when its work is done; on rank 0's terminal only, `line` lines below the
    cursor."""
    # rank_from_env() would import torch, which the processes of a build do without.
    hidden = int(os.environ.get("RANK", 0)) > 0 or not is_terminal()
    return tqdm(total=total, unit=unit, desc=what, leave=False, disable=hidden, position=line)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
