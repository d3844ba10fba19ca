"""Mask X-ray: what a run reads and what of it is learned, token by token.

    python -m nanomed.tools.show DATA -n 3                       the first chats of a file
    python -m nanomed.tools.show DATA --step 0 --init RUN        the packed rows of a step, and the
                                                                 loss of each token under RUN
    python -m nanomed.tools.show DATA --html page.html           the same as one static page

Every flag of train_sft.py may follow. With --init RUN (a run folder) the run's own settings are the
defaults, so its step is packed as it was.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from nanomed import arguments, config, store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row, row_from
from nanomed.distributed import launch, pick_device, start
from nanomed.model.decoder import Aquila
from nanomed.records import Chat, chats_of, names_of, read_chats
from nanomed.stages import stage
from nanomed.stages.answers import records_of
from nanomed.text.template import Encoder
from nanomed.tools.show_html import page
from nanomed.tools.show_text import lines

# What a run's config.json says and its picture does not need.
OWN = ("config", "model", "init", "data", "val_data", "out", "resume", "dry_run")


@dataclass
class Token:
    text: str
    id: int
    position: int
    trained: bool  # a label of the token before it
    loss: float | None  # its negative log-likelihood, where it is trained and a model was given


@dataclass
class Segment:
    title: str
    turns: list[tuple[str, list[Token]]]  # (role, its tokens)


@dataclass
class RowView:
    title: str
    segments: list[Segment]


# ---------------------------------------------------------------- from a Row to a view of it


def view(
    row: Row, encoder: Encoder, chats: list[tuple[str, Chat, int]], nll: Tensor | None, name: str
) -> RowView:
    """`chats` has for each segment its title, its chat and how many old turns were dropped. All
    else is read from the Row, so that what is drawn is what the model gets."""
    targets = torch.zeros(len(row.tokens), dtype=torch.bool)
    targets[1:] = row.labels[:-1] >= 0  # a label stands one position before its token
    losses = [None] + (nll.tolist() if nll is not None else [None] * len(targets))
    tokens = [
        Token(text, int(i), int(position), bool(trained), losses[t] if trained else None)
        for t, (text, i, position, trained) in enumerate(
            zip(_pieces(encoder, row.tokens), row.tokens, row.positions, targets, strict=True)
        )
    ]
    borders = row.cu_seqlens.tolist()
    segments = []
    for k, (title, chat, dropped) in enumerate(chats):
        part = tokens[borders[k] : borders[k + 1]]
        turns, at = [], 0
        for role, length in encoder.borders(chat, dropped):
            turns.append((role, part[at : at + length]))
            at += length
        assert at == len(part), "the turns' borders are not those of the segment"
        where = f"tokens {borders[k]} to {borders[k + 1] - 1}"
        segments.append(Segment(f"{title}; {where}{_summary(part)}", turns))
    many = "segment" if len(segments) == 1 else "segments"
    title = f"{name}: {len(tokens)} tokens in {len(segments)} {many}{_summary(tokens)}"
    return RowView(title, segments)


def _pieces(encoder: Encoder, ids: Tensor) -> list[str]:
    """Each token's own text; a token that is a part of a character shows as U+FFFD."""
    return [encoder.tokenizer.decode([i]) for i in ids.tolist()]


def _summary(tokens: list[Token]) -> str:
    trained = [token for token in tokens if token.trained]
    text = f", {len(trained) / len(tokens):.0%} trained"
    losses = [token.loss for token in trained if token.loss is not None]
    return text + (f", mean loss {sum(losses) / len(losses):.3f}" if losses else "")


# ---------------------------------------------------------------- what to draw


def first_chats(
    c: config.SFT, encoder: Encoder, n: int
) -> Iterator[tuple[str, Row | None, list[tuple[str, Chat, int]]]]:
    """(name, a row with this chat alone, its title and chat) of the first n; None for the row of
    a chat that is dropped."""
    found = ((path, *read) for path in c.data for read in read_chats(path, names_of(c.fields)))
    for path, number, chat, _ in islice(found, n):
        ids, trained, cut = ([], [], 0) if chat.dropped else encoder.chat(chat, c.seq_len)
        name = f"{path}, record {number}"
        why = [*chat.notes, *([f"{cut} oldest turns cut"] if cut else [])]
        if not ids:
            yield f"{name}: DROPPED, {chat.dropped or 'longer than seq_len'}", None, []
        else:
            title = "; ".join([f"chat {chat.source}".strip(), *why])
            yield name, row_from([ids], [trained]), [(title, chat, cut)]


