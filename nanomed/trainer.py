"""fit(): the training loop of every stage."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from nanomed import checkpoint
from nanomed.config import Run
from nanomed.distributed import sum_over_ranks
from nanomed.loader import Loader
from nanomed.log import Meter, RunFolder, is_terminal, step_line
from nanomed.optim import adamw, lr_at
from nanomed.packing import Row

# A metric's sum over a row, to be divided as the loss is; or (sum, what to divide it by).
Metric = Tensor | tuple[Tensor, Tensor]
# (nll[T], row) -> (this row's summed loss, metrics); fit() divides by the step's divisor.
Loss = Callable[[Tensor, Row], tuple[Tensor, dict[str, Metric]]]
COUNT = " count"  # ends the name of a sum that another one is divided by


def fit(config: Run, model: nn.Module, loader: Loader, loss: Loss, run: RunFolder) -> None:
    """Trains the sharded model in place, from run.resume_from if there is one. The best
    checkpoint by validation loss is run.checkpoints/best. Every rank calls it."""
    optimizer = adamw(model, config.weight_decay)  # before the first forward: see shard()
    start = 0
    if run.resume_from:
        start = checkpoint.load(run.resume_from, model, optimizer)["step"]
        run.print(f"resumed from {run.resume_from} after step {start}")
        if _due(config.eval_every, loader, start) and not checkpoint.is_validated(run.resume_from):
            _validate(model, loader, loss, run, start, run.resume_from)
    else:
        evaluate(model, loader, loss, run, step=0)

    meter = Meter(model.config, run.world.size)
    shown = run.world.is_main and is_terminal()
    with tqdm(total=loader.n_steps, initial=start, unit="step", disable=not shown) as bar:
        for step in range(start, loader.n_steps):
            lr = lr_at(step, loader.n_steps, config.lr, config.warmup_ratio, config.min_lr_ratio)
            sums = train_step(config, model, optimizer, loader, loss, step, lr, meter)
            done = step + 1
            bar.update()
            if done % config.log_every == 0 or done in (1, loader.n_steps):
                values = {"step": done, "lr": lr, **_reduced(sums, loader.divisor(step), meter)}
                run.metrics(**values)
                run.print(step_line(done, loader.n_steps, values))
                bar.set_postfix_str(
                    f"loss {values['loss']:.3f}, lr {lr:.1e}, {values['tokens_per_s']:,.0f} tok/s"
                )
            evaluates = _due(config.eval_every, loader, done)
            if evaluates or _due(config.save_every, loader, done):
                saved = checkpoint.save(run.checkpoints, model, optimizer, {"step": done})
                if evaluates:
                    _validate(model, loader, loss, run, done, saved)
                checkpoint.keep(run.checkpoints, config.keep_last)
                meter.restart()


def _due(every: int, loader: Loader, done: int) -> bool:
    """Whether something that happens every `every` steps (0: at each epoch's end), and always at
    the end, happens after `done` steps."""
    return done % (every or loader.steps_per_epoch) == 0 or done == loader.n_steps


def _validate(
    model: nn.Module, loader: Loader, loss: Loss, run: RunFolder, step: int, saved: Path
) -> None:
    """Evaluates what was just saved and, if it is the best so far, points `best` to it."""
    val_loss = evaluate(model, loader, loss, run, step)
    if val_loss is not None:
        checkpoint.mark_validated(saved, val_loss)


def train_step(
    config: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    loss: Loss,
    step: int,
    lr: float,
    meter: Meter,
) -> dict[str, Tensor]:
    """One optimizer update. Returns this rank's sums and, under grad_norm, the global norm."""
    device = next(model.parameters()).device
    # The same dropout after a resume, other masks on every rank; a tuple of integers has the same
    # hash in every process.
    torch.manual_seed(hash((config.seed, step, loader.rank)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    divisor = loader.divisor(step)
    sums: dict[str, Tensor] = {}
    for row in loader.step(step):
        n_tokens = meter.count(row)
        row = row.to(device)
        row_loss, metrics = loss(model(row), row)
        metrics |= {"tokens": n_tokens, "trained_tokens": (row.labels >= 0).sum()}
        # A sum divided by what the whole step trains on: the gradient does not depend on how the
        # examples were packed, accumulated and distributed.
        (row_loss / divisor).backward()
        _add(sums, {"loss": row_loss.detach(), **metrics})
    grad_norm = clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient norm of step {step + 1} is {grad_norm.item()}; the examples of this "
            f"step are {loader.examples(step).tolist()}; nothing of this step was applied"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {**sums, "grad_norm": grad_norm}


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
    for row in loader.validation():
        row = row.to(run.world.device)
        row_loss, metrics = loss(model(row), row)
        _add(sums, {"loss": row_loss, **metrics})
    means = _means(_over_ranks(sums), loader.val_divisor())
    values = {f"val_{name}": value for name, value in means.items()}
    run.metrics(step=step, **values)
    main = {name: v for name, v in values.items() if name.count("/") <= 1 and "logps" not in name}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in main.items())
    run.print(f"after step {step}: {shown} ({len(loader.val)} held-out examples)")
    if run.describe:
        run.print(f"  {run.describe(values)}")
    return values["val_loss"]


def _reduced(sums: dict[str, Tensor], divisor: int, meter: Meter) -> dict[str, float]:
    """What a logged step shows: its sums over all ranks, and the rates since the last one."""
    grad_norm = sums.pop("grad_norm").item()
    counts = {"all_tokens": meter.tokens, "squares": meter.squares}
    device = sums["loss"].device
    totals = _over_ranks(sums | {k: torch.tensor(v, device=device) for k, v in counts.items()})
    rates = meter.read(totals.pop("all_tokens"), totals.pop("squares"))
    share = totals.pop("trained_tokens") / totals.pop("tokens")
    return {**_means(totals, divisor), "grad_norm": grad_norm, "trained_share": share, **rates}


def _over_ranks(sums: dict[str, Tensor]) -> dict[str, float]:
    """The sums of all ranks, in float64, in one exchange."""
    totals = sum_over_ranks(torch.stack([value.double() for value in sums.values()]))
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
