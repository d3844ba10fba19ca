"""Multiple choice beside lm-eval's hf backend: items per second over real test files.

    python -m bench.evals --model FOLDER --real FOLDER --python ENV/bin/python [--items 16]

--python has lm-eval 0.4.13. Both sides encode and score the same requests, in float32, in processes
of one thread that are started once and then take turns. lm-eval does not share items among
processes on a CPU: of two, each gets every second item, and that counts as its best. Seconds are
the processor's, of the slowest process; the ratio by the clock stands beside them.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import ROOT, Results, quartiles, ratio, show
from bench.setting import flags
from nanomed.distributed import alone_or_start
from nanomed.evals.requests import requests_of
from nanomed.evals.score import bos_of, encode
from nanomed.evals.tasks import tasks
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer, plan
from tests.evals.downloaded import WORKER, write_downloaded

TASKS = ("mmlu_anatomy", "medmcqa")  # its shots are all items' own, or drawn for each


def work(folder: Path, data: Path) -> None:
    """Our side's process: answers lines as tests/evals/lm_eval_worker.py does."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    tokenizer = pretrained.tokenizer_of(folder, "")
    bos, longest = bos_of(tokenizer, "auto"), pretrained.config_of(folder).max_seq_len
    model = pretrained.load(folder, device, torch.float32)
    pack_linears(model)
    with alone_or_start(device) as world:
        for line in sys.stdin:
            asked = json.loads(line)
            ((name, chosen),) = asked["samples"].items()
            requests, _ = requests_of(tasks()[name], data, asked["shots"])
            clock, cpu = time.perf_counter(), time.process_time()
            encoded = [encode(requests[i], tokenizer, bos, longest) for i in chosen]
            # As small as lets every rank have a row.
            capacity = min(4096, sum(len(r.inputs[0]) for r in encoded) // world.size)
            rows = [*Scorer(model, world).run(encoded, plan(encoded, capacity))]
            seconds = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
            items = {name: [{"logprobs": logps} for row in rows for logps in row]}
            print(json.dumps(seconds | {"items": items}), flush=True)


class Side:
    """Processes of one side, which wait for work."""

    def __init__(self, command: list[str], n: int, shares: bool):
        """shares: they are ranks, and each is told of all items."""
        self.n, self.shares, self.workers = n, shares, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(n):
            env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            if shares and n > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
            how["stderr"] = None if shares else subprocess.DEVNULL
            self.workers.append(subprocess.Popen(command, **how))

    def turn(self, task: str, n_items: int, shots: int, batch: int) -> tuple[float, float, list]:
        """(processor's seconds, the clock's, log-probabilities by item)"""
        step = 1 if self.shares else self.n
        parts = [range(i % step, n_items, step) for i in range(self.n)]
        for worker, part in zip(self.workers, parts, strict=True):
            asked = {"samples": {task: list(part)}, "shots": shots, "batch": batch}
            print(json.dumps(asked), file=worker.stdin, flush=True)
        replies = [json.loads(worker.stdout.readline()) for worker in self.workers]
        found = {}
        for part, reply in zip(parts, replies, strict=True):
            found |= dict(zip(part, reply["items"][task], strict=True))
        cpu, clock = (max(reply[name] for reply in replies) for name in ("cpu", "seconds"))
        return cpu, clock, [found[i]["logprobs"] for i in range(n_items)]

    def close(self) -> None:
        for worker in self.workers:
            worker.stdin.close()
            worker.wait()


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(*map(Path, sys.argv[2:4]))
    parser = flags(__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--real", type=Path, help="the benchmarks' own files")
    parser.add_argument("--python", help="one that has lm-eval 0.4.13")
    parser.add_argument("--items", type=int, default=16, help="of each task")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    c = parser.parse_args()
    rounds, batches = (1, [1]) if c.quick else (3, [1, 8])  # batches: that lm-eval tries
    results, model = Results(c.results), str(c.model.resolve())
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        sizes = {task: write_downloaded(task, c.real, data, c.items)[0] for task in TASKS}
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for n in c.processes:
            ours = Side([sys.executable, "-m", "bench.evals", "--work", model, folder], n, True)
            theirs = Side([c.python, WORKER, model, folder], n, False)
            for asked in ((task, size, shots) for task, size in sizes.items() for shots in (0, 3)):
                beside(results, ours, theirs, asked, batches, rounds)
            ours.close()
            theirs.close()


def beside(
    results: Results, ours: Side, theirs: Side, asked: tuple, batches: list[int], rounds: int
) -> None:
    """One row for each side: lm-eval's with the batch size that was best when each was tried."""
    task, n_items, shots = asked
    best = min(batches, key=lambda batch: theirs.turn(*asked, batch)[0])
    mine, again, other = [], [], []
    for _ in range(rounds):
        mine.append(ours.turn(*asked, 0))
        other.append(theirs.turn(*asked, best))
        again.append(ours.turn(*asked, 0))
    pairs = zip(mine[0][2], other[0][2], strict=True)
    worst = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    cpu, clock = (ratio(*([turn[i] for turn in s] for s in (other, mine, again))) for i in (0, 1))
    faster = {"nanomed_is_faster_by": str(cpu), "by_the_clock": str(clock)}
    for name, turns, more in (("nanomed", mine, {}), (f"lm-eval, batch {best}", other, faster)):
        seconds = [turn[0] for turn in turns]
        results.add(
            "evals", f"{task}: {name}", seconds, dtype=torch.float32,
            shapes={"items": n_items, "shots": shots, "processes": ours.n},
            items_per_s=n_items / quartiles(seconds)[1], **more, largest_difference=f"{worst:.1e}",
        )  # fmt: skip
    show(results.lines[-2:])


if __name__ == "__main__":
    main()
