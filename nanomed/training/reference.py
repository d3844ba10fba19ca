"""The reference of DPO: the start weights' log-probabilities of every answer, computed once and
kept beside the run, so that no second model takes memory."""

import hashlib
import json
import math

import numpy as np
import torch
from torch import Tensor, nn

import kernels
from nanomed import watchdog
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import InputError
from nanomed.distributed import World, local, sum_over_ranks
from nanomed.run.log import RunFolder
from nanomed.run.progress import progress
from nanomed.training.alone import master
from nanomed.training.losses import segment_logps
from nanomed.training.step import Loss

# Nats for the square root of the tokens of an answer: how far its log-probability moved, in the
# root mean square, when a real model of 135 million parameters computed in bfloat16 and its matmuls
# added in another order. A GPU may add otherwise for a row of another length.
ROUNDING = 0.09


def reference_logps(model: nn.Module, loader: Loader, run: RunFolder, dtype: torch.dtype) -> Tensor:
    """[pairs, 2] float32, (chosen, rejected), on the run's device. Every rank calls it, with the
    start weights in the model, which computes in `dtype`.

    A resumed run reads what its first start computed. Raises InputError, with the difference, if
    that was computed with other weights, kernels or another dtype. The data are not in the key,
    because RunFolder has already compared them.
    """
    used = kernels.in_force(run.world.device, dtype, model.config.head_size)
    key = {"weights": fingerprint(model), "kernels": used, "dtype": str(dtype)}
    key_path, path = run.path / "reference.json", run.path / "reference.npy"
    if run.resume_from:
        try:
            found, logps = json.loads(key_path.read_text("utf-8")), torch.from_numpy(np.load(path))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise InputError(
                f"{path} and .json cannot be read ({error}); copy them back from a backup, or "
                "start a new run: what was learned so far was measured from this reference"
            ) from None
        _check_key(run, found, key)
    else:
        logps = answer_logps(model, loader, run.world).cpu()
        if run.world.is_main:
            np.save(path, logps.numpy())
            run.write_json("reference.json", key)
    return logps.to(run.world.device)


@torch.no_grad()
def answer_logps(model: nn.Module, loader: Loader, world: World) -> Tensor:
    """[pairs, 2], (chosen, rejected): the log-probabilities, in nats, of all answers of the data
    set under the weights that the model now has. Every rank calls it."""
    model.eval()
    logps = torch.zeros(len(loader.data), 2, device=world.device)
    with progress(len(loader.data), "pair", "reference") as bar:
        for n, row in enumerate(loader.rows(np.arange(len(loader.data))), 1):
            watchdog.at(f"row {n} of the reference")
            row = row.to(world.device)
            pairs = segment_logps(model(row).nll, row).view(-1, 2)
            examples = row.examples[::2]
            logps[examples[examples >= 0]] = pairs[examples >= 0]
            bar.update(min(len(pairs) * world.size, len(loader.data) - bar.n))
    watchdog.away("what follows the reference")
    return sum_over_ranks(logps)  # each pair is in one row of one rank, and 0 elsewhere


def fingerprint(model: nn.Module) -> str:
    """Of the weights' bits, whole: the same however they are sharded."""
    total = sum_over_ranks(sums_of_bits(model)).cpu()
    return hashlib.sha256(total.numpy().tobytes()).hexdigest()[:16]


def sums_of_bits(model: nn.Module) -> Tensor:
    """[parameters] int64: of the numbers that this rank's weights are if read as integers."""
    words = {2: torch.int16, 4: torch.int32}
    parts = (local(master(p)).contiguous() for p in model.parameters())
    return torch.stack([x.view(words[x.element_size()]).sum(dtype=torch.int64) for x in parts])


def _check_key(run: RunFolder, found: dict, wanted: dict) -> None:
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        differences = "; ".join(f"{n}: {found.get(n)} there, {wanted[n]} now" for n in names)
        raise InputError(
            f"{run.path}/reference.npy was computed for something else ({differences}); resume "
            "with the settings of the first start, or start a new run"
        )


@torch.no_grad()
def check_start(
    model: nn.Module, loader: Loader, loss: Loss, beta: float, exact: bool, run: RunFolder
) -> None:
    """Before the first step policy and reference are the same, so the loss is ln 2 and every margin
    is 0. If a row is packed as in the reference pass and all is in float32 (`exact`), the margins
    are exactly 0; otherwise they are within rounding. Runs such a row, and the rows of the first
    step, in training mode, and raises InputError if it is not so. `loss` is the pairs' own, without
    --sft_weight's."""
    model.train()
    reference_pass = next(iter(loader.rows(np.arange(len(loader.data)))))
    margin = abs(_mean(model, loss, [reference_pass], "rewards/margins", run)[0])
    mean, n_pairs, n_tokens = _mean(model, loss, loader.step(0), "loss", run)
    off, allowed = abs(mean - math.log(2)), 1e-2
    if not exact:
        apart = beta * ROUNDING * math.sqrt(n_tokens / n_pairs)  # a pair's two rewards, in the rms
        # -log sigmoid(x) is about ln 2 - x/2 + x^2/8: four standard errors of the mean, and a shift
        allowed += 4 * apart / 2 / math.sqrt(n_pairs) + apart**2 / 8
    if not (off <= allowed and (margin <= 1e-6 or not exact)):  # nor if one of them is NaN
        raise InputError(
            f"DPO does not start at ln 2: the loss is {off:.1e} off, where rounding explains "
            f"{allowed:.1e}; the margin is {margin:.1e}. Policy and reference differ: dropout, "
            "another dtype or other weights"
        )
    run.print(f"start: loss within {off:.1e} of ln 2, margin {margin:.1e} as first packed")


def _mean(
    model: nn.Module, loss: Loss, rows: list[Row], name: str, run: RunFolder
) -> tuple[float, float, float]:
    """Of the pairs of all ranks' rows, and how many pairs and trained tokens they are."""
    sums = torch.zeros(3, dtype=torch.float64, device=run.world.device)
    for row in rows:
        row = row.to(run.world.device)
        total, metrics = loss(model(row), row)
        counts = (row.examples[::2] >= 0).sum(), (row.labels >= 0).sum()
        sums += torch.stack([x.double() for x in ({"loss": total, **metrics}[name], *counts)])
    total, n_pairs, n_tokens = sum_over_ranks(sums).tolist()
    return total / max(1, n_pairs), max(1, n_pairs), n_tokens
