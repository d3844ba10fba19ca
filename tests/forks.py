"""Processes that a test may kill: forked in milliseconds from one that has imported torch."""

import multiprocessing as mp
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanomed.distributed import World

# What tests, shard(), fit(), FSDP's first step and DCP's first save import: seconds each time.
IMPORTED = ["tests.conftest", "tests.killed", "torch.distributed.fsdp", "nanomed.run.saves"]
IMPORTED += ["torch._dynamo", "torch.distributed.checkpoint._fsspec_filesystem"]


def server() -> mp.context.ForkServerContext:
    """Start it once; it ends with the test session."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent)):
        multiprocessing.forkserver.ensure_running()  # it finds by the path what it imports
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
        run(function, arguments, rank, n_ranks, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run(function, arguments, rank: int, n_ranks: int, folder: str):
    """function(world, *arguments) as one rank of a group that meets in an empty folder."""
    store = dist.FileStore(str(Path(folder) / "store"), n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    try:
        mesh = init_device_mesh("cpu", (n_ranks,))
        return function(World(rank, n_ranks, torch.device("cpu"), mesh), *arguments)
    finally:
        dist.destroy_process_group()
