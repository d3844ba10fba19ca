"""Mask X-ray: what a run reads and what of it is learned, token by token.

    python -m nanomed.tools.show DATA -n 3                       the first examples of a file
    python -m nanomed.tools.show DATA --step 0 --init RUN        the packed rows of a step, and the
                                                                 loss of each token under RUN
    python -m nanomed.tools.show DATA --init MODEL --cr          dialogues, with each turn's Context
                                                                 Relevance
    python -m nanomed.tools.show DATA --html page.html           the same as one static page

DATA are chats, preference pairs or documents, as their first record is. Every flag of that stage's
script may follow. With --init RUN (a run folder) the run's own settings are the defaults, so its
step is packed as it was.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path

import torch
from torch import Tensor

from nanomed import arguments, config, store
from nanomed.batches import slices
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row, row_from
from nanomed.build import context
from nanomed.build.deita import rounds
from nanomed.config import Run
from nanomed.distributed import launch, pick_device, start
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.records import Chat, Document, PreferencePair, examples_in, read_records
from nanomed.stages import stage
from nanomed.stages.answers import records_of
from nanomed.text.template import Encoder
from nanomed.tools.show_html import page
from nanomed.tools.show_text import lines

Example = Chat | PreferencePair | Document
Parts = list[tuple[str, list[tuple[str, int]]]]  # of each segment its title, and its turns' tokens
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
class DrawnSegment:
    title: str
    turns: list[tuple[str, list[Token]]]  # (role, its tokens)
    relevance: dict[int, float] = field(default_factory=dict)  # a turn's number -> its CR


@dataclass
class RowView:
    title: str
    segments: list[DrawnSegment]  # none of an example that is dropped


# ---------------------------------------------------------------- from a Row to a view of it


def view(row: Row, encoder: Encoder, parts: Parts, nll: Tensor | None, name: str) -> RowView:
    """All but the segments' titles and the borders of their turns is read from the Row, so that
    what is drawn is what the model gets."""
    ids, positions = row.by_place(row.tokens), row.by_place(row.positions)
    targets = torch.zeros(len(ids), dtype=torch.bool)
    targets[1:] = row.labels[:-1] >= 0  # a label stands one position before its token
    targets[row.cu_seqlens[:-1].long()] = False  # a cut document's last label is in another row
    losses = [None] + (nll.tolist() if nll is not None else [None] * len(targets))
    tokens = [
        Token(text, int(i), int(position), bool(trained), losses[t] if trained else None)
        for t, (text, i, position, trained) in enumerate(
            zip(_pieces(encoder, ids), ids, positions, targets, strict=True)
        )
    ]
    borders = row.cu_seqlens.tolist()
    segments = []
    for k, (title, lengths) in enumerate(parts):
        part = tokens[borders[k] : borders[k + 1]]
        turns, at = [], 0
        for role, length in lengths:
            turns.append((role, part[at : at + length]))
            at += length
        assert at == len(part), "the turns' borders are not those of the segment"
        where = f"tokens {borders[k]} to {borders[k + 1] - 1}"
        segments.append(DrawnSegment(f"{title}; {where}{_summary(part)}", turns))
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


def rendered(example: Example, encoder: Encoder, seq_len: int) -> tuple[list, Parts]:
    """The segments of an example as its stage trains on them, none if it does not; and of each its
    name and the lengths of its turns."""
    if isinstance(example, Document):
        ids = [*encoder.tokenizer.encode(example.text), encoder.document_end]
        return [(ids, [True] * len(ids))], [("document", [("document", len(ids))])]
    if isinstance(example, PreferencePair):
        segments, cut = encoder.pair(example, seq_len)
        prompt, system, raw = example.turns, example.system, example.raw
        sides = {
            name: Chat([*prompt, ("assistant", getattr(example, name))], system, raw=raw)
            for name in ("chosen", "rejected")
        }
    else:
        ids, trained, cut = encoder.chat(example, seq_len)
        segments, sides = [(ids, trained)] if ids else [], {"chat": example}
    example.notes += [f"{cut} oldest turns cut"] * bool(cut)
    sides = sides if segments else {}
    return segments, [(name, encoder.borders(side, cut)) for name, side in sides.items()]


def first_examples(c: Run, encoder: Encoder, n: int) -> Iterator[tuple[str, Row | None, Parts]]:
    """(name, a row with this example alone, its segments) of the first n; None for the row of an
    example that is dropped."""
    read = ((path, number, r) for path in c.data for number, r, _ in read_records(path, c.fields))
    found = ((*place, one) for *place, record in read for one in examples_in(*place, record))
    for path, number, one in islice(found, n):
        segments, parts = ([], []) if one.dropped else rendered(one, encoder, c.seq_len)
        name = f"{path}, record {number}"
        if not segments:
            yield f"{name}: DROPPED, {one.dropped or 'longer than seq_len'}", None, []
            continue
        why = [*one.notes, *(f"{field} is not read" for field in one.unread)]
        titled = [("; ".join([f"{part} {one.source}".strip(), *why]), t) for part, t in parts]
        yield name, row_from(*zip(*segments, strict=True)), titled


def step_rows(
    c: Run, encoder: Encoder, step: int, world_size: int
) -> Iterator[tuple[str, Row, Parts]]:
    """The rows that rank 0 of `world_size` runs in a step."""
    if isinstance(c, config.CPT):
        data = slices.read(c, encoder)
        loader = Loader(c, data, 0, world_size, (data.train, data.val), data.mixture)
    else:
        read = store.pairs if isinstance(c, config.DPO) else store.chats
        data = read([*c.data, *c.val_data], encoder, c.seq_len, c.allow_drop, c.fields)
        loader = Loader(c, data, world_size=world_size)
    if not 0 <= step < loader.n_steps:
        raise config.InputError(f"--step {step}: the run has steps 0 to {loader.n_steps - 1}")
    rows = loader.step(step)
    for k, row in enumerate(rows):
        name = f"step {step}, row {k} of {len(rows)} on rank 0 of {world_size}"
        real = dict.fromkeys(i for i in row.examples.tolist() if i >= 0)  # a filler has none
        if real:
            yield name, row, [part for i in real for part in _parts_of(data, i, encoder, c)]


def _parts_of(data, i: int, encoder: Encoder, c: Run) -> Parts:
    """The segments of an example of a step. Of a record's chats it is the one with its ids."""
    segments = [ids.tolist() for ids, *_ in data[i]]
    if isinstance(c, config.CPT):
        places = zip(data.documents_in(i), segments, strict=True)
        return [
            (f"slice {i}: {file}, record {number}", [("document", len(ids))])
            for (file, number), ids in places
        ]
    (record,), (path, number) = records_of(data, [i]), data.where(i)
    for one in examples_in(path, number, record):
        found, parts = ([], []) if one.dropped else rendered(one, encoder, c.seq_len)
        if [ids for ids, _ in found] == segments:
            return [(f"example {i}: {path}, record {number}, {part}", t) for part, t in parts]
    raise config.InputError(f"{path}, record {number} is not what was tokenised; it was changed")


