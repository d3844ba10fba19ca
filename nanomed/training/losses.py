"""The DPO loss, as pure functions of log-probabilities. The numbers of equations are those of
Rafailov et al. 2023, "Direct Preference Optimization".

The other stages need no file: their loss is the sum of the model's nll (train_sft.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed.batches.packing import Row


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, chosen rewards, rejected rewards), each [n], from the log-probabilities [n] of n
    pairs' answers, in nats, summed over the answer's tokens.

    The implicit reward of an answer is beta * log(policy / reference) (eq. 5, without the term
    that both answers share), and the loss is the negative log-likelihood that the chosen one wins
    under Bradley and Terry's model: -log sigmoid(chosen reward - rejected reward) (eq. 7).
    label_smoothing is the probability that a pair is labelled the wrong way round (Mitchell 2023).
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margins = chosen_rewards - rejected_rewards
    losses = -(1 - label_smoothing) * F.logsigmoid(margins)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-margins)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def segment_logps(nll: Tensor, row: Row) -> Tensor:  # nll[T] -> [n]
    """The log-probability of each segment's labels. Every segment is summed by itself, in float64:
    a difference of running sums would carry the rounding of the whole row before it."""
    return -_sums(nll, row).float()


def segment_counts(row: Row) -> Tensor:  # [n]
    """The number of labels in each segment."""
    return _sums(row.labels >= 0, row)


def _sums(values: Tensor, row: Row) -> Tensor:  # values[T] -> [n] float64
    lengths = row.cu_seqlens.diff().long()
    # unsafe: the lengths are right, and to check them the host would wait for the GPU.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True)
