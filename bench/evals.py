"""Multiple choice beside lm-eval's hf backend: items per second over real test files.

    python -m bench.evals --model FOLDER --real FOLDER --python ENV/bin/python [--items 16]

--python has lm-eval 0.4.13. Both sides encode and score the same requests, in float32, in processes
of one thread that are started once and then take turns. lm-eval does not share items among
processes on a CPU: of two, each gets every second item, and that counts as its best. Seconds are
the processor's, of the slowest process; the ratio by the clock stands beside them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import ROOT, Results, ratio, table
from nanomed.distributed import alone_or_start
from nanomed.evals.items import Item, Layout, load
from nanomed.evals.requests import requests_of
from nanomed.evals.score import bos_of, encode
from nanomed.evals.tasks import tasks
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer, plan

TASKS = ("mmlu_anatomy", "medmcqa")  # its shots are all items' own, or drawn for each


def write_downloaded(name: str, data: Path, out: Path, limit: int = 0) -> tuple[int, int]:
    """A task's items and the pool of its shots, from the benchmark's own files into the layout that
    lm-eval asks for; with a limit about as many items, evenly spread over the file. Returns their
    number, and of all."""
    task = tasks()[name]
    layout = task.layouts[0]
    folder = out / layout.place.format(subject=task.subject)
    folder.mkdir(parents=True)
    for split in (task.pool, task.split):
        items = load(task.layouts[1:], data, task.subject, split).items
        step = max(1, len(items) // limit) if limit and split == task.split else 1
        lines = [json.dumps(_record(layout, item)) for item in items[::step]]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return len(lines), len(items)


def _record(layout: Layout, item: Item) -> dict:
    exam = item.exam
    number = list(exam.options).index(exam.answers)
    if layout.reader == "pubmedqa":
        contexts = {"CONTEXTS": exam.context.split("\n")}
        return {"QUESTION": exam.question, **contexts, "final_decision": exam.options[exam.answers]}
    key = exam.answers if layout.first is None else number + layout.first
    record = {layout.question: exam.question, layout.key: key}
    if isinstance(layout.options, str):
        return record | {layout.options: list(exam.options.values()), "subject": ""}
    return record | dict(zip(layout.options, exam.options.values(), strict=True))


def work(folder: Path, data: Path) -> None:
    """Our side's process: answers lines as bench/lm_eval_worker.py does."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    tokenizer = pretrained.tokenizer_of(folder, "")
    bos, longest = bos_of(folder, tokenizer, "auto"), pretrained.config_of(folder).max_seq_len
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
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            quiet = subprocess.DEVNULL if not shares else None
            self.workers.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=quiet, **pipes))

    def turn(self, task: str, n_items: int, shots: int, batch: int) -> tuple[float, float, list]:
        """(processor's seconds, the clock's, log-probabilities by item)"""
        parts = [
            range(n_items) if self.shares else range(i, n_items, self.n) for i in range(self.n)
        ]
        for worker, part in zip(self.workers, parts, strict=True):
            asked = {"samples": {task: list(part)}, "shots": shots, "batch": batch}
            worker.stdin.write(json.dumps(asked) + "\n")
            worker.stdin.flush()
        replies = [json.loads(worker.stdout.readline()) for worker in self.workers]
        found = {}
        for part, reply in zip(parts, replies, strict=True):
            found |= dict(zip(part, reply["items"][task], strict=True))
        cpu, clock = (max(reply[name] for reply in replies) for name in ("cpu", "seconds"))
        return cpu, clock, [found[i]["logprobs"] for i in range(n_items)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--real", type=Path, help="the benchmarks' own files")
    parser.add_argument("--python", help="one that has lm-eval 0.4.13")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--items", type=int, default=16, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="that lm-eval tries")
    parser.add_argument("--results", default="runs/bench.jsonl", help="JSON lines to append to")
    c = parser.parse_args()
    if c.work:
        return work(*c.work)
    results = Results(c.results)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        sizes = {task: write_downloaded(task, c.real, data, c.items)[0] for task in c.tasks}
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        for n in c.processes:
            model = str(c.model.resolve())
            ours = Side([sys.executable, "-m", "bench.evals", "--work", model, folder], n, True)
            worker = str(ROOT / "bench/lm_eval_worker.py")
            theirs = Side([c.python, "-P", worker, model, folder], n, False)
            for task, n_items in sizes.items():
                for shots in (0, 3):
                    beside(results, ours, theirs, (task, n_items, shots), c)
            for process in ours.workers + theirs.workers:
                process.stdin.close()
                process.wait()


def beside(results: Results, ours: Side, theirs: Side, asked: tuple, c) -> None:
    """One row for each side: lm-eval's with the batch size that was best when each was tried."""
    task, n_items, shots = asked
    tried = {batch: theirs.turn(*asked, batch)[0] for batch in c.batches}
    best = min(tried, key=tried.get)
    mine, again, other = [], [], []
    for _ in range(c.rounds):
        mine.append(ours.turn(*asked, 0))
        other.append(theirs.turn(*asked, best))
        again.append(ours.turn(*asked, 0))
    pairs = zip(mine[0][2], other[0][2], strict=True)
    worst = max(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))
    cpu, clock = (ratio(*([turn[i] for turn in s] for s in (other, mine, again))) for i in (0, 1))
    shapes = {"items": n_items, "shots": shots, "processes": ours.n}
    lines = []
    for name, turns, facts in (
        ("nanomed", mine, {}),
        (
            f"lm-eval, batch {best}",
            other,
            {"nanomed_is_faster_by": str(cpu), "by_the_clock": str(clock)},
        ),
    ):
        seconds = [turn[0] for turn in turns]
        rate = n_items / sorted(seconds)[len(seconds) // 2]
        facts = {"items_per_s": rate, **facts, "largest_difference": f"{worst:.1e}"}
        named = {"shapes": shapes, "dtype": torch.float32}
        lines.append(results.add("evals", f"{task}: {name}", seconds, **named, **facts))
    print(table([line["shapes"] | {"name": line["name"], **line["facts"]} for line in lines]))


if __name__ == "__main__":
    main()