def draw(c: Run, own: argparse.Namespace) -> list[RowView]:
    model_config, encoder = stage.model_and_encoder(c)
    if own.step is None:
        found = first_examples(c, encoder, own.n)
    else:
        found = islice(step_rows(c, encoder, own.step, own.world_size), own.n)
    if not c.init:
        if own.cr:
            raise config.InputError("--cr needs a model that reads the dialogue: --init FOLDER")
        return [_view(encoder, *one, model=None) for one in found]
    with start(pick_device(c.device)) as world, torch.no_grad():
        model = stage.build_model(c, model_config, world).eval()
        views = [_view(encoder, *one, model=model) for one in found]
        for segment in (s for v in views if own.cr for s in v.segments):
            segment.relevance = _relevance(segment, encoder, model)
        return views


def _relevance(segment: DrawnSegment, encoder: Encoder, model: Aquila) -> dict[int, float]:
    """The Context Relevance of every turn but the first, a user's and its answer's together."""
    tokens = [token for _, turn in segment.turns for token in turn]
    lengths = [(role, len(turn)) for role, turn in segment.turns]
    ids, trained = [token.id for token in tokens], [token.trained for token in tokens]
    ((losses, *_),) = context.run(model, [context.laid_out(ids, trained, lengths, encoder)])
    first = 1 if lengths[0][0] == "system" else 0
    later = rounds(lengths[first:])[1:]
    named = zip(later, context.relevance(losses), strict=True)
    return {first + i: cr for part, cr in named if cr is not None for i in part}


def _view(
    encoder: Encoder, name: str, row: Row | None, parts: Parts, model: Aquila | None
) -> RowView:
    if row is None:
        return RowView(name, [])
    nll = None if model is None else model(row.to(next(model.parameters()).device)).nll.cpu()
    return view(row, encoder, parts, nll, name)


# ---------------------------------------------------------------- command


def settings(files: list[str], flags: list[str]) -> Run:
    """Of the script that the first record is for, on these files; where --init is a run folder,
    the run's own."""
    at = flags.index("--fields") + 1 if "--fields" in flags else len(flags)
    fields = takewhile(lambda flag: not flag.startswith("--"), flags[at:])
    number, record, _ = next(read_records(files[0], fields))
    kinds = {Chat: config.SFT, PreferencePair: config.DPO, Document: config.CPT}
    cls = kinds[type(examples_in(files[0], number, record)[0])]
    argv = ["--data", *files, *flags]
    c = arguments.parse(cls, argv)
    if not c.init:
        return c
    known = {f.name for f in dataclasses.fields(cls)} - set(OWN)
    base = {name: v for name, v in pretrained.settings_of(c.init).items() if name in known}
    return arguments.parse(cls, argv, base)


def main(argv: list[str] | None = None) -> None:
    parser = arguments.command_line("python -m nanomed.tools.show", __doc__)
    parser.add_argument("files", nargs="+", metavar="DATA", help="training files, first of all")
    parser.add_argument("-n", type=int, default=3, help="examples or, with --step, rows; default 3")
    parser.add_argument("--step", type=int, help="draw the rows of this step, from 0")
    parser.add_argument("--world_size", type=int, default=1, help="processes that share the step")
    parser.add_argument(
        "--cr", action="store_true", help="Context Relevance of each round of a dialogue"
    )
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
