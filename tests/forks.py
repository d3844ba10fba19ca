"""Processes that a test may kill: forked in milliseconds from one that has imported torch."""

import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.ranks import _run


def server() -> mp.context.ForkServerContext:
    """Start it once; it ends with the test session."""
    os.environ["PYTHONPATH"] = str(
        Path(__file__).parent.parent
    )  # by which it finds what it imports beforehand
    context = mp.get_context("forkserver")
    # FSDP and DCP import the other two at their first step and save: half a second in each process.
    names = ["tests.killed", "torch._dynamo", "torch.distributed.checkpoint._fsspec_filesystem"]
    context.set_forkserver_preload(names)
    return context


class Group:
    """n ranks that run function(world, *arguments)."""

    def __init__(self, context, n_ranks: int, function, *arguments):
        self.folder = tempfile.TemporaryDirectory()
        self.ranks = [
            context.Process(
                target=_rank, args=(function, arguments, rank, n_ranks, self.folder.name)
            )
            for rank in range(n_ranks)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.ranks[rank].pid, signal.SIGKILL)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes; whoever has not ended after `seconds` is killed and has None."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        self.folder.cleanup()
        return codes


def _rank(function, arguments, rank: int, n_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    try:
        _run(function, arguments, rank, n_ranks, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
