import itertools

import pytest
import torch

from nanomed.config import CPT, OPTIMIZER_BYTES, SFT
from nanomed.distributed import full
from nanomed.model.decoder import Aquila
from nanomed.run.log import Meter
from nanomed.training.optim import adamw, lr_at
from nanomed.training.step import train_step
from tests.training.test_exactness import loader_of, next_token_loss, settings, sharded


def test_lr_rises_to_the_peak_and_falls_to_the_minimum():
    """A function of the step alone; the peak at the warm-up's end, the minimum one
    step after the last. Nothing of accumulation or world size enters."""
    c = SFT(lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.25)
    lrs = [lr_at(c, k, 100) for k in range(100)]
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
        first, c = round(warmup * 100), SFT(lr=2.0, warmup_ratio=warmup, min_lr_ratio=least)
        theirs = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, first, 100, min_lr_rate=least
        )
        for step in range(100):
            if step >= first:
                wanted = pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
                assert lr_at(c, step, 100) == wanted
            optimizer.step()
            theirs.step()


def test_the_papers_warm_up():
    """CPT stage 1: 5% of 19,073 steps."""
    lrs = [lr_at(CPT(), k, 19_073) for k in (952, 953, 954, 955)]
    assert lrs[0] < lrs[1] == lrs[2] == 1e-4 > lrs[3]


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
def test_short_runs_have_a_usable_rate(n_steps, warmup):
    """No step has the rate 0, at which it would train nothing: not the only one of a run, nor the
    last of a cosine that ends at 0."""
    for least in (0.0, 0.1):
        c = SFT(lr=1.0, warmup_ratio=warmup, min_lr_ratio=least)
        lrs = [lr_at(c, k, n_steps) for k in range(n_steps)]
        assert all(max(0.04, least) < lr <= 1.0 for lr in lrs) and max(lrs) == 1.0


def test_decay_on_matrices_only(small):
    model = Aquila(small)
    decayed, plain = adamw(model, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") for p in decayed["params"])


def test_a_groups_rate_is_its_share_of_the_steps(world, small):
    """A group at half the rate moves half as far in Adam's first step, whose size is the rate."""
    c, moved = settings(batch_size=8), []
    for scale in (1.0, 0.5):
        model = sharded(world, small)
        optimizer = adamw(model, 0.0)
        before = {name: full(p.detach()).clone() for name, p in model.named_parameters()}
        optimizer.param_groups[0]["lr_scale"] = scale
        loader = loader_of(world, 40, c)
        train_step(c, model, optimizer, loader, next_token_loss, 0, 1e-3, Meter(small, 1))
        moved.append({n: full(p.detach()) - before[n] for n, p in model.named_parameters()})
    for name, whole in moved[0].items():
        share = 1.0 if "norm" in name or "bias" in name else 0.5
        assert torch.allclose(moved[1][name], share * whole, atol=1e-6), name


def test_what_the_optimizer_keeps_is_what_is_counted(small):
    """Memory, checkpoints and dry runs count OPTIMIZER_BYTES for each parameter."""
    model = Aquila(small)
    optimizer = adamw(model, 0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 1]
    assert sum(x.nbytes for x in kept) == OPTIMIZER_BYTES * small.n_params()
