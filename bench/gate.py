"""What a rival of bench/step.py must pass before it is timed.

In float32, from the same weights, the loss of the same segments and all its gradients are ours.
`plain` is our model, unsharded and in float32."""

import torch

from nanomed.batches.packing import row_from
from nanomed.config import DPO, Run
from nanomed.model.decoder import Aquila
from nanomed.text.segment import IGNORE, Segment
from nanomed.training.losses import segment_logps

NOISE_FP32, NOISE_BF16 = (1e-5, 1e-4), (1e-3, 0.1)  # of the loss and of a tensor's gradient


def gate(plain: Aquila, name: str, theirs, loss: torch.Tensor, ours: torch.Tensor) -> None:
    """Both losses of the same segments from the same float32 weights, and all their gradients."""
    loss.backward()
    agree(plain, name, theirs, loss, ours, NOISE_FP32)
    theirs.zero_grad()


def agree(
    plain: Aquila, name: str, theirs, loss: torch.Tensor, ours: torch.Tensor,
    noise: tuple[float, float],
) -> None:  # fmt: skip
    """Of theirs, whose backward has run. Raises SystemExit before any time is taken if the losses
    or the gradients are further apart, norm-wise, than `noise`."""
    ours.backward()
    grads = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    apart = {
        n: ((grads[n] - p.grad).norm() / p.grad.norm()).item()
        for n, p in plain.named_parameters()
        if "k_proj.bias" not in n  # 0 but for rounding: softmax ignores a common shift
    }
    plain.zero_grad()
    worst = max(apart, key=apart.get)
    off = abs(loss.item() - ours.item()) / abs(ours.item())
    print(f"  {name}: loss {off:.1e} apart, gradients at most {apart[worst]:.1e} ({worst})")
    if not (off < noise[0] and apart[worst] < noise[1]):
        raise SystemExit(f"{name} computes something else than nanomed: no speed is measured")


def segments_of(batch: dict[str, torch.Tensor]) -> list[Segment]:
    """The segments of a collator's batch, padded, or packed with positions that restart."""
    found = []
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        if "position_ids" in batch:
            starts = (batch["position_ids"][i] == 0).nonzero()[:, 0].tolist()
            ends = [*starts[1:], len(ids)]
        else:
            ends = [int(batch["attention_mask"][i].sum())]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            trained = (labels[begin:end] != IGNORE).numpy()
            found.append(Segment(ids[begin:end].numpy(), trained))
    return found


def next_token_loss(plain: Aquila, segments: list[Segment]) -> torch.Tensor:
    row = row_from(*zip(*segments, strict=True))
    return plain(row).nll.sum() / (row.labels >= 0).sum()


def plain_gate(plain: Aquila, name: str, model, batch: dict[str, torch.Tensor]) -> None:
    """Of a transformers model with its own mean over the batch's trained tokens."""
    ours = next_token_loss(plain, segments_of(batch))
    batch = {key: value.to(model.device) for key, value in batch.items()}
    gate(plain, name, model, model(**batch, use_cache=False).loss, ours)


def trl_gate(plain: Aquila, name: str, trainer, c: Run) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    if isinstance(c, DPO):
        answers = batch["input_ids"].where(batch["completion_mask"].bool(), IGNORE)
        segments = segments_of({**batch, "labels": answers})
        ours, given = _preference_loss(plain, segments, c), {}
    else:
        segments = segments_of(batch)
        ours = next_token_loss(plain, segments)
        given = {"num_items_in_batch": sum(int(s.trained[1:].sum()) for s in segments)}
    gate(plain, name, trainer.model, trainer.compute_loss(trainer.model, batch, **given), ours)


def _preference_loss(plain: Aquila, segments: list[Segment], c: DPO) -> torch.Tensor:
    """Of all chosen answers, then all rejected ones, as a run starts: the reference is the model
    itself."""
    from train_dpo import preference_loss

    n = len(segments) // 2
    pairs = [s for pair in zip(segments[:n], segments[n:], strict=True) for s in pair]
    row = row_from(*zip(*pairs, strict=True), examples=[i // 2 for i in range(2 * n)])
    scores = plain(row)
    reference = segment_logps(scores.nll.detach(), row).view(-1, 2)
    return preference_loss(reference, torch.empty(0), [], c)(scores, row)[0] / n
