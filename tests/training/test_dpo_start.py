"""The check before DPO's first step: policy and reference are the same."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nanomed.config import InputError
from nanomed.model.decoder import init_weights
from nanomed.training.reference import ROUNDING, check_start, reference_logps
from tests.training.test_dpo import fresh_run, loader_of, loss_of


def test_the_run_starts_at_ln_2(world, small, tmp_path):
    """And does not start elsewhere, for example with dropout or other weights."""
    c, model, run, loader = fresh_run(world, small, tmp_path)
    reference = reference_logps(model, loader, run, torch.float32)
    check_start(model, loader, loss_of(reference, c), c.beta, True, run)
    with pytest.raises(InputError, match=r"does not start at ln 2.*margin"):
        check_start(model, loader, loss_of(reference + 0.1 * reference.sin(), c), c.beta, True, run)
    for layer in model.layers:
        layer.dropout.p = 0.5
    init_weights(model, seed=0)
    with torch.no_grad():  # large weights, so that dropout is felt
        for p in model.parameters():
            p.mul_(3)
    reference = reference_logps(model, loader, run, torch.float32)
    with pytest.raises(InputError, match="Policy and reference differ"):
        check_start(model, loader, loss_of(reference, c), c.beta, True, run)
    run.close()


@torch.no_grad()
def test_in_bfloat16_it_starts_near_ln_2_at_any_packing(world, small, tmp_path, monkeypatch):
    """Rows of other lengths, and matmuls that add in another order than the reference's, round
    otherwise: the loss of every row stays within 1e-2 of ln 2, even where a nat of difference
    counts fully. A nll that is rounded to bfloat16 is seen: it is about ln 97 = 4.6, where
    neighbours are 2^-5 apart, so it is 2^-6 / sqrt(3) = 9e-3 off in the root mean square, and the
    loss of a pair of 30 learned tokens sqrt(30) / 2 times as much, 2.5e-2."""
    c, model, run, loader = fresh_run(world, small, tmp_path, dtype=torch.bfloat16)
    c, random = dataclasses.replace(c, beta=1.0), torch.Generator().manual_seed(0)

    def to_either_neighbour(x, weight, bias=None):
        """Rounds at random, up as likely as the number is near: no CPU differs more from another
        by the order in which it adds."""
        bits = (x.float() @ weight.float().T + (0 if bias is None else bias)).view(torch.int32)
        bits += torch.randint(2**16, bits.shape, generator=random, dtype=torch.int32)
        return (bits & -(2**16)).view(torch.float32).bfloat16()

    with monkeypatch.context() as other_matmuls:
        other_matmuls.setattr(torch.nn.functional, "linear", to_either_neighbour)
        reference = reference_logps(model, loader, run, torch.float32)
    loss, offs, planted = loss_of(reference, c), [], []
    for micro_tokens in (128, 300, 4096):
        other = loader_of(world, dataclasses.replace(c, micro_tokens=micro_tokens), 24, n_val=6)
        check_start(model, other, loss, c.beta, False, run)
        for row in other.rows(np.arange(30)):
            scores = model(row)
            rounded = scores._replace(nll=scores.nll.bfloat16().float())
            for found, given in ((offs, scores), (planted, rounded)):
                found.append(abs(loss(given, row)[0].item() / len(row.examples) * 2 - math.log(2)))
    assert max(offs) < 1e-2 < max(planted)  # measured: 3e-3 and 3e-2
    run.close()


def test_in_bfloat16_rounding_is_allowed_and_other_weights_are_not(world, small, tmp_path):
    """Rounding as it was measured on a real model, with answers as long as real ones."""
    c, model, run, loader = fresh_run(world, small, tmp_path, dtype=torch.bfloat16)
    c = dataclasses.replace(c, beta=0.5)
    with torch.no_grad():
        for p in model.parameters():  # so that two models differ as trained ones do
            p.mul_(3)
    kept = reference_logps(model, loader, run, torch.float32)
    tokens = torch.tensor([[s.trained.sum() for s in pair] for pair in loader.data])
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(kept.shape, generator=draw) * ROUNDING * tokens.sqrt()
        check_start(model, loader, loss_of(kept + noise, c), c.beta, False, run)
    init_weights(model, seed=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    with pytest.raises(InputError, match="where rounding explains"):
        check_start(model, loader, loss_of(kept, c), c.beta, False, run)
    run.close()
