"""What a run shows of its text: an example with its mask, and a few held-out questions answered by
the model beside their reference answers."""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from nanomed.batches.loader import Loader
from nanomed.config import ROOT
from nanomed.model.decoder import Aquila
from nanomed.model.generation import greedy_in_lockstep
from nanomed.records import CHAT, PAIR, Chat, PreferencePair, examples_of, read_records
from nanomed.run.log import RunFolder
from nanomed.store import Store, group_key
from nanomed.text.template import Encoder

SAMPLES = ROOT / "samples"
SHOWN = 5  # held-out questions that a run prints
SEEN, UNSEEN = "fact stated in training, in other words", "fact not stated in training"


def show_example(encoder: Encoder, loader: Loader, run: RunFolder) -> None:
    """Prints the first training example as the model gets it."""
    i = int(loader.train[0])
    run.print(f"example {i}, what is learned between ⟦ and ⟧ (nanomed.tools.show draws more):")
    for ids, trained, _ in loader.data[i]:
        run.print("  " + marked(encoder, ids, trained).replace("\n", "\n  ").rstrip())


def marked(encoder: Encoder, ids: Iterable[int], trained: Iterable[bool]) -> str:
    text = ""
    for learned, run_of in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        part = encoder.tokenizer.decode([int(i) for i, _ in run_of])
        text += f"⟦{part}⟧" if learned else part
    return text


def show_answers(
    model: Aquila,
    encoder: Encoder,
    loader: Loader,
    run: RunFolder,
    who: str = "the best checkpoint",
) -> None:
    """Prints held-out questions with the model's greedy answers, and keeps them in answers.json.
    Chats that leave no room for an answer, as training cuts them, are not asked. Every rank calls
    it."""
    questions, prompts = [], []
    for chat, mark in pick_questions(loader):
        prompt = encoder.prompt(replace(chat, turns=chat.turns[:-1]))
        if len(prompt) < model.config.max_seq_len:
            questions.append((chat, mark))
            prompts.append(prompt)
    if not questions:
        return
    stop = {encoder.turn_end, encoder.document_end}
    answers = greedy_in_lockstep(model, prompts, stop, max_new=64)
    run.print(f"held-out questions, answered by {who} (greedy):")
    kept = []
    for (chat, mark), ids in zip(questions, answers, strict=True):
        (_, question), (_, reference) = chat.turns[-2:]
        answer = encoder.tokenizer.decode(ids)
        one = {"history": chat.turns[:-2], "question": question, "reference": reference}
        kept.append(one | {"answer": answer, "mark": mark})
        run.print("")
        asked = question + (f"   [{mark}]" if mark else "")
        now = [("question", asked), ("reference", reference), ("answer", answer)]
        for name, text in (*chat.turns[:-2], *now):
            run.print(said(name, text))
    run.print()
    if run.world.is_main:
        path = run.path / "answers.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        run.write_json(path.name, earlier | {who: kept})


def said(name: str, text: str) -> str:
    """With further lines, as options are, below its first."""
    return f"  {name:<9}  " + text.replace("\n", "\n" + " " * 13)


def on_samples(loader: Loader) -> bool:
    return all(Path(path).resolve().parent == SAMPLES for path in loader.data.meta["files"])


def pick_questions(loader: Loader) -> list[tuple[Chat, str]]:
    """(chat, mark) of held-out chats: of the samples, whose `tags` name facts, each of another kind
    as far as possible, marked by whether training states them; elsewhere the first, unmarked."""
    held_out = held_out_chats(loader)
    if not on_samples(loader):
        return [(chat, "") for _, chat in held_out[:SHOWN]]
    stated = records_of(loader.data, loader.train)
    taught = {fact for record in stated for fact in record["tags"]}
    first_of_kind = {record.get("kind"): (record, chat) for record, chat in reversed(held_out)}
    varied = {id(chat): (record, chat) for record, chat in (*first_of_kind.values(), *held_out)}
    return [
        (chat, SEEN if taught.issuperset(record["tags"]) else UNSEEN)
        for record, chat in [*varied.values()][:SHOWN]
    ]


def held_out_chats(loader: Loader) -> list[tuple[dict, Chat]]:
    """(record, chat); a record may hold chats of both sides of the split. A preference pair is the
    chat that ends with its chosen answer."""
    keys = {*loader.data.keys[loader.val].tolist()}
    chats = ((r, chat) for r in records_of(loader.data, loader.val) for chat in _chats_in(r))
    return [(r, chat) for r, chat in chats if not chat.dropped and group_key(chat.group) in keys]


def _chats_in(record: dict) -> list[Chat]:
    found = examples_of(record, PAIR, CHAT)
    if not isinstance(found[0], PreferencePair):
        return found
    (pair,) = found
    turns = [*pair.turns, ("assistant", pair.chosen)]
    return [Chat(turns, pair.system, raw=pair.raw, group=pair.group)]


def records_of(store: Store, examples: Iterable[int]) -> list[dict]:
    """The records, as they stand in their files, that these examples were read from."""
    wanted: dict[str, set[int]] = {}
    for i in examples:
        file, number = store.where(i)
        wanted.setdefault(file, set()).add(number)
    return [
        record
        for file, numbers in wanted.items()
        for number, record, _ in read_records(file, store.meta["fields"])
        if number in numbers
    ]
