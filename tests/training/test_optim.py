import itertools
import math

import pytest

from nanomed.model.decoder import Aquila
from nanomed.training.optim import adamw, lr_at


def test_lr_rises_to_the_peak_and_falls_to_the_minimum():
    """pitfalls 27: a function of the step alone; the peak at the warm-up's end, the minimum at
    the last step. Nothing of accumulation or world size enters."""
    lrs = [lr_at(k, 100, 2.0, 0.1, 0.25) for k in range(100)]
    assert lrs[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert max(lrs) == lrs[9] == 2.0
    assert lrs[99] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(lrs[9:]))
    assert lrs[54] == pytest.approx((2.0 + 0.5) / 2)  # halfway down the cosine


def test_the_papers_warm_up():
    """CPT stage 1: 5% of 19,073 steps."""
    lrs = [lr_at(k, 19_073, 1e-4, 0.05, 0.0) for k in (952, 953, 954)]
    assert lrs[1] == 1e-4 and lrs[0] < lrs[1] > lrs[2]


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_short_runs_have_a_usable_rate(n_steps, warmup):
    lrs = [lr_at(k, n_steps, 1.0, warmup, 0.1) for k in range(n_steps)]
    assert all(math.isfinite(lr) and 0.1 - 1e-9 <= lr <= 1.0 for lr in lrs)


def test_decay_on_matrices_only(small):
    model = Aquila(small)
    decayed, plain = adamw(model, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") for p in decayed["params"])
