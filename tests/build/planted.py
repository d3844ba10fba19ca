"""The sample world with defects planted in it, and what a selection makes of them."""

import random
from pathlib import Path

import numpy as np
import torch

from nanomed.build import scorer, scores
from nanomed.distributed import World
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer
from nanomed.records import chats_of, read_json
from nanomed.store.cache import group_key
from tests.build import scored
from tests.conftest import ROOT

CPU = torch.device("cpu")
DEFECTS = ("wrong_answer", "another_dialogue", "repeated_turn", "one_word")


def halves() -> tuple[list[dict], list[dict]]:
    """The samples' chats: those that train what scores, and those that are chosen from. A group
    stands in one of them."""
    found: tuple[list, list] = ([], [])
    for _, record, _ in read_json(str(ROOT / "samples/sft.jsonl")):
        found[group_key(record["group"]) % 2].append(record)
    return found


def follows_on(record: dict) -> bool:
    """Whether its second question leaves out what the first one names (what causes it?)."""
    subjects = {fact.partition("/")[0] for fact in record["facts"]}
    return len(record["facts"]) > 1 and len(subjects) == 1


def planted(records: list[dict], share: float = 0.3, seed: int = 0) -> list[dict]:
    """The records, with a defect in `share` of them, named in `defect`. Those of turns are for
    dialogues. Half of the world's dialogues ask two questions that have nothing to do with each
    other; so another dialogue's rounds are a defect only if they are of one that follows on."""
    rng, made = random.Random(seed), []
    follow = [r for r in records if follows_on(r)]
    for record in records:
        turns, kind = [dict(turn) for turn in record["messages"]], ""
        if rng.random() < share:
            kind = rng.choice(DEFECTS if len(turns) > 2 else (DEFECTS[0], DEFECTS[3]))
            donors = follow if kind == "another_dialogue" else records
            same = [r for r in donors if r["kind"] == record["kind"]]
            other = rng.choice([r for r in same if not {*r["facts"]} & {*record["facts"]}])
            if kind == "wrong_answer":
                turns[-1] = other["messages"][-1]
            elif kind == "another_dialogue":
                turns[2:] = other["messages"][2:]
            elif kind == "repeated_turn":
                turns[2:] = turns[:2]
            else:
                text = turns[0]["content"]
                turns[0]["content"] = text.split()[-1] if text.isascii() else text[-5:-1]
        made.append(record | {"messages": turns, "defect": kind})
    return made


def trained(folder: Path, records: list[dict], epochs: int) -> Path:
    """A scorer that fit() trained on ladders of these chats, and on the chats."""
    beside = scored.write(folder.with_name("clean.jsonl"), records)
    items = scores.read([str(beside)], [])
    chats = [*scorer.ladders(items), *scorer.plain(items)]
    given = {"epochs": epochs, "batch_size": 16, "lr": 1e-3, "seq_len": 512, "device": "cpu"}
    return scorer.train(chats, folder, CPU, **given, log_every=20)


def measured(folder: Path, records: list[dict], targets: str = "assistant") -> list[dict]:
    """Lines of scores.jsonl."""
    path = scored.write(folder.with_name("planted.jsonl"), records)
    items = scores.read([str(path)], [])
    _, encoder = pretrained.describe(folder)
    model = pretrained.load(folder, CPU, torch.float32)
    pack_linears(model)
    kept = scores.Kept(folder.with_name("cache"), {"of": targets}, model.config.d_model)
    measure = Scorer(model, World(0, 1, CPU))
    scores.Measure(measure, encoder, targets, ("digits", "context"), 4096).fill(
        scores.missing(items, kept), kept
    )
    return scores.write(folder.with_name("scores.jsonl"), items, kept.lines, "mean")


def limits_that_keep(lines: list[dict], share: float) -> dict[str, float]:
    """Of these good chats, each limit passed by as many, so that `share` of them is kept."""
    for cut in np.arange(0.2, 0, -0.0025):
        crs = [line["cr"] for line in lines if line["cr"] is not None]
        found = {
            "min_score": float(np.quantile([line["score"] for line in lines], cut)),
            "min_cr": float(np.quantile(crs, cut / 2)),
            "max_cr": float(np.quantile(crs, 1 - cut)),
        }
        if sum(passes(line, found) for line in lines) >= share * len(lines):
            break
    return found


def passes(line: dict, limits: dict[str, float]) -> bool:
    fits = line["cr"] is None or limits["min_cr"] <= line["cr"] <= limits["max_cr"]
    return fits and line["score"] >= limits["min_score"]


def chat_turns(record: dict) -> list[tuple[str, str]]:
    return chats_of(record)[0].turns
