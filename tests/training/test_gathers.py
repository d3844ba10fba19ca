"""How often FSDP gathers a unit's weights from all ranks, and that it holds on to none of them."""

from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nanomed.model.decoder import Aquila
from tests.training.test_exactness import loader_of, next_token_loss, settings, sharded

# Torch 2.13 has another name for it.
GATHER = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))


def gathers(world, config) -> dict[str, int]:
    """By all ranks for one row: of a forward and a backward, of a forward alone, of both again;
    and how many parameters a rank still has whole."""
    model, found = sharded(world, config), {}
    (row,) = loader_of(world, 2, settings(batch_size=2)).step(0)
    calls = mock.Mock(side_effect=getattr(dist, GATHER))

    def counted(name: str) -> None:
        found[name] = calls.call_count
        found[f"whole after {name}"] = sum(not isinstance(p, DTensor) for p in model.parameters())
        calls.reset_mock()

    with mock.patch.object(dist, GATHER, calls):
        for name in ("training", "first after validation", "training again"):
            next_token_loss(model(row), row)[0].backward()
            counted(name)
            if name == "training":
                with torch.no_grad():
                    model(row)
                counted("validation")
    return found


def test_a_row_gathers_each_unit_no_more_than_it_must(pool, small):
    """Forward needs all units. Backward begins with what forward ended with, the last layer, the
    norm and the head, and needs no embedding; a forward alone leaves nothing behind."""
    units = len(Aquila(small).layers) + 3  # embedding, layers, norm, head
    for found in pool(2, gathers, small):
        assert found.pop("training") == found.pop("training again") == 2 * units - 4
        assert found.pop("first after validation") <= 2 * units  # FSDP prefetches one too many
        assert found.pop("validation") == units
        assert set(found.values()) == {0}, found
