"""Supervised fine-tuning, the paper's second stage, on one page.

    torchrun --nproc_per_node 2 train_sft.py                        a demonstration on samples/
    torchrun --nproc_per_node 8 train_sft.py --config configs/sft.toml --init FOLDER --data FILE

Chats are rendered by a template and packed into rows. The model learns the assistants' turns: the
loss is the negative log-likelihood of their tokens, averaged over all of them in the step.
"""

from functools import partial

from torch import Tensor

from nanomed import arguments, store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.config import SFT
from nanomed.distributed import launch, pick_device, start
from nanomed.model.decoder import Scores
from nanomed.run.log import RunFolder
from nanomed.stages import dry_run, stage
from nanomed.stages.answers import show_answers, show_example
from nanomed.stages.world import show_results
from nanomed.training.trainer import fit


def next_token_loss(scores: Scores, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
    """The row's sums; fit() divides them by the trained tokens of the whole step, on all ranks."""
    return scores.nll.sum(), {"accuracy": scores.right.sum()}


def main() -> None:
    c = arguments.parse(SFT)
    device = pick_device(c.device)
    config, encoder = stage.model_and_encoder(c)

    # Before the processes join: one of them tokenises, however long it takes, the others wait.
    read = partial(store.chats, [*c.data, *c.val_data], encoder, c.seq_len, c.allow_drop, c.fields)
    if c.dry_run:
        return dry_run.show(c, config, read)
    data = read()

    with start(device) as world:
        loader = Loader(c, data, world.rank, world.size)
        model = stage.build_model(c, config, world)
        run = RunFolder(c, world, stage.identity(c, config, encoder, loader))
        stage.announce(c, model, encoder, loader, run)
        if stage.may_show_text(c):
            show_example(encoder, loader, run)

        fit(c, model, loader, next_token_loss, run)

        stage.load_best(model, run)
        if stage.may_show_text(c) and len(loader.val):
            show_answers(model, encoder, loader, run)
            show_results(model, encoder, loader, run)
        stage.export(c, model, encoder, run)


if __name__ == "__main__":
    launch(main)
