"""AdamW's parameter groups and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from nanomed.config import Run
from nanomed.training.alone import SplitAdamW

# Unpublished for Aquila-Med; 0.95 forgets a spike in the squared gradient within about 20 steps.
BETAS, EPS = (0.9, 0.95), 1e-8


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    """Decay on matrices only: norms and biases have a scale to keep. A group's rate is lr_scale
    times the step's. What Adam keeps of a parameter is OPTIMIZER_BYTES in config.py; of a frozen
    one (requires_grad_(False)) it keeps nothing."""
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    no_decay = [name for name, _ in named if "norm" in name or name.endswith(".bias")]
    matrices = [param for name, param in named if name not in no_decay]
    others = [param for name, param in named if name in no_decay]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if hasattr(model, "split_as"):
        return SplitAdamW(groups, BETAS, EPS, model.split_as)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def lr_at(c: Run, step: int, n_steps: int) -> float:
    """The learning rate of step 0 <= step < n_steps.

    Warm-up: linear, reaches the peak at its last step. Then a cosine from the peak down towards
    min_lr_ratio * peak. It would be there one step after the last: no step has the rate 0, which
    would train nothing."""
    warmup = math.ceil(c.warmup_ratio * n_steps)
    if step < warmup:
        return c.lr * (step + 1) / warmup
    cosine = math.cos(math.pi * (step - warmup) / (n_steps - warmup))
    return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * (1 + cosine) / 2)
