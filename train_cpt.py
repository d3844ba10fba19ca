"""Continued pre-training, the paper's first stage and its second, on one page.

    torchrun --nproc_per_node 2 train_cpt.py                        a demonstration on samples/
    torchrun --nproc_per_node 8 train_cpt.py --config configs/cpt_stage1.toml --init FOLDER \\
        --data STORE:0.7 STORE:0.3

Documents stand one after another and are cut into slices of seq_len tokens. The model learns every
token that has one before it in its document. Stage 2 is the same with other settings and data: it
starts from stage 1's weights (--init RUN).
"""

import math
from functools import partial

import torch
from torch import Tensor

from nanomed import arguments
from nanomed.batches import slices
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import CPT
from nanomed.distributed import launch, pick_device, start
from nanomed.model.decoder import Scores
from nanomed.run.log import RunFolder
from nanomed.stages import dry_run, stage
from nanomed.training.step import Loss
from nanomed.training.trainer import fit


def next_token_loss(data: slices.Slices, n_bytes: Tensor) -> Loss:
    """The loss of a row, for fit(), with its metrics: accuracy, and for each source nats per token
    and bits per byte. The last can be compared with models that have another tokenizer.
    n_bytes[vocab]: how many bytes each id stands for."""
    first, source_of_span = (torch.from_numpy(x).to(n_bytes) for x in (data.first, data.source))

    def loss(scores: Scores, row: Row) -> tuple[Tensor, dict]:
        nll, is_label = scores.nll, row.labels >= 0
        label_bytes = n_bytes[row.labels.clamp(min=0)] * is_label
        source = source_of_span[torch.bucketize(row.examples, first, right=True) - 1]  # [segments]
        source = torch.where(row.examples < 0, -1, source)  # a filler has none
        source = source.repeat_interleave(row.cu_seqlens.diff(), output_size=len(nll))  # [T]

        nats, bits = {}, {}
        for k, name in enumerate(data.names):
            of_source = source == k
            total = (nll.detach() * of_source).sum()
            nats[f"loss/{name}"] = total, (is_label & of_source).sum()
            bits[f"bits_per_byte/{name}"] = total / math.log(2), (label_bytes * of_source).sum()
        return nll.sum(), {"accuracy": scores.right.sum(), **nats, **bits}

    return loss


def main() -> None:
    c = arguments.parse(CPT)
    device = pick_device(c.device)
    config, encoder = stage.model_and_encoder(c)

    # Before the processes join: one of them tokenises, however long it takes, the others wait.
    read = partial(slices.read, c, encoder)
    if c.dry_run:
        return dry_run.show(c, config, read)
    data = read()

    with start(device) as world:
        loader = Loader(c, data, world.rank, world.size, (data.train, data.val), data.mixture)
        model = stage.build_model(c, config, world)
        run = RunFolder(c, world, stage.identity(c, config, encoder, loader))
        stage.announce(c, model, encoder, loader, run)

        n_bytes = torch.tensor(encoder.tokenizer.n_bytes(), device=device)
        fit(c, model, loader, next_token_loss(data, n_bytes), run)

        stage.load_best(model, run)
        stage.export(c, model, encoder, run)
        if command := stage.second_stage(c, run):
            run.print(f"stage 2: {command}")


if __name__ == "__main__":
    launch(main)
