"""A small scorer, trained here: labelled chats become prompts whose answer is a digit.

Where nothing is labelled, ladders can be made, as Deita made its labels: a text whose quality is
known is made worse step by step, here by rules. Such a scorer knows those rules and nothing else.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import Row
from nanomed.build.deita import ASKED, chat_asked, exchanges
from nanomed.build.files import line_of, whole
from nanomed.build.labels import prompts
from nanomed.build.scores import Item
from nanomed.config import SFT, InputError
from nanomed.distributed import from_main, start
from nanomed.model.decoder import Scores
from nanomed.records import chats_of, read_records
from nanomed.run.log import RunFolder
from nanomed.stages import stage
from nanomed.training.trainer import fit

FIELDS = dict(zip(("complexity", "quality"), ASKED, strict=True))  # of a labelled record


def labelled(paths: Sequence[str]) -> list[dict]:
    """Training chats of files whose records are chats of one turn with `complexity` or `quality`, 1
    to 6. Raises InputError naming file, record and field."""
    found = []
    for path in paths:
        for number, record, _ in read_records(path):
            where = f"{path}, record {number}"
            values = {n: record[n] for n in FIELDS if isinstance(record, dict) and n in record}
            if not values:
                raise InputError(f"{where}: neither 'complexity' nor 'quality' labels it")
            texts = exchanges(chats_of(record)[0])
            if len(texts) > 1:
                raise InputError(f"{where}: a label is of one question and answer, not of {texts}")
            for name, value in values.items():
                if value not in range(1, 7) or isinstance(value, bool):
                    raise InputError(f"{where}: field {name!r}: {value!r} is none of 1 to 6")
                found.append(_training(FIELDS[name], *texts[0], int(value)))
    return found


def ladders(items: Sequence[Item], n: int = 1) -> Iterator[dict]:
    """Training chats out of chats that are taken to be good. Complexity: 1, one word of a question;
    3, a question; 5, a question with options; 6, two questions at once. Quality: 6, the answer as
    it stands; 3, its first half; 1, the answer to another question of its kind. Of each round n
    steps, chosen by a hash: a ladder's other steps come from other chats."""
    of_kind: dict[str, list[Item]] = {}
    for item in items:
        if not item.chat.dropped:
            of_kind.setdefault(item.kind, []).append(item)
    for k, item in product(range(n), chain(*of_kind.values())):
        same = of_kind[item.kind]
        for question, answer in exchanges(item.chat):
            other = exchanges(same[_hash(f"{k}{question}", len(same))].chat)
            (also, wrong), *_ = [pair for pair in other if pair[1] != answer] or [("", "")]
            whole = 5 if item.kind.startswith("option") else 3
            word = question.split()[-1][:12] if item.lang == "en" else question[-4:]
            asked = {1: word, whole: question, 6: f"{question}\n{also}"}
            told = {6: answer, 3: answer[: len(answer) // 2], 1: wrong}
            step = _hash(f"{k}{answer}", 3)
            if _hash(f"{k}{question}{answer}", 2):
                digit = sorted(asked)[step]
                yield _training("complexity", asked[digit], "", digit)
            elif told[digit := sorted(told)[step]].strip():
                yield _training("answer_quality", question, told[digit], digit)


def plain(items: Sequence[Item]) -> Iterator[dict]:
    """The chats themselves, for a scorer that starts from nothing and has a language to learn."""
    for item in items:
        if not item.chat.dropped:
            turns = [{"role": role, "content": text} for role, text in item.chat.turns]
            yield {"messages": turns, "system": item.chat.system, "kind": "chat"}


def _hash(text: str, n: int) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % n


def _training(kind: str, question: str, answer: str, digit: int) -> dict[str, Any]:
    _, chat = chat_asked(kind, question, answer)
    turns = [{"role": "user", "content": chat.turns[0][1]}]
    turns.append({"role": "assistant", "content": str(digit)})
    return {"messages": turns, "system": chat.system, "kind": kind}


def train(chats: Sequence[dict], folder: Path, where: torch.device, **given: Any) -> Path:
    """The folder of a scorer that fit() trained on these chats. What is there already is not
    trained again, and what was stopped goes on."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = folder.with_name(f"{folder.name}-labels.jsonl")
    lines = b"".join(map(line_of, chats))
    name = hashlib.sha256(lines + repr((prompts(), sorted(given.items()))).encode()).hexdigest()
    begun, mark = made.with_suffix(".sha256"), folder / "labels.sha256"
    if from_main(mark.exists() and mark.read_text("utf-8") == name):
        return folder
    if from_main(folder.exists() and not (begun.exists() and begun.read_text("utf-8") == name)):
        raise InputError(f"{folder} was trained on other labels or settings: choose another --out")
    with whole(made) as file:
        file.write(lines)
    begun.write_text(name, "utf-8")
    base = {} if given.get("init") else SFT.FRESH
    c = SFT(**{**base, **given}, data=[str(made)], out=str(folder), resume="auto")
    config, encoder = stage.model_and_encoder(c)
    data = store.chats(c.data, encoder, c.seq_len, c.allow_drop)
    with start(where) as world:
        loader = Loader(c, data, world.rank, world.size)
        model = stage.build_model(c, config, world)
        run = RunFolder(c, world, stage.identity(c, config, encoder, loader))
        stage.announce(c, model, encoder, loader, run)
        fit(c, model, loader, digit_loss, run)
        if world.is_main:
            mark.write_text(name, "utf-8")
    return folder


def digit_loss(scores: Scores, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
    """As in fine-tuning: what is learned of these chats is the digit and the end of the turn."""
    return scores.nll.sum(), {"accuracy": scores.right.sum()}
