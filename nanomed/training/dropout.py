"""What dropout costs the weights that a run starts from, said before its first step."""

import torch
from torch import Tensor, nn

from nanomed.batches.loader import Loader
from nanomed.distributed import sum_over_ranks
from nanomed.run.log import RunFolder


@torch.no_grad()
def dropout_cost(model: nn.Module, loader: Loader) -> tuple[float, float]:
    """(with dropout, without) the loss in nats per trained token of one row on each rank, of the
    first step; every rank calls it. No later step changes by it: each step seeds its own masks."""
    row = loader.step(0)[0].to(next(model.parameters()).device)

    def loss(training: bool) -> Tensor:
        nll = model.train(training)(row).nll.sum().double()
        total, n_tokens = sum_over_ranks(torch.stack([nll, (row.labels >= 0).sum().double()]))
        return total / n_tokens

    return loss(True).item(), loss(False).item()


def say_dropout(share: float, model: nn.Module, loader: Loader, run: RunFolder) -> None:
    dropped, whole = dropout_cost(model, loader)
    much = not dropped <= 1.1 * whole  # a loss that is not finite, too
    run.print(
        ("WARNING: " if much else "")
        + f"--dropout {share} makes the loss of the first row {dropped:.3f}, without it "
        f"{whole:.3f} ({dropped / whole - 1:+.1%})"
        + ("; such weights were trained without: --dropout 0 (docs/recipe.md)" if much else "")
    )
