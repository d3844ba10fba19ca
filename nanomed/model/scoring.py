"""Log-probabilities of continuations, with no token computed twice where it can be avoided.

A request is a few inputs and the places in them where a continuation's tokens come next. What is
saved: inputs that are equal or begin another one run once (so four letters of one token each need
one forward), the beginning that many requests share (a task's description and shots, a prompt's
instructions) runs once, rows are packed without padding, and the head runs only at places that are
asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from nanomed.batches.packing import row_from
from nanomed.distributed import World, from_all
from nanomed.model.cache import SharedPrefix
from nanomed.model.decoder import Aquila

SHORTEST_SHARED = 8  # tokens; a shorter common beginning is not worth a mask

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """One request as token ids."""

    inputs: list[Ids]  # distinct, and none begins another
    reads: list[list[tuple[int, int, int]]]  # (input, place, next token) by continuation
    truncated: int  # tokens that were cut off on the left, at most

    @property
    def n_tokens(self) -> list[int]:
        """Of each continuation."""
        return [len(read) for read in self.reads]


@dataclass(frozen=True)
class Plan:
    """How requests are packed: a function of them and of the capacity alone."""

    prefix: Ids  # what most of the inputs begin with, computed once
    rows: list[range]  # the requests of each row


def plan(requests: Sequence[Encoded], capacity: int) -> Plan:
    """Rows of at most `capacity` tokens, of requests in their order; one that is longer has a row
    of its own. Requests that were cut on the left do not share the others' beginning, nor a row."""
    prefix = _shared([r for r in requests if r.truncated <= 0])
    rows, start, used = [], 0, 0
    for i, request in enumerate(requests):
        n = sum(len(ids) - len(prefix) * (request.truncated <= 0) for ids in request.inputs)
        same = (request.truncated <= 0) == (requests[start].truncated <= 0)
        if i > start and (used + n > capacity or not same):
            rows.append(range(start, i))
            start, used = i, 0
        used += n
    return Plan(prefix, [*rows, range(start, len(requests))])


def in_order(lengths: Sequence[int], capacity: int) -> list[range]:
    """Rows of at most `capacity` tokens, of segments in their order; a longer one has its own."""
    borders, used = [0], 0
    for i, length in enumerate(lengths):
        if i > borders[-1] and used + length > capacity:
            borders.append(i)
            used = 0
        used += length
    return [range(a, b) for a, b in pairwise([*borders, len(lengths)])] if lengths else []


def _shared(requests: Sequence[Encoded]) -> Ids:
    """The longest beginning of all inputs that ends before the first place that is read."""
    inputs = [ids for request in requests for ids in request.inputs]
    if len(inputs) < 2:
        return ()
    first, last = min(inputs), max(inputs)
    room = min(place for request in requests for read in request.reads for _, place, _ in read)
    n = next((i for i in range(room) if first[i] != last[i]), room)
    return first[:n] if n >= SHORTEST_SHARED else ()


class Scorer:
    """Scores the rows of a plan with one model, a whole copy of which every rank has."""

    def __init__(self, model: Aquila, world: World):
        self.model, self.world = model, world

    @torch.no_grad()
    def run(
        self, requests: Sequence[Encoded], plan: Plan, first_row: int = 0
    ) -> Iterator[list[list[float]]]:
        """The log-probabilities, in nats, of each continuation of a row's requests; row after row
        from `first_row` on, on every rank. Row r is computed by rank r % size."""
        cache = None
        for start in range(first_row, len(plan.rows), self.world.size):
            mine, scores = start + self.world.rank, None
            if mine < len(plan.rows):
                members = [requests[i] for i in plan.rows[mine]]
                follows = plan.prefix and members[0].truncated <= 0
                if follows and cache is None:
                    cache = self._cache_of(plan.prefix)
                scores = self._row(members, len(plan.prefix), cache if follows else None)
            yield from (row for row in from_all(scores) if row is not None)

    def _cache_of(self, prefix: Ids) -> list[SharedPrefix]:
        cache = [SharedPrefix() for _ in self.model.layers]
        row = replace(row_from([prefix]), labels=torch.tensor([-100]), scored=None)
        self.model(row.to(self.world.device), cache=cache, at=torch.tensor([0]))
        return cache

    def _row(
        self, requests: Sequence[Encoded], n_shared: int, cache: list[SharedPrefix] | None
    ) -> list[list[float]]:
        n_before = n_shared if cache else 0
        segments, at, labels, start = [], [], [], 0
        for request in requests:
            starts = []
            for ids in request.inputs:
                starts.append(start)
                segments.append(ids[n_before:])
                start += len(segments[-1])
            for which, place, token in (read for reads in request.reads for read in reads):
                at.append(starts[which] + place - n_before)
                labels.append(token)
        row = replace(row_from(segments), labels=torch.tensor(labels), scored=None)
        row.positions += n_before
        places = torch.tensor(at, device=self.world.device)
        nll = self.model(row.to(self.world.device), cache=cache, at=places).nll
        logps = iter((-nll.cpu()).tolist())
        return [[sum(next(logps) for _ in read) for read in r.reads] for r in requests]
