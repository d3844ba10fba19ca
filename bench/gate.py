"""What a rival of bench/step.py must pass before it is timed.

In float32, from the same weights, the loss of the same segments and all its gradients are ours.

`b` is bench.step.Bench; of it the unsharded float32 model `plain` is used."""

import torch

from nanomed.batches.packing import row_from
from nanomed.config import DPO
from nanomed.text.segment import IGNORE, Segment


def gate(b, name: str, theirs, loss: torch.Tensor, ours: torch.Tensor) -> None:
    """Both losses of the same segments from the same float32 weights, and all their gradients.
    Raises SystemExit before any time is taken if they differ."""
    theirs.zero_grad()
    b.plain.zero_grad()
    loss.backward()
    ours.backward()
    grads = {n.removeprefix("model."): p.grad for n, p in theirs.named_parameters()}
    apart = {
        n: ((grads[n] - p.grad).norm() / p.grad.norm()).item()
        for n, p in b.plain.named_parameters()
        if "k_proj.bias" not in n  # 0 but for rounding: softmax ignores a common shift
    }
    worst = max(apart, key=apart.get)
    off = abs(loss.item() - ours.item()) / abs(ours.item())
    print(f"  {name}: loss {off:.1e} apart, gradients at most {apart[worst]:.1e} ({worst})")
    if not (off < 1e-5 and apart[worst] < 1e-4):
        raise SystemExit(f"{name} computes something else than nanomed: no speed is measured")
    theirs.zero_grad()
    b.plain.zero_grad()


def segments_of(batch: dict[str, torch.Tensor]) -> list[Segment]:
    """The segments of a collator's batch, padded, or packed with positions that restart."""
    found = []
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        ends = [int(batch["attention_mask"][i].sum())] if "attention_mask" in batch else []
        if "position_ids" in batch:
            starts = (batch["position_ids"][i] == 0).nonzero()[:, 0].tolist()
            ends = [*starts[1:], len(ids)]
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            trained = (labels[begin:end] != IGNORE).numpy()
            found.append(Segment(ids[begin:end].numpy(), trained))
    return found


def next_token_loss(b, segments: list[Segment]) -> torch.Tensor:
    row = row_from(*zip(*segments, strict=True))
    return b.plain(row).nll.sum() / (row.labels >= 0).sum()


def plain_gate(b, name: str, model, batch: dict[str, torch.Tensor]) -> None:
    """Of a transformers model with its own mean over the batch's trained tokens."""
    ours = next_token_loss(b, segments_of(batch))
    batch = {key: value.to(model.device) for key, value in batch.items()}
    gate(b, name, model, model(**batch, use_cache=False).loss, ours)


def trl_gate(b, name: str, trainer, dpo: bool) -> None:
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    model.train()
    if not dpo:
        segments = segments_of(batch)
        ours = next_token_loss(b, segments)
        n = sum(int(s.trained[1:].sum()) for s in segments)
        loss = trainer.compute_loss(model, batch, num_items_in_batch=n)
    else:
        chosen, rejected = batch["input_ids"].chunk(2)
        ours = _dpo_loss(b, batch, torch.stack([chosen, rejected], 1))
        loss = trainer.compute_loss(model, batch)
    gate(b, name, model, loss, ours)


def _dpo_loss(b, batch: dict, ids: torch.Tensor) -> torch.Tensor:
    """-log sigmoid of beta times what the log-ratios differ by, from the start weights."""
    masks = torch.stack(batch["attention_mask"].chunk(2), 1)
    learned = torch.stack(batch["completion_mask"].chunk(2), 1)
    segments = [
        (ids[i, side][: masks[i, side].sum()].numpy(),
         learned[i, side][: masks[i, side].sum()].bool().numpy())
        for i in range(len(ids)) for side in (0, 1)
    ]  # fmt: skip
    nll = b.plain(row := row_from(*zip(*segments, strict=True))).nll
    logps = torch.stack([-part.sum() for part in nll.split(row.cu_seqlens.diff().tolist())])
    ratios = (logps - logps.detach()).view(-1, 2)
    margins = DPO.__dataclass_fields__["beta"].default * (ratios[:, 0] - ratios[:, 1])
    return -torch.nn.functional.logsigmoid(margins).mean()
