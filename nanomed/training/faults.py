"""What a run does when something goes wrong in a step or somebody wants it to end."""

import os
import signal
import statistics
import time
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from nanomed.batches.loader import DataSet, Loader
from nanomed.batches.packing import Row
from nanomed.distributed import from_all, sum_over_ranks
from nanomed.model.decoder import Scores
from nanomed.processes import rank_from_env
from nanomed.run import checkpoint
from nanomed.run.log import RunFolder
from nanomed.training.step import Loss, Step

# Seconds in which a second signal is the first one's echo: on Ctrl-C a worker gets one from the
# terminal and one from torchrun.
ECHO = 1.0
SAID = b"\nending: this step is finished, then all is saved; a second signal waits for nothing\n"
MOST_NAMED = 100  # documents of a slice, beside its first: a batch of them stays a file to read


class Stopped(Exception):
    """A validation was given up, on all ranks, because one of them was asked to end."""


class Signals:
    """While it is open, SIGTERM, Ctrl-C and a terminal that closes (SIGHUP) set `received`; a
    second one ends the process."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.received, self.since = 0, 0.0

    def __enter__(self) -> "Signals":
        # What nohup has said to ignore stays ignored. Not so under torchrun: it heeds SIGHUP in any
        # case, hands it on, and kills who has not ended soon.
        passed_on = "TORCHELASTIC_RUN_ID" in os.environ
        heeded = [n for n in self.NUMBERS if passed_on or signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received and time.monotonic() - self.since > ECHO:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = number, time.monotonic()
            if rank_from_env()[0] == 0:
                with suppress(OSError):  # the screen may be gone: RunFolder.print
                    os.write(2, SAID)  # print may be at work just now

    def heeded_in(self, loss: Loss) -> Loss:
        """A validation's loss that raises Stopped at the first row before which some rank has
        received a signal."""

        def heeding(scores: Scores, row: Row) -> tuple[Tensor, dict]:
            asked = torch.full((), float(self.received > 0), device=row.tokens.device)
            if sum_over_ranks(asked) > 0:
                raise Stopped
            return loss(scores, row)

        return heeding


class Spikes:
    """Tells a loss that stands out from the last `n`: over the median by more than `times` robust
    standard deviations (1.4826 median absolute deviations are one of a normal distribution)."""

    def __init__(self, n: int = 32, times: float = 8.0):
        self.last: deque[float] = deque(maxlen=n)
        self.times = times

    def is_spike(self, loss: float) -> bool:
        spike = False
        if len(self.last) == self.last.maxlen:
            middle = statistics.median(self.last)
            deviation = 1.4826 * statistics.median(abs(x - middle) for x in self.last)
            spike = loss > middle + self.times * deviation
        self.last.append(loss)
        return spike


def note_spike(run: RunFolder, loader: Loader, step: int, loss: float) -> None:
    said = f"loss spike at step {step + 1}: {loss:.4f}, far above the steps before it"
    run.print(f"WARNING: {said}; the run goes on, spikes.jsonl has its records")
    records = _records(loader, loader.examples(step).tolist())
    run.append("spikes.jsonl", {"step": step + 1, "loss": loss, "records": records})


def note_bad(run: RunFolder, loader: Loader, step: int, lr: float, result: Step) -> None:
    """Writes down what nanomed.tools.replay needs to run a skipped step again: numbers, no text.
    All ranks call it."""
    # A pair has two segments and a slice many; each example is named once.
    mine = [(list(dict.fromkeys(i.tolist())), loss.item()) for i, loss in result.rows]
    rows = [
        {
            "rank": rank,
            "loss": checkpoint.number(loss),
            "examples": [i for i in examples if i >= 0],
            "records": _records(loader, [i for i in examples if i >= 0]),
        }
        for rank, rows in enumerate(from_all(mine))
        for examples, loss in rows
    ]
    newest = checkpoint.newest(run.checkpoints) if run.world.is_main else None
    facts = {
        "step": step + 1,
        "lr": lr,
        "loss": checkpoint.number(result.loss),
        "grad_norm": checkpoint.number(result.grad_norm),
        "grad_norms": {layer: checkpoint.number(norm) for layer, norm in result.layers.items()},
        "checkpoint": newest.name if newest else None,  # the last before the step
        "store": str(loader.data.folder.resolve()) if hasattr(loader.data, "folder") else None,
        "rows": rows,
    }
    path = f"bad_batches/step-{step + 1:06d}.json"
    run.print(
        f"WARNING: step {step + 1} is skipped on all ranks: loss {result.loss}, gradient norm "
        f"{result.grad_norm}. To see why: python -m nanomed.tools.replay {run.path / path}"
    )
    try:
        run.write_json(path, facts)
    except OSError as error:
        run.print(f"WARNING: {path} could not be written: {error.strerror}")


def _records(loader: Loader, examples: list[int]) -> list[dict]:
    """Where each example stands. Of a slice that is its first document; the others are `more`."""
    return [_record(loader.data, i) for i in examples]


def _record(data: DataSet, i: int) -> dict:
    first, *more = data.documents_in(i) if hasattr(data, "documents_in") else [data.where(i)]
    found = {"file": first[0], "record": first[1]}
    if more:
        found["more"] = [{"file": file, "record": record} for file, record in more[:MOST_NAMED]]
    if not_named := len(more[MOST_NAMED:]):
        found["not_named"] = not_named
    return found
