import itertools

import pytest
import torch

from nanomed.model.decoder import Aquila
from nanomed.training.optim import adamw, lr_at


def test_lr_rises_to_the_peak_and_falls_to_the_minimum():
    """A function of the step alone; the peak at the warm-up's end, the minimum one
    step after the last. Nothing of accumulation or world size enters."""
    lrs = [lr_at(k, 100, 2.0, 0.1, 0.25) for k in range(100)]
    assert lrs[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert max(lrs) == lrs[9] == lrs[10] == 2.0
    assert lrs[99] == pytest.approx(0.5, abs=1e-3) and lrs[99] > 0.5
    assert all(a > b for a, b in itertools.pairwise(lrs[10:]))
    assert lrs[55] == pytest.approx((2.0 + 0.5) / 2)  # halfway down the cosine


def test_after_the_warm_up_it_is_transformers_cosine():
    """Theirs has the rate 0 at its first step of a warm-up, ours one step's share of the peak."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    for warmup, least in ((0.1, 0.25), (0.0, 0.0)):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        first = round(warmup * 100)
        theirs = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, first, 100, min_lr_rate=least
        )
        for step in range(100):
            if step >= first:
                wanted = pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
                assert lr_at(step, 100, 2.0, warmup, least) == wanted
            optimizer.step()
            theirs.step()


def test_the_papers_warm_up():
    """CPT stage 1: 5% of 19,073 steps."""
    lrs = [lr_at(k, 19_073, 1e-4, 0.05, 0.0) for k in (952, 953, 954, 955)]
    assert lrs[0] < lrs[1] == lrs[2] == 1e-4 > lrs[3]


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_short_runs_have_a_usable_rate(n_steps, warmup):
    """No step has the rate 0, at which it would train nothing: not the only one of a run, nor the
    last of a cosine that ends at 0."""
    for least in (0.0, 0.1):
        lrs = [lr_at(k, n_steps, 1.0, warmup, least) for k in range(n_steps)]
        assert all(max(0.04, least) < lr <= 1.0 for lr in lrs) and max(lrs) == 1.0


def test_decay_on_matrices_only(small):
    model = Aquila(small)
    decayed, plain = adamw(model, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") for p in decayed["params"])