def step_rows(
    c: config.SFT, encoder: Encoder, step: int, world_size: int
) -> Iterator[tuple[str, Row, list[tuple[str, Chat, int]]]]:
    """The rows that rank 0 of `world_size` runs in a step."""
    data = store.chats([*c.data, *c.val_data], encoder, c.seq_len, c.allow_drop, c.fields)
    loader = Loader.of(c, data, world_size=world_size)
    if not 0 <= step < loader.n_steps:
        raise config.InputError(f"--step {step}: the run has steps 0 to {loader.n_steps - 1}")
    rows = loader.step(step)
    for k, row in enumerate(rows):
        name = f"step {step}, row {k} of {len(rows)} on rank 0 of {world_size}"
        real = [i for i in row.examples.tolist() if i >= 0]  # a filler has no examples
        if real:
            yield name, row, [_chat_of(data, i, encoder, c.seq_len) for i in real]


def _chat_of(data: store.Store, i: int, encoder: Encoder, seq_len: int) -> tuple[str, Chat, int]:
    """The chat that an example was made from: of the record's chats, the one with its ids."""
    ((ids, *_),) = data[i]
    (record,) = records_of(data, [i])
    path, number = data.where(i)
    for chat in chats_of(record):
        if not chat.dropped:
            found, _, cut = encoder.chat(chat, seq_len)
            if found == ids.tolist():
                return f"example {i}: {path}, record {number}", chat, cut
    raise config.InputError(f"{path}, record {number} is not what was tokenised; it was changed")


def draw(c: config.SFT, own: argparse.Namespace) -> list[RowView | str]:
    """The views, or one line for a chat that is dropped."""
    model_config, encoder = stage.model_and_encoder(c)
    if own.step is None:
        found = first_chats(c, encoder, own.n)
    else:
        found = islice(step_rows(c, encoder, own.step, own.world_size), own.n)
    if not c.init:
        return [_view(encoder, *one, model=None) for one in found]
    with start(pick_device(c.device)) as world, torch.no_grad():
        model = stage.build_model(c, model_config, world).eval()
        return [_view(encoder, *one, model=model) for one in found]


def _view(
    encoder: Encoder, name: str, row: Row | None, chats: list, model: Aquila | None
) -> RowView | str:
    if row is None:
        return name
    nll = None if model is None else model(row.to(next(model.parameters()).device)).nll.cpu()
    return view(row, encoder, chats, nll, name)


# ---------------------------------------------------------------- command


def settings(files: list[str], flags: list[str]) -> config.SFT:
    """Of train_sft.py, on these files; where --init is a run folder, the run's own."""
    argv = ["--data", *files, *flags]
    c = arguments.parse(config.SFT, argv)
    path = Path(c.init) / "config.json"
    if not c.init or not (Path(c.init) / "model.json").exists():
        return c
    known = {f.name for f in dataclasses.fields(config.SFT)} - set(OWN)
    base = {name: v for name, v in json.loads(path.read_text()).items() if name in known}
    return arguments.parse(config.SFT, argv, base)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nanomed.tools.show", allow_abbrev=False, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("files", nargs="+", metavar="DATA", help="training files, first of all")
    parser.add_argument("-n", type=int, default=3, help="chats or, with --step, rows; default 3")
    parser.add_argument("--step", type=int, help="draw the rows of this step, from 0")
    parser.add_argument("--world_size", type=int, default=1, help="processes that share the step")
    parser.add_argument("--html", type=Path, help="write one static page instead of text")
    own, flags = parser.parse_known_args(argv)
    views = draw(settings(own.files, flags), own)
    if own.html:
        own.html.write_text(page(views), encoding="utf-8")
        print(f"wrote {own.html}")
    else:
        print("\n".join(lines(views, colour=sys.stdout.isatty())))


if __name__ == "__main__":
    launch(main)
