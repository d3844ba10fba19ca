"""What is asked without --tasks: the samples' exam, and their chats that training holds out.

Everything is put into chats in the wording of training, without shots. Where training states a fact
decides what an accuracy can be: of facts that are stated nowhere it is chance.
"""

import dataclasses
from pathlib import Path
from typing import Any

from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.build.files import write_json
from nanomed.config import ROOT, SFT
from nanomed.distributed import World
from nanomed.evals.benchmarks import Prepared
from nanomed.evals.items import Item, Split
from nanomed.evals.requests import Request, requests_of
from nanomed.evals.score import encode
from nanomed.evals.tasks import tasks
from nanomed.hf import pretrained
from nanomed.model.scoring import Encoded, plan
from nanomed.records import read_json
from nanomed.records.exams import LETTERS
from nanomed.records.option_chats import as_item
from nanomed.stages.answers import held_out_chats
from nanomed.stages.world import STATED
from nanomed.text.template import Encoder

FOLDER = ROOT / "samples"
SUBJECTS = {key: f"facts {words}" for key, (_, words) in STATED.items()}


def held_out(model: str, encoder: Encoder, longest: int) -> Loader:
    """The samples' chats, split as the fine-tuning that made the model split them, which held out
    none of them where it had --val_data; as training does by default if the model is of no such
    run."""
    settings = pretrained.settings_of(model)
    own = settings if settings.get("stage") == SFT.stage else {}
    fraction = 0.0 if own.get("val_data") else own.get("val_fraction", SFT.val_fraction)
    seq_len = min(longest, SFT.seq_len)
    c = SFT(data=[str(FOLDER / "sft.jsonl")], val_fraction=fraction, seq_len=seq_len)
    return Loader(c, store.chats(c.data, encoder, c.seq_len, c.allow_drop))


def prepared(
    loader: Loader, encoder: Encoder, longest: int, capacity: int, limit: int | None = None
) -> list[Prepared]:
    """The exam, the option questions among the held-out chats, and the answers of all of those."""
    exam, split = requests_of(tasks()["samples_exam"], FOLDER, 0, "chat")
    records = [record for _, record, _ in read_json(str(split.files[0]))]
    exam = [
        dataclasses.replace(r, item=Item(r.item.exam, SUBJECTS[record["stated"]]))
        for r, record in zip(exam, records, strict=True)
    ]
    found = []
    for name, requests in (("samples_exam", exam), ("heldout_options", _options(loader))):
        requests = requests[:limit]
        encoded = [encode(r, encoder.tokenizer, [], longest, encoder) for r in requests]
        found.append((name, requests, encoded, split))
    chats = Split([], [Path(path) for path in loader.data.meta["files"]])
    found.append(("heldout_chats", *_answers(loader, limit), chats))
    return [
        Prepared(name, requests, encoded, plan(encoded, capacity), files)
        for name, requests, encoded, files in found
        if requests
    ]


def _options(loader: Loader) -> list[Request]:
    requests = []
    items = (as_item(chat) for _, chat in held_out_chats(loader))
    for i, item in enumerate(filter(None, items)):
        letters = list(LETTERS[: item.n_options])
        requests.append(
            Request(
                f"heldout_options/{i}",
                item.chat.turns[-1][1],
                letters,
                [],
                letters.index(item.letter),
                Item(None),
                letters,
                item.chat,
            )
        )
    return requests


def _answers(loader: Loader, limit: int | None) -> tuple[list[Request], list[Encoded]]:
    """What a held-out chat's assistant says is one continuation, whose loss is asked for."""
    requests, encoded = [], []
    for i in loader.val[:limit].tolist():
        for segment in loader.data[i]:
            ids = tuple(segment.ids.tolist())
            read = [(0, j - 1, ids[j]) for j in segment.trained.nonzero()[0].tolist()]
            encoded.append(Encoded([ids[:-1]], [read], 0))
            name = f"heldout_chats/{i}"
            requests.append(Request(name, "", [""], [], 0, Item(None), [""]))
    return requests, encoded


@dataclasses.dataclass(frozen=True)
class Screen:
    """What show_answers() needs of a run: somewhere to print, and a folder to keep answers in."""

    path: Path
    world: World

    def print(self, text: str = "") -> None:
        if self.world.is_main:
            print(text)

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)
