"""A beginning that is computed once for many segments, and scores asked for at some places only."""

import pytest
import torch

from nanomed.batches.packing import row_from
from nanomed.model.cache import SharedPrefix
from nanomed.model.decoder import Aquila

BEGINNING = list(range(3, 40))
ENDS = [[5, 6, 7, 8], [9], list(range(60, 90))]


@pytest.fixture(scope="module")
def model(small):
    model = Aquila(small).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.2)
    return model


def ends_row(offset: int):
    row = row_from(ENDS)
    row.positions += offset
    return row


@torch.no_grad()
def after(model, cache, row) -> torch.Tensor:
    model(row_from([BEGINNING]), cache=cache)
    return model(row, logits=True, cache=cache)


@torch.no_grad()
def test_segments_after_a_shared_beginning_are_as_if_each_had_its_own(model):
    cache = [SharedPrefix() for _ in model.layers]
    logits = after(model, cache, ends_row(len(BEGINNING)))
    whole = model(row_from([BEGINNING + end for end in ENDS]), logits=True)
    wanted = torch.cat(
        [part[len(BEGINNING) :] for part in whole.split([37 + len(e) for e in ENDS])]
    )
    assert torch.allclose(logits, wanted, atol=1e-5)
    again = model(ends_row(len(BEGINNING)), logits=True, cache=cache)  # the beginning stays
    assert torch.equal(again, logits)


@torch.no_grad()
def test_a_beginning_at_the_wrong_positions_is_noticed(model):
    cache = [SharedPrefix() for _ in model.layers]
    right = after(model, [SharedPrefix() for _ in model.layers], ends_row(len(BEGINNING)))
    assert not torch.allclose(after(model, cache, ends_row(0)), right, atol=1e-3)


@torch.no_grad()
def test_places_are_scored_as_often_as_they_are_asked_for(model):
    row = row_from([BEGINNING, ENDS[2]])
    at, labels = torch.tensor([3, 3, 36, 66]), torch.tensor([50, 4, 7, 96])
    logps = model(row, logits=True).log_softmax(-1)
    row.labels, row.scored = labels, None
    assert torch.allclose(model(row, at=at).nll, -logps[at, labels], atol=1e-5)
