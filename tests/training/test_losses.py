"""The DPO loss as a pure function: hand-worked values, and what it must never do."""

import math

import pytest
import torch
from torch import Tensor

from nanomed.batches.packing import row_from
from nanomed.training.losses import dpo_loss, segment_counts, segment_logps


def tensors(*values: list[float]) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]


def test_hand_worked_values():
    """Chosen gained 2 nats over the reference and rejected lost 3: at beta 0.1 the margin is 0.5,
    so the loss is log(1 + exp(-0.5)). Without any change it is log 2."""
    losses, chosen, rejected = dpo_loss(
        *tensors([-8.0, -1.0], [-13.0, -2.0], [-10.0, -1.0], [-10.0, -2.0]), beta=0.1
    )
    assert chosen.tolist() == pytest.approx([0.2, 0.0])
    assert rejected.tolist() == pytest.approx([-0.3, 0.0])
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(2)])


def test_label_smoothing_mixes_both_directions():
    right, wrong = math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))
    (loss,), _, _ = dpo_loss(*tensors([2.0], [-3.0], [0.0], [0.0]), 0.1, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * right + 0.2 * wrong)


def test_gradients_are_those_of_finite_differences():
    logps = tensors([-8.0, -1.0, 3.0], [-13.0, -2.0, 5.0], [-10.0, -1.0, 0.0], [-9.0, 2.0, 1.0])
    for smoothing in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, 0.3, smoothing)[0], logps)  # noqa: B023


def test_swapping_chosen_and_rejected_negates_the_margin():
    a, b, ra, rb = tensors([-8.0], [-13.0], [-10.0], [-11.0])
    z = lambda out: (out[1] - out[2]).item()  # noqa: E731
    there, back = dpo_loss(a, b, ra, rb, 0.5), dpo_loss(b, a, rb, ra, 0.5)
    assert z(there) == pytest.approx(-z(back)) and z(there) != 0
    assert (back[0] - there[0]).item() == pytest.approx(z(there))  # log-odds


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_far_apart_stays_finite(far):
    logps = [torch.tensor([x], requires_grad=True) for x in (far, -far, 0.0, 0.0)]
    losses, _, _ = dpo_loss(*logps, beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all() and all(x.grad.isfinite().all() for x in logps[:2])


def test_segments_are_summed_one_by_one():
    """Behind a long segment of large numbers a short one keeps every digit; a difference of
    running sums does not."""
    row = row_from([[1] * 4000, [1, 2, 3]])
    nll = torch.cat((torch.full((4000,), 11.7), torch.tensor([1e-3, 2e-3, 0.0])))
    assert segment_logps(nll, row)[1].item() == pytest.approx(-3e-3, rel=1e-6)
    running = nll.cumsum(0)
    assert (running[-1] - running[3999]).item() != pytest.approx(3e-3, rel=1e-2)
    assert segment_counts(row).tolist() == [3999, 2]
