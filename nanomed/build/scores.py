"""Scores of chats: computed once, kept chat by chat, and written in the order of the files.

    OUT/cache/KEY.jsonl   of each round complexity and quality, of all but the first both losses;
                          the answers' loss
    OUT/cache/KEY.f32     the embeddings, in the same order
    OUT/scores.jsonl      what a selection reads, a line for each record

KEY is a hash of the model, the prompts and the way of asking; within it a chat is known by a hash
of what it says. So the same command goes on after a kill, another limit asks no model, and a chat
that stands twice is scored once.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from nanomed.build import context, deita
from nanomed.build.files import line_of, make_private, whole, whole_lines
from nanomed.build.shards import batched
from nanomed.distributed import from_all, from_main
from nanomed.locks import take
from nanomed.model.scoring import Encoded, Scorer, in_order, plan
from nanomed.records import Chat, read_chats
from nanomed.records.option_chats import OPTION
from nanomed.records.shapes import language
from nanomed.text.template import Encoder

NUMBERS = ("complexity", "quality", "score", "cr", "answer_loss")  # of a line of scores.jsonl
ROWS = 8  # rows of each rank between two writes to the disk: what a kill may cost


class Item(NamedTuple):
    """A record's chat; of several that differ in the question's wording, the first."""

    file: str
    record: int
    chat: Chat
    lang: str
    kind: str  # single_turn, multi_turn or option, and the language
    key: str


def read(files: list[str], fields: Sequence[str], most: int = 0) -> list[Item]:
    """The chats of all records, or of the first `most` of each file. Raises InputError naming file,
    record and field."""
    found = []
    for path in files:
        last = 0
        for number, chat, _ in read_chats(path, fields):
            if number == last:
                continue
            if most and number > most:
                break
            last = number
            said = json.dumps([chat.system, chat.turns])
            lang = language(" ".join(chat.texts()))
            key = hashlib.blake2b(said.encode(), digest_size=12).hexdigest()
            found.append(Item(path, number, chat, lang, f"{form_of(chat)}_{lang}", key))
    return found


def form_of(chat: Chat) -> str:
    if len(deita.rounds(chat.turns)) > 1:
        return "multi_turn"
    return "option" if len(OPTION.findall(chat.turns[0][1])) > 1 else "single_turn"


class Kept:
    """The scores in a folder that were computed in one way; one process at a time writes them."""

    def __init__(self, folder: Path, identity: dict[str, Any], width: int):
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        make_private(folder)
        self.lock = take(folder / f"{name}.lock", patience=3.0)
        self.paths, self.width = [folder / f"{name}.{end}" for end in ("jsonl", "f32")], width
        self.files = [open(path, "a+b") for path in self.paths]
        n_vectors = self.paths[1].stat().st_size // (4 * width) if width else None
        lines = [json.loads(line) for line in whole_lines(self.paths[0], n_vectors)]
        self.files[1].truncate(4 * width * len(lines))
        self.lines = {line["key"]: line for line in lines}

    def add(self, found: Sequence[tuple[dict[str, Any], np.ndarray]]) -> None:
        vectors = np.stack([vector for _, vector in found]).astype(np.float32)
        content = vectors.tobytes(), b"".join(line_of(line) for line, _ in found)
        for file, data in zip(reversed(self.files), content, strict=True):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.lines |= {line["key"]: line for line, _ in found}

    def vectors(self) -> tuple[dict[str, int], np.ndarray]:
        """(each key's row, [n,D] float32)"""
        shape = (len(self.lines), self.width)
        table = np.memmap(self.paths[1], np.float32, "r", shape=shape) if self.lines else None
        return {key: row for row, key in enumerate(self.lines)}, table


def missing(items: Sequence[Item], kept: Kept | None) -> list[Item]:
    """What is not kept yet, each chat once; on every rank what rank 0, which has `kept`, says."""
    known = from_main(kept and set(kept.lines))
    todo = {item.key: item for item in items if not item.chat.dropped}
    return [item for key, item in todo.items() if key not in known]


@dataclass(frozen=True)
class Measure:
    """A model that scores chats. Every rank has a whole copy of it."""

    scorer: Scorer
    encoder: Encoder
    targets: str
    parts: Sequence[str]  # of `digits` and `context`
    micro_tokens: int

    @property
    def longest(self) -> int:
        return self.scorer.model.config.max_seq_len

    def fill(self, todo: Sequence[Item], kept: Kept | None) -> None:
        """Scores these chats; rank 0 has `kept`. Every rank calls it."""
        world = self.scorer.world
        asker = deita.Asker(self.encoder, self.longest)
        with tqdm(total=len(todo), unit="chat", disable=None if world.is_main else True) as bar:
            for part in batched(todo, _size, ROWS * self.micro_tokens * world.size):
                found = self._measured([item.chat for item in part], asker)
                if world.is_main:
                    named = zip(part, found, strict=True)
                    kept.add([({"key": item.key} | line, v) for item, (line, v) in named])
                bar.update(len(part))
        if asker.shortened and world.is_main:
            print(f"{asker.shortened:,} prompts were cut to the {self.longest} tokens of the model")

    def _measured(self, chats: list[Chat], asker: deita.Asker) -> list[tuple[dict, np.ndarray]]:
        lines: list[dict[str, Any]] = [{} for _ in chats]
        vectors = [np.zeros(0)] * len(chats)
        if "digits" in self.parts:
            for line, turns in zip(lines, self._digits(chats, asker), strict=True):
                line["rounds"] = turns
        if "context" in self.parts:
            made = [context.dialogue(x, self.encoder, self.longest, self.targets) for x in chats]
            fits = [i for i, one in enumerate(made) if one]
            found = dict(zip(fits, self._context([made[i] for i in fits]), strict=True))
            unknown = ([], np.full(self.scorer.model.config.d_model, np.nan), np.nan)
            for i, one in enumerate(made):
                losses, vectors[i], own = found.get(i, unknown)
                lines[i] |= {"losses": losses, "cut": one.cut if one else None}
                lines[i]["answer_loss"] = None if np.isnan(own) else own
        return list(zip(lines, vectors, strict=True))

    def _digits(self, chats: list[Chat], asker: deita.Asker) -> list[list[list[float]]]:
        """[complexity, quality] of each round of each chat."""
        asked: dict[str, list[tuple[int, int, int, Encoded]]] = {}
        turns = [[[0.0, 0.0] for _ in deita.rounds(chat.turns)] for chat in chats]
        for i, chat in enumerate(chats):
            for t, texts in enumerate(deita.exchanges(chat)):
                for k, kind in enumerate(deita.ASKED):
                    name, encoded = asker.encode(kind, *texts)
                    asked.setdefault(name, []).append((i, t, k, encoded))
        for _, requests in sorted(asked.items()):  # those of one prompt share its beginning
            encoded = [request[-1] for request in requests]
            rows = self.scorer.run(encoded, plan(encoded, self.micro_tokens))
            logps = torch.tensor([six for row in rows for six in row])
            for (i, t, k, _), value in zip(requests, deita.expectation(logps), strict=True):
                turns[i][t][k] = float(value)
        return turns

    def _context(self, found: list[context.Dialogue]) -> list[tuple[list, np.ndarray, float]]:
        world, results = self.scorer.world, []
        rows = in_order([one.n_tokens for one in found], self.micro_tokens)
        for start in range(0, len(rows), world.size):
            mine = rows[start + world.rank : start + world.rank + 1]
            ran = context.run(self.scorer.model, [found[i] for i in mine[0]]) if mine else []
            parts = from_all([(losses, vector.numpy(), own) for losses, vector, own in ran])
            results += [one for part in parts for one in part]
        return results


def _size(item: Item) -> int:
    """In characters: about as many tokens, or more."""
    return sum(map(len, item.chat.texts()))


def write(path: Path, items: Sequence[Item], lines: dict[str, dict], how: str) -> list[dict]:
    """Writes OUT/scores.jsonl and returns its lines. `how`: a chat's score is the mean or the sum
    of its rounds'."""
    found = []
    for item in items:
        line = {"file": item.file, "record": item.record}
        line |= dict.fromkeys(NUMBERS, None)
        line |= {"cr_turns": [], "rounds": None, "kind": item.kind, "dropped": item.chat.dropped}
        known = lines.get(item.key, {})
        line["answer_loss"] = known.get("answer_loss")
        if known.get("rounds") and all(None not in turn for turn in known["rounds"]):
            line["rounds"] = known["rounds"]
            means = [sum(column) / len(column) for column in zip(*known["rounds"], strict=True)]
            line |= dict(zip(("complexity", "quality"), means, strict=True))
            line["score"] = deita.score_of(known["rounds"], how)
        is_dialogue = item.kind.startswith("multi_turn")
        if known.get("losses"):
            line["cr_turns"] = context.relevance(known["losses"])
            defined = [cr for cr in line["cr_turns"] if cr is not None]
            line["cr"] = sum(defined) / len(defined) if defined else None
        line["cr_is_missing"] = is_dialogue and "losses" in known and line["cr"] is None
        if known.get("cut"):
            line["turns_cut"] = known["cut"]
        found.append(line)
    with whole(path) as file:
        for line in found:
            file.write(line_of(line))
    return found


def quantiles(lines: Sequence[dict]) -> list[str]:
    """How the scores of all chats are spread, for whoever is about to choose a limit."""
    found = ["5, 25, 50, 75 and 95% of the chats are below"]
    for name in NUMBERS:
        values = [line[name] for line in lines if line[name] is not None]
        if values:
            shown = ", ".join(
                f"{v:.2f}" for v in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
            )
            found.append(f"  {name:<11} {shown} ({len(values):,} chats)")
    return found
