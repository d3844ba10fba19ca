"""Answers on request: who asks waits in a queue, and one thread runs the model."""

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, stream
from nanomed.text.template import Encoder

HALF = "\ufffd"  # what the decoder writes for a character of which bytes are missing


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by. `tokens` have their log-probabilities, if they were asked for;
    the text of a character's tokens comes with the last of them."""

    text: str = ""
    tokens: Sequence[dict[str, Any]] = ()
    finish: str = ""  # at the end: "stop" or "length"; "error" if the model failed
    n_tokens: int = 0  # at the end: of the answer


@dataclass(eq=False)
class Job:
    prompt: list[int]
    sampling: Sampling
    put: Callable[[Piece], None]  # is called by the model's thread
    number: int = 0  # of the generator that a sampled answer draws from, beside sampling.seed
    stops: Sequence[str] = ()  # texts that end the answer and are no part of it
    top: int | None = None  # how many alternatives each token is shown with; None: no log-probs
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker(threading.Thread):
    """Answers jobs one after another; greedy ones that wait together, and differ in length alone,
    up to batch_size at a time."""

    def __init__(self, model: Aquila, encoder: Encoder, batch_size: int):
        super().__init__(name="answers", daemon=True)
        self.model, self.encoder, self.batch_size = model, encoder, batch_size
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()

    def ask(self, job: Job) -> None:
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()

    def run(self) -> None:
        while True:
            batch = self._next()
            try:
                self._answer(batch)
            except Exception:  # no memory, say: those who asked hear of it, the next ones may fit
                traceback.print_exc()
                for job in batch:
                    with contextlib.suppress(Exception):
                        job.put(Piece(finish="error"))

    def _next(self) -> list[Job]:
        with self.changed:
            self.changed.wait_for(lambda: self.jobs)
            batch = [self.jobs.popleft()]
            if batch[0].sampling.temperature == 0:
                same = [job for job in self.jobs if _kind(job) == _kind(batch[0])]
                batch += same[: self.batch_size - 1]
                self.jobs = deque(job for job in self.jobs if job not in batch)
        return [job for job in batch if not job.cancelled.is_set()]

    def _answer(self, batch: list[Job]) -> None:
        if not batch:
            return
        sampling = replace(batch[0].sampling, max_new=max(j.sampling.max_new for j in batch))
        stop = {self.encoder.turn_end, self.encoder.document_end}
        answers = [Answer(job, self.encoder, stop) for job in batch]
        growing = set(range(len(batch)))
        prompts, first = [job.prompt for job in batch], batch[0].number
        for i, token, logits in stream(self.model, prompts, stop, sampling, first):
            if i in growing and (batch[i].cancelled.is_set() or answers[i].add(token, logits)):
                growing.discard(i)
            if not growing:
                return
        for i in growing:  # the model reads no more
            answers[i].end("length")


def _kind(job: Job) -> Sampling:
    return replace(job.sampling, max_new=1, seed=0)


class Answer:
    """One answer as it grows. A text that may become one of the stops is held back, and so is half
    a character."""

    def __init__(self, job: Job, encoder: Encoder, stop: set[int]):
        self.job, self.decode, self.stop = job, encoder.tokenizer.decode, stop
        self.ids: list[int] = []
        self.text, self.shown = "", 0
        self.waiting: list[tuple[int, dict]] = []  # (where its text begins, a token)

    def add(self, token: int, logits: Tensor) -> bool:  # logits[V]
        """Whether the answer is over."""
        if token in self.stop:
            return self.end("stop")
        self.ids.append(token)
        if self.job.top is not None:
            entry = self._entry(token, logits.float().log_softmax(-1))
            self.waiting.append((len(self.text.rstrip(HALF)), entry))
        self.text = self.decode(self.ids)
        if found := [at for at in map(self.text.find, self.job.stops) if at >= 0]:
            self.text = self.text[: min(found)]
            return self.end("stop")
        if len(self.ids) == self.job.sampling.max_new:
            return self.end("length")
        if not self.text.endswith(HALF):
            self._show(len(self.text) - self._held())
        return False

    def end(self, why: str) -> bool:
        self._show(len(self.text))
        self.job.put(Piece(finish=why, n_tokens=len(self.ids)))
        return True

    def _held(self) -> int:
        """How many characters at the end begin one of the stops."""
        parts = (stop[:k] for stop in self.job.stops for k in range(1, len(stop)))
        return max((len(part) for part in parts if self.text.endswith(part)), default=0)

    def _show(self, until: int) -> None:
        if until <= self.shown:
            return
        tokens = [entry for start, entry in self.waiting if start < until]
        self.waiting = self.waiting[len(tokens) :]
        self.job.put(Piece(self.text[self.shown : until], tokens))
        self.shown = until

    def _entry(self, token: int, logprobs: Tensor) -> dict[str, Any]:
        values, ids = logprobs.topk(self.job.top)
        best = zip(ids.tolist(), values.tolist(), strict=True)
        return self._named(token, logprobs[token].item()) | {
            "top_logprobs": [self._named(i, value) for i, value in best]
        }

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode([token])
        whole = None if HALF in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": whole}
