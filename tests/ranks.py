"""Processes for the tests that need several ranks. Starting one costs seconds, so they are kept."""

import importlib
import multiprocessing as mp
import os
import tempfile
import threading
import traceback
from contextlib import chdir, nullcontext
from unittest import mock

import torch

from tests.forks import run, server


class Pool:
    def __init__(self, size: int):
        self.size = size

    def __enter__(self) -> "Pool":
        """Returns at once; the first call waits until they are there."""
        # A fork is cheaper by seconds, but forks hash strings alike. Processes that torchrun starts
        # do not, so what goes through a set in another order on each rank must be seen here too.
        contexts = [mp.get_context("spawn"), *[server()] * (self.size - 1)]
        pipes = [mp.Pipe() for _ in contexts]
        self.pipes = [mine for mine, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(theirs,), daemon=True)
            for context, (_, theirs) in zip(contexts, pipes, strict=True)
        ]
        self.starting = threading.Thread(target=lambda: [p.start() for p in self.processes])
        self.starting.start()
        return self

    def __exit__(self, *_) -> None:
        self.starting.join()
        for process in self.processes:
            process.kill()
            process.join()

    def __call__(self, n_ranks: int, function, *arguments) -> list:
        """function(world, *arguments) on each of n_ranks ranks of a new group; the results."""
        self.starting.join()
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:n_ranks]):
                pipe.send((function, arguments, rank, n_ranks, folder))
            answers = [pipe.recv() for pipe in self.pipes[:n_ranks]]
        failed = [error for _, error in answers if error]
        if failed:  # those ranks have ended: the next test gets new ones
            self.__exit__()
            self.__enter__()
        assert not failed, "\n".join(failed)  # some only say that another rank has gone
        return [result for result, _ in answers]


def _serve(pipe) -> None:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the test that started it may have seen a GPU
    while True:
        function, arguments, rank, n_ranks, folder = pipe.recv()
        try:
            pipe.send((run(function, arguments, rank, n_ranks, folder), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            os._exit(1)  # the others may hang in a collective


def script(world, name: str, arguments: list[str], folder: str) -> None:
    """main() of a script in a folder, on a rank that torchrun would have started so."""
    main, places = importlib.import_module(name), ("RANK", "LOCAL_RANK")
    sizes = ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    here = dict.fromkeys(places, str(world.rank)) | dict.fromkeys(sizes, str(world.size))
    joined = mock.patch.object(main, "start", lambda _: nullcontext(world))
    argv = mock.patch("sys.argv", [f"{name}.py", *arguments])
    with chdir(folder), mock.patch.dict(os.environ, here), argv, joined:
        main.main()
