"""Text from a model."""

import torch
from torch import nn

from nanomed.distributed import from_main
from nanomed.packing import row_from


@torch.no_grad()
def greedy_in_lockstep(
    model: nn.Module, prompts: list[list[int]], stop: set[int], max_new: int, device: torch.device
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to and without a stop token.

    For a few answers during training: all ranks run the same rows together, since a sharded model
    hangs if one of them stops alone, and everything is computed again for each token.
    """
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    open_ones = list(range(len(prompts)))
    for _ in range(max_new):
        row = row_from([prompts[i] + answers[i] for i in open_ones]).to(device)
        logits = model(row, logits=True)[row.cu_seqlens[1:] - 1]  # [open, V]: each one's last
        # Rank 0 decides: on another GPU a tie could fall the other way.
        for i, token in zip(open_ones, from_main(logits.argmax(-1).tolist()), strict=True):
            answers[i].append(token)
        open_ones = [i for i in open_ones if answers[i][-1] not in stop]
        if not open_ones:
            break
    return [ids[:-1] if ids and ids[-1] in stop else ids for ids in answers]
