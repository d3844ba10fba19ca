"""The stages' losses, and three that a reader would add, against their formulas."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_cpt
import train_dpo
import train_sft
from nanomed.config import DPO
from nanomed.run.log import RunFolder
from nanomed.training.losses import segment_counts, segment_logps
from nanomed.training.trainer import fit
from tests.data import ListData
from tests.loss_oracle import check_learned, check_loss
from tests.training.test_dpo import C, PairData, random_reference
from tests.training.test_dpo import loader_of as dpo_loader
from tests.training.test_exactness import sharded

CHATS = ListData.of_lengths([5, 40, 12, 33, 3, 60, 21, 8, 17, 44, 9])
PAIRS = PairData(11)
SETTINGS = DPO(beta=0.1, sft_weight=0.2, label_smoothing=0.1)
Z, BETA, GAMMA = 0.01, 2.0, 1.0
SOURCES = SimpleNamespace(names=["a", "b"], first=np.array([0, 6]), source=np.array([0, 1]))
BYTES = torch.arange(97) % 5 + 1.0  # of each token


# ---------------------------------------------------------------- formulas


def nll_of(answer):
    return -answer.logits.log_softmax(-1).gather(1, answer.labels[:, None])[:, 0]


def next_token(_, answers):
    right = [(a.logits.argmax(-1) == a.labels).sum() for a in answers]
    return sum(nll_of(a).sum() for a in answers), {"accuracy": sum(right)}


def bits_per_byte(i, answers):
    """The first six chats stand for one source of documents, the others for another."""
    name = SOURCES.names[i >= 6]
    loss, metrics = next_token(i, answers)
    n_bytes = sum(BYTES[a.labels].sum() for a in answers)
    n_labels = sum(len(a.labels) for a in answers)
    return loss, {
        **metrics,
        f"loss/{name}": (loss, n_labels),
        f"bits_per_byte/{name}": (loss / math.log(2), n_bytes),
    }


def next_token_and_z(i, answers):
    loss, _ = next_token(i, answers)
    return loss + Z * sum(a.logits.logsumexp(-1).square().sum() for a in answers), {}


def dpo(i, answers):
    chosen, rejected = (-nll_of(a).sum() for a in answers)
    start = random_reference(len(PAIRS)).double()[i]
    gains = SETTINGS.beta * (chosen - start[0]), SETTINGS.beta * (rejected - start[1])
    margin = gains[0] - gains[1]
    smoothing = SETTINGS.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    loss = loss + SETTINGS.sft_weight * nll_of(answers[0]).mean()
    return loss, {"rewards/margins": margin, "rewards/accuracies": margin > 0}


def simpo(_, answers):
    chosen, rejected = (-nll_of(a).mean() for a in answers)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA), {
        "rewards/accuracies": chosen > rejected
    }


# ---------------------------------------------------------------- losses


def z_loss(scores, row):
    return (scores.nll + Z * scores.lse**2).sum(), {}


def stage_cpt():
    return train_cpt.next_token_loss(SOURCES, BYTES)


def stage_dpo():
    kinds = torch.arange(len(PAIRS)) % 2
    names = ["subjective", "objective"]
    return train_dpo.preference_loss(random_reference(len(PAIRS)), kinds, names, SETTINGS)


def simpo_loss(scores, row, means=True):
    real = (row.examples[::2] >= 0).float()
    logps, counts = segment_logps(scores.nll, row), segment_counts(row).clamp(min=1)
    rewards = BETA * (logps / counts if means else logps).view(-1, 2)
    losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - GAMMA)
    right = (rewards[:, 0] > rewards[:, 1]) * real
    return (losses * real).sum(), {"rewards/accuracies": right.sum()}


def returned(loss):
    return loss


LOSSES = {
    "sft": (CHATS, partial(returned, train_sft.next_token_loss), next_token),
    "cpt": (CHATS, stage_cpt, bits_per_byte),
    "z-loss": (CHATS, partial(returned, z_loss), next_token_and_z),
    "dpo": (PAIRS, stage_dpo, dpo),
    "simpo": (PAIRS, partial(returned, simpo_loss), simpo),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_in_every_layout(pool, small, name):
    check_loss(pool, small, *LOSSES[name])


def z_over_all_tokens(scores, row):
    return scores.nll.sum() + Z * (scores.lse**2 + (row.labels < 0)).sum(), {}


def mean_of_means(scores, row):
    return scores.nll.sum() / (row.labels >= 0).sum().clamp(min=1), {}


def a_metric_of_one_rank(scores, row):
    loss, metrics = train_sft.next_token_loss(scores, row)
    return loss, metrics | {"lse": scores.lse.detach().sum() * (dist.get_rank() == 0)}


def sums_in_simpo(scores, row):
    return simpo_loss(scores, row, means=False)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("z-loss", z_over_all_tokens),
        ("sft", mean_of_means),
        ("sft", a_metric_of_one_rank),
        ("simpo", sums_in_simpo),
    ],
)
def test_a_beginners_error_is_seen(pool, small, name, wrong):
    data, _, formula = LOSSES[name]
    with pytest.raises(AssertionError):
        check_loss(pool, small, data, partial(returned, wrong), formula)


def test_simpo_is_learned_too(world, small, tmp_path):
    """It starts near 1.31, -log sigmoid(-gamma), where DPO starts at 0.69: no bound fits both."""
    c = dataclasses.replace(
        C, batch_size=8, steps=30, lr=3e-3, log_every=30, eval_every=30, out=str(tmp_path / "x")
    )
    model, run, loader = sharded(world, small), RunFolder(c, world), dpo_loader(world, c, 8)
    fit(c, model, loader, simpo_loss, run)
    run.close()
    lines = (tmp_path / "x/metrics.jsonl").read_text().splitlines()
    check_learned(json.loads(lines[0]), json.loads(lines[-1]))
