"""AdamW's parameter groups and the learning rate as a function of the step."""

import math

import torch
from torch import nn

# Unpublished for Aquila-Med; 0.95 forgets a spike in the squared gradient within about 20 steps.
BETAS, EPS = (0.9, 0.95), 1e-8


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Decay on matrices only: norms and biases have a scale to keep."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def lr_at(step: int, n_steps: int, peak: float, warmup_ratio: float, min_ratio: float) -> float:
    """The learning rate of step 0 <= step < n_steps: linear up to the peak, which the last step of
    the warm-up has, then a cosine from the peak down towards min_ratio * peak. It would be there
    one step after the last: no step has the rate 0, which would train nothing."""
    warmup = math.ceil(warmup_ratio * n_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (n_steps - warmup)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2)
