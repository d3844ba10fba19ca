"""Who runs the tasks of a build: processes of this machine, ranks of a launcher, or a Ray cluster.

A task is a function of a number: task(i) writes files and returns what its mark is to say. The mark
(FOLDER/00017.done.json) comes last, so what has its mark is whole, and what has none is done again.
Tasks depend on nothing but their number and on files of tasks before them: whoever runs them, how
many at a time, and after whatever kills, the files are the same byte for byte.
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanomed.build.files import make_private, whole
from nanomed.config import InputError
from nanomed.processes import end_with, end_with_torchrun, n_cores

Task = Callable[[int], dict[str, Any]]
ENGINES = ("auto", "local", "ranks", "ray")
AHEAD = 2  # tasks handed over for each worker: millions are not submitted at once
PATIENCE = 60.0  # seconds between two lines on what other ranks have not finished


class Runner:
    """engine: `local`, processes of this machine; `ranks`, this process takes its share, as RANK
    and WORLD_SIZE (torchrun) or a Slurm array's variables say; `ray`. auto: ranks where a launcher
    has set these, else local. workers: how many at once, 0 for one per core."""

    def __init__(self, engine: str = "auto", workers: int = 0):
        self.rank, self.n_ranks = _place()
        if engine == "auto":
            engine = "ranks" if self.n_ranks > 1 else "local"
        self.engine, self.workers = engine, workers or n_cores()
        self._pool: ProcessPoolExecutor | None = None
        end_with_torchrun()

    @property
    def is_main(self) -> bool:
        return self.engine != "ranks" or self.rank == 0

    def run(self, folder: Path, task: Task, n: int) -> list[dict[str, Any]]:
        """What the marks of task(0) to task(n - 1) say; those without one are run first. Raises
        what a task raises, at the first that does, and InputError if a worker dies."""
        make_private(folder)
        todo = [i for i in range(n) if not mark(folder, i).exists()]
        if self.engine == "ranks":
            for i in todo:
                if i % self.n_ranks == self.rank:
                    _one(task, folder, i)
            self._wait_for_others(folder, todo)
        elif len(todo) == 1 or (self.engine == "local" and self.workers == 1):
            for i in todo:
                _one(task, folder, i)
        elif todo:
            self._submit(task, folder, todo)
        return [json.loads(mark(folder, i).read_text("utf-8")) for i in range(n)]

    def _submit(self, task: Task, folder: Path, todo: list[int]) -> None:
        start, finished = self._ray() if self.engine == "ray" else self._local()
        waiting, most = set(), AHEAD * self.workers
        with tqdm(total=len(todo), desc=folder.name, unit="task", disable=None) as bar:
            for k, i in enumerate(todo, 1):
                waiting.add(start(task, folder, i))
                while len(waiting) == most or (k == len(todo) and waiting):
                    done = finished(waiting)
                    waiting -= done
                    bar.update(len(done))

    def _local(self) -> tuple[Callable, Callable]:
        if self._pool is None:
            # Spawned: a fork would copy this process's threads and locks.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, context, _begin, (os.getpid(),))

        def finished(waiting: set[Future]) -> set[Future]:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            try:
                for future in done:
                    future.result()
            except BrokenProcessPool:
                raise InputError(
                    "a worker was killed, often for lack of memory (--workers starts fewer); what "
                    "is finished is kept, the same command goes on"
                ) from None
            return done

        return lambda *what: self._pool.submit(_one, *what), finished

    def _ray(self) -> tuple[Callable, Callable]:
        try:
            import ray
        except ImportError:
            raise InputError('--engine ray: pip install "ray[default]"') from None
        if not ray.is_initialized():
            root = str(Path(__file__).parents[2])  # the same path on every node
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": root}}, log_to_driver=False)
        self.workers = int(ray.cluster_resources().get("CPU", 1))
        submit = ray.remote(_one).options(max_retries=3).remote

        def finished(waiting: set) -> set:
            done, _ = ray.wait(list(waiting))
            ray.get(done)
            return set(done)

        return submit, finished

    def _wait_for_others(self, folder: Path, todo: list[int]) -> None:
        said = time.monotonic()
        while todo := [i for i in todo if not mark(folder, i).exists()]:
            time.sleep(0.1)
            if time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                ranks = sorted({i % self.n_ranks for i in todo})
                said_of = f"{len(todo):,} tasks of ranks {ranks[:20]}"
                print(f"{folder}: waiting for {said_of}", flush=True)  # a log is a pipe

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def mark(folder: Path, i: int) -> Path:
    return folder / f"{i:05d}.done.json"


def _one(task: Task, folder: Path, i: int) -> None:
    said = task(i)
    with whole(mark(folder, i)) as file:
        file.write(json.dumps(said, ensure_ascii=False).encode())


def script(main: Callable[[], None]) -> None:
    """Runs a build's main: bad input, a full disk and Ctrl-C are one line each, no traceback."""
    said = "what is finished is kept; the same command goes on"
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error.strerror}; {said}")
    except KeyboardInterrupt:
        if _place()[0] == 0:
            print(f"\nended by Ctrl-C; {said}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _begin(parent: int) -> None:
    """A worker: Ctrl-C ends the parent, which lets it finish its task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)


def _place() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher says."""
    env = os.environ
    if "SLURM_ARRAY_TASK_ID" in env:
        mine, first, count, step = (
            int(env.get(f"SLURM_ARRAY_TASK_{name}", 1)) for name in ("ID", "MIN", "COUNT", "STEP")
        )
        return (mine - first) // step, count
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
