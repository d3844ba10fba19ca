"""Processes for the tests that need several ranks. Starting one costs seconds, so they are kept."""

import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from nanomed.distributed import World


class Pool:
    def __init__(self, size: int):
        context = mp.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pipes
        ]

    def __enter__(self) -> "Pool":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def __call__(self, n_ranks: int, function, *arguments) -> list:
        """function(world, *arguments) on each of n_ranks ranks of a new group; the results."""
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:n_ranks]):
                pipe.send((function, arguments, rank, n_ranks, folder))
            answers = [pipe.recv() for pipe in self.pipes[:n_ranks]]
        failed = [error for _, error in answers if error]
        assert not failed, failed[0]
        return [result for result, _ in answers]


def _serve(pipe) -> None:
    torch.set_num_threads(1)
    while True:
        function, arguments, rank, n_ranks, folder = pipe.recv()
        try:
            pipe.send((_run(function, arguments, rank, n_ranks, folder), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            os._exit(1)  # the others may hang in a collective: the pool is of no use any more


def _run(function, arguments, rank: int, n_ranks: int, folder: str):
    store = dist.FileStore(str(Path(folder) / "store"), n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    try:
        mesh = init_device_mesh("cpu", (n_ranks,))
        return function(World(rank, n_ranks, torch.device("cpu"), mesh), *arguments)
    finally:
        dist.destroy_process_group()
