"""One optimizer step and one validation: what fit() repeats."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanomed import watchdog
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import Run
from nanomed.distributed import full, sum_in_backward, sum_over_ranks
from nanomed.model.decoder import Scores
from nanomed.run.log import Meter, RunFolder
from nanomed.run.progress import progress

# A metric's sum over a row, to be divided as the loss is; or (sum, what to divide it by).
Metric = Tensor | tuple[Tensor, Tensor]
# (scores, row) -> (this row's summed loss, metrics); fit() divides by the step's divisor.
Loss = Callable[[Scores, Row], tuple[Tensor, dict[str, Metric]]]
COUNT = " count"  # ends the name of a sum that another one is divided by


@dataclass
class Step:
    """What a step came to. All but `sums` and `rows` is the same on every rank."""

    loss: float  # of all ranks, divided
    grad_norm: float  # of all ranks, before clipping
    applied: bool  # False: one of the two is not finite, so no weight has moved
    stop: bool  # some rank was asked to end
    sums: dict[str, Tensor]  # this rank's
    rows: list[tuple[Tensor, Tensor]]  # this rank's (examples, summed loss)
    layers: dict[str, float]  # if not applied, the gradient norm of each layer


def train_step(
    c: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    loss: Loss,
    step: int,
    lr: float,
    meter: Meter,
    stop: bool = False,
) -> Step:
    """One optimizer update, or none, on all ranks alike, if something in it is not finite."""
    device = next(model.parameters()).device
    # The same dropout after a resume, other masks on every rank; a tuple of integers has the same
    # hash in every process.
    torch.manual_seed(hash((c.seed, step, loader.rank)))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    model.train()
    divisor = loader.divisor(step)
    sums: dict[str, Tensor] = {}
    rows = []
    packed = loader.step(step)
    for n, row in enumerate(packed, 1):
        watchdog.at(f"row {n} of {len(packed)} of step {step + 1}")
        examples, n_tokens = row.examples, meter.count(row)
        row = row.to(device)
        row_loss, metrics = loss(model(row), row)
        metrics["trained_share"] = (row.labels >= 0).sum(), n_tokens
        # A sum divided by what the whole step trains on: the gradient does not depend on how the
        # examples were packed, accumulated and distributed.
        sum_in_backward(model, last=n == len(packed))
        (row_loss / divisor).backward()
        rows.append((examples, row_loss.detach()))
        _add(sums, {"loss": row_loss.detach(), **metrics})
    trained = [param for param in model.parameters() if param.requires_grad]
    grad_norm = full(get_total_norm([param.grad for param in trained]))

    # Every rank decides from the same three numbers. Here the CPU waits for the GPU, and nowhere
    # else in a step but in linear_nll. A NaN on one rank makes the sum NaN on all.
    exchanged = sum_over_ranks(torch.stack([sums["loss"], sums["loss"].new_tensor(stop)]))
    total, stops, norm = (*exchanged.tolist(), grad_norm.item())
    applied = math.isfinite(total) and math.isfinite(norm)
    layers = {} if applied else gradient_norms(model)
    if applied:
        if 0 < c.grad_clip < norm:  # else it would be a pass over all gradients for nothing
            if hasattr(optimizer, "scale"):
                optimizer.scale = c.grad_clip / (grad_norm + 1e-6)  # as torch does
            else:
                clip_grads_with_norm_(trained, c.grad_clip, grad_norm)
        optimizer.step()
    optimizer.zero_grad()
    return Step(total / divisor, norm, applied, stops > 0, sums, rows, layers)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """By layer, over all ranks; every rank calls it."""
    squares: dict[str, float] = {}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for name, param in trained:
        parts = name.split(".")
        layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
        squares[layer] = squares.get(layer, 0.0) + full(param.grad.norm() ** 2).item()
    return {layer: math.sqrt(square) for layer, square in squares.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, loss: Loss, run: RunFolder, step: int
) -> float | None:
    """The validation loss, every held-out example counted once whatever the number of ranks;
    None if nothing is held out."""
    if len(loader.val) == 0:
        return None
    model.eval()
    sums: dict[str, Tensor] = {}
    with progress(len(loader.val), "example", "validation") as bar:
        for n, row in enumerate(loader.validation(), 1):
            watchdog.at(f"row {n} of the validation after step {step}")
            n_examples = len(row.examples.unique()) * run.world.size  # the others' are as many
            row = row.to(run.world.device)
            row_loss, metrics = loss(model(row), row)
            _add(sums, {"loss": row_loss, **metrics})
            bar.update(min(n_examples, len(loader.val) - bar.n))
    means = _means(_over_ranks(sums), loader.val_divisor())
    values = {f"val_{name}": value for name, value in means.items()}
    run.metrics(step=step, **values)
    main = {name: v for name, v in values.items() if name.count("/") <= 1 and "logps" not in name}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in main.items())
    run.print(f"after step {step}: {shown} ({len(loader.val)} held-out examples)")
    if run.describe:
        run.print(f"  {run.describe(values)}")
    return values["val_loss"]


def reduced(result: Step, divisor: int, meter: Meter) -> dict[str, float]:
    """What a logged step shows: its sums over all ranks, and the rates since the last one."""
    means = _means(_over_ranks(result.sums), divisor)
    return {**means, "grad_norm": result.grad_norm, **meter.read(result.sums["loss"].device)}


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, float]:
    """The sums of all ranks, in float64, in one exchange. Counts of tokens are still on the CPU."""
    device = sums["loss"].device
    values = [value.to(device, torch.float64) for value in sums.values()]
    totals = sum_over_ranks(torch.stack(values))
    return dict(zip(sums, totals.tolist(), strict=True))


def _add(sums: dict[str, Tensor], more: dict[str, Metric]) -> None:
    for name, value in more.items():
        if isinstance(value, tuple):
            value, count = value
            _add(sums, {name + COUNT: count})
        sums[name] = sums[name] + value.double() if name in sums else value.double()


def _means(totals: dict[str, float], divisor: int) -> dict[str, float]:
    """Each total over its own count, else over the divisor; nothing where nothing was counted."""
    counts = {name: totals.get(name + COUNT, divisor) for name in totals}
    wanted = [name for name in totals if not name.endswith(COUNT) and counts[name]]
    return {name: totals[name] / counts[name] for name in wanted}
