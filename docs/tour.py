"""The numbers of docs/tour.md: one chat of the samples, from a line in a file to a moved weight.

    python docs/tour.py            prints them
    python docs/tour.py --write    puts them into docs/tour.md

It is one step of `python train_sft.py` done by hand, on one process: what fit() repeats, without
saves, logs and several ranks.
"""

import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanomed import arguments, store  # noqa: E402
from nanomed.batches.loader import Loader  # noqa: E402
from nanomed.batches.packing import Row  # noqa: E402
from nanomed.config import SFT  # noqa: E402
from nanomed.model.decoder import Aquila  # noqa: E402
from nanomed.records import read_chats  # noqa: E402
from nanomed.stages import stage  # noqa: E402
from nanomed.training.optim import adamw, lr_at  # noqa: E402
from train_sft import next_token_loss  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
WEIGHT = "layers.0.mlp.down_proj.weight"  # its first element is the one that is watched


def blocks() -> dict[str, str]:
    """What the page shows, by the name that stands above each block in it."""
    c = arguments.parse(SFT, ["--data", str(ROOT / "samples/sft.jsonl")])
    config, encoder = stage.model_and_encoder(c)
    data = store.chats(c.data, encoder, c.seq_len, c.allow_drop)
    loader = Loader(c, data)
    model = Aquila(config)
    optimizer = adamw(model, c.weight_decay)

    rows = loader.step(0)
    example = min(torch.cat([row.examples for row in rows]).tolist(), key=lambda i: data.lengths[i])
    row, place = next(
        (r, r.examples.tolist().index(example)) for r in rows if example in r.examples
    )
    number = data.where(example)[1]
    record = (ROOT / "samples/sft.jsonl").read_text(encoding="utf-8").splitlines()[number - 1]
    chat = next(chat for n, chat, _ in read_chats(c.data[0]) if n == number)
    shown = {
        "record": f"samples/sft.jsonl, line {number}:\n{record}",
        "chat": "\n".join(f"{role}: {text}" for role, text in chat.turns),
        "ids": _ids(encoder, chat, c.seq_len),
        "row": _row(rows, row, place),
    }

    divisor, losses = loader.divisor(0), []
    for other in rows:
        scores = model(other)
        loss, _ = next_token_loss(scores, other)
        (loss / divisor).backward()
        losses.append(loss.item())
        if other is row:
            shown["scores"] = _scores(scores, row, place, encoder.tokenizer)
    terms = " + ".join(f"{loss:.2f}" for loss in losses)
    shown["loss"] = f"({terms}) / {divisor} = {sum(losses) / divisor:.4f} nats per trained token"

    weight = model.get_parameter(WEIGHT)
    before = weight[0, 0].item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip).item()
    gradient = weight.grad[0, 0].item()
    lr = lr_at(c, 0, loader.n_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    shown["step"] = (
        f"steps of the run          {loader.n_steps}\n"
        f"gradient norm             {norm:.4f}, clipped to {c.grad_clip}\n"
        f"learning rate             {lr:.3e}, on its way up to {c.lr}\n"
        f"{WEIGHT}[0, 0]\n"
        f"  its gradient, clipped   {gradient:.3e}\n"
        f"  before                  {before:.6f}\n"
        f"  after                   {weight[0, 0].item():.6f}"
    )
    return shown


def _ids(encoder, chat, seq_len: int) -> str:
    ids, trained, _ = encoder.chat(chat, seq_len)
    lines = [f"{i:>5}  {'x' if t else '.'}  {_piece(encoder.tokenizer, i)}"
             for i, t in zip(ids, trained, strict=True)]  # fmt: skip
    return "   id  trained\n" + "\n".join(lines)


def _row(rows: list[Row], row: Row, place: int) -> str:
    first, last = row.cu_seqlens[place : place + 2].tolist()
    part = slice(first, last)
    n_chats, several = sum(len(r.examples) for r in rows), "s" * (len(rows) > 1)
    return (
        f"this step packs {n_chats} chats into {len(rows)} row{several} of "
        f"{', '.join(str(len(r.tokens)) for r in rows)} tokens\n"
        f"our chat is segment {place} of row {next(i for i, r in enumerate(rows) if r is row)}: "
        f"cu_seqlens[{place}] = {first}, cu_seqlens[{place + 1}] = {last}\n"
        f"tokens    {row.tokens[part].tolist()}\n"
        f"labels    {row.labels[part].tolist()}\n"
        f"positions {row.positions[part].tolist()}"
    )


def _scores(scores, row: Row, place: int, tokenizer) -> str:
    first, last = row.cu_seqlens[place : place + 2].tolist()
    trained = [t for t in range(first, last) if row.labels[t] >= 0]
    lines = [
        f"{scores.nll[t].item():7.4f}  {scores.lse[t].item():7.4f}  {bool(scores.right[t])!s:>5}"
        f"  {_piece(tokenizer, row.labels[t].item())}"
        for t in trained
    ]
    return "    nll      lse  right  label\n" + "\n".join(lines)


def _piece(tokenizer, i: int) -> str:
    name = next((name for name, special in tokenizer.special.items() if special == i), None)
    return name or repr(tokenizer.decode([i]))


def in_page(text: str) -> dict[str, str]:
    """The blocks that a page has, by name."""
    return dict(re.findall(r"<!-- tour: (\w+) -->\n```\n(.*?)\n```", text, re.DOTALL))


def main() -> None:
    shown = blocks()
    if "--write" not in sys.argv:
        print("\n\n".join(f"== {name}\n{text}" for name, text in shown.items()))
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, text in shown.items():
        pattern = rf"(<!-- tour: {name} -->\n```\n).*?(\n```)"
        page = re.sub(pattern, lambda m, t=text: m[1] + t + m[2], page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
