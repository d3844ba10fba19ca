"""Direct preference optimisation, the paper's third stage, on one page.

    torchrun --nproc_per_node 2 train_dpo.py                        a demonstration on samples/
    torchrun --nproc_per_node 8 train_dpo.py --config configs/dpo.toml --init FOLDER --data FILE

A pair is a prompt with a chosen and a rejected answer, packed as neighbouring segments of one row:
one forward for both. The model learns to prefer the chosen one, measured from where it started
(Rafailov et al. 2023).
"""

import dataclasses
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanomed import arguments, store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import DPO
from nanomed.distributed import launch, pick_device, start
from nanomed.model.decoder import Scores
from nanomed.run.log import RunFolder
from nanomed.stages import dry_run, stage
from nanomed.stages.answers import show_answers
from nanomed.training.losses import dpo_loss, segment_counts, segment_logps
from nanomed.training.reference import check_start, reference_logps
from nanomed.training.step import Loss
from nanomed.training.trainer import fit


def preference_loss(reference: Tensor, kinds: Tensor, names: list[str], c: DPO) -> Loss:
    """The loss of a row, for fit(). reference[pairs,2], kinds[pairs] index names."""

    def loss(scores: Scores, row: Row) -> tuple[Tensor, dict]:
        pairs = row.examples[::2]
        real = (pairs >= 0).float()  # a rank without work runs a filler
        logps = segment_logps(scores.nll, row).view(-1, 2)
        counts = segment_counts(row).view(-1, 2).clamp(min=1)  # of a filler 0
        losses, chosen, rejected = dpo_loss(
            *logps.unbind(1), *reference[pairs].unbind(1), c.beta, c.label_smoothing
        )
        losses = losses - c.sft_weight * logps[:, 0] / counts[:, 0]

        right = (chosen > rejected) * real
        likelier = (logps[:, 0] > logps[:, 1]) * real  # the model's own choice, no reference
        ratios = (logps.detach() - reference[pairs]) / counts
        sums = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            "logps/accuracies": likelier,
            "logps/chosen": logps[:, 0].detach(),
            "logps/rejected": logps[:, 1].detach(),
            "logps_per_token/chosen": logps[:, 0].detach() / counts[:, 0],
            "logps_per_token/rejected": logps[:, 1].detach() / counts[:, 1],
            "length/chosen": counts[:, 0],
            "length/rejected": counts[:, 1],
            # How far the policy has moved, as the pairs themselves see it. Not the KL divergence:
            # that would need answers drawn from the policy.
            "log_ratio_per_token/chosen": ratios[:, 0],
            "log_ratio_per_token/rejected": ratios[:, 1],
        }
        metrics = {name: (value * real).sum() for name, value in sums.items()}
        # Subjective and objective, or what else records say; those that say nothing have no name.
        for kind, name in [(i, name) for i, name in enumerate(names) if name]:
            of_kind = (kinds[pairs] == kind) * real
            metrics[f"rewards/accuracies/{name}"] = (right * of_kind).sum(), of_kind.sum()
            metrics[f"logps/accuracies/{name}"] = (likelier * of_kind).sum(), of_kind.sum()
        return (losses * real).sum(), metrics

    return loss


def what_happens(values: dict[str, float]) -> str:
    """One sentence on an evaluation."""
    chosen = values["val_log_ratio_per_token/chosen"]
    rejected = values["val_log_ratio_per_token/rejected"]
    if not chosen > rejected:
        return "the margin has not grown yet"
    if chosen >= 0:
        other = "fall" if rejected < 0 else "rise less"
        return f"the margin grows because chosen answers become more likely; rejected ones {other}"
    warning = f"warning: chosen answers became less likely, {chosen:.4f} nats per token; "
    return warning + "the margin grows because the rejected ones fall faster"


def main() -> None:
    c = stage.with_newest_sft(arguments.parse(DPO))
    device = pick_device(c.device)
    config, encoder = stage.model_and_encoder(c)

    # Before the processes join: one of them tokenises, however long it takes, the others wait.
    read = partial(store.pairs, [*c.data, *c.val_data], encoder, c.seq_len, c.allow_drop, c.fields)
    if c.dry_run:
        return dry_run.show(c, config, read)
    data = read()

    with start(device) as world:
        loader = Loader(c, data, world.rank, world.size)
        model = stage.build_model(c, config, world)
        identity = stage.identity(c, config, encoder, loader)
        run = RunFolder(c, world, identity, describe=what_happens)
        stage.announce(c, model, encoder, loader, run)

        dtype = stage.compute_dtype(c, device)
        reference = reference_logps(model, loader, run, dtype)
        kinds = torch.from_numpy(np.array(data.kinds)).to(device)
        loss = partial(preference_loss, reference, kinds, data.meta["kinds"])
        shows = stage.may_show_text(c) and len(loader.val)
        if not run.resume_from:
            pairs_alone = loss(dataclasses.replace(c, sft_weight=0.0))
            check_start(model, loader, pairs_alone, c.beta, dtype == torch.float32, run)
            if shows:
                show_answers(model, encoder, loader, run, "the model as it starts")
        fit(c, model, loader, loss(c), run)

        stage.load_best(model, run)
        if shows:
            show_answers(model, encoder, loader, run)
        stage.export(c, model, encoder, run)


if __name__ == "__main__":
    launch(main)
