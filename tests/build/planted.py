"""The sample world with defects planted in it, and what a selection makes of them."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import build_sft
from nanomed.build import scorer, scores
from nanomed.records import read_json
from nanomed.store.cache import group_key
from tests.build import scored
from tests.conftest import ROOT

CPU = torch.device("cpu")
DEFECTS = ("wrong_answer", "another_dialogue", "repeated_turn", "one_word")


def halves() -> tuple[list[dict], list[dict]]:
    """The good chats of the samples' pool: those that train what scores, and those that are chosen
    from. A group stands in one of them."""
    found: tuple[list, list] = ([], [])
    for _, record, _ in read_json(str(ROOT / "samples/pool.jsonl.gz")):
        if record["category"] == "good":
            found[group_key(record["group"]) % 2].append(record)
    return found


def follows_on(record: dict) -> bool:
    """Whether its second question leaves out what the first one names (what causes it?)."""
    subjects = {fact.partition("/")[0] for fact in record["tags"]}
    return len(record["tags"]) > 1 and len(subjects) == 1


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
            other = rng.choice([r for r in same if not {*r["tags"]} & {*record["tags"]}])
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


def trained(folder: Path, records: list[dict], **given) -> Path:
    """A run folder of train_sft.py's, from nothing, on these chats."""
    data = scored.write(folder.with_name(f"{folder.name}.jsonl"), records)
    flags = {"seq_len": 512, "epochs": 6, "val_fraction": 0.05, "log_every": 100, "device": "cpu"}
    flags |= {"data": data, "out": folder} | given
    command = [sys.executable, str(ROOT / "train_sft.py")]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    subprocess.run(command, cwd=folder.parent, check=True, capture_output=True)
    return folder


def scorer_of(folder: Path, init: Path, records: list[dict]) -> Path:
    """A scorer that learned ladders of these chats, from a model that knows them."""
    path = scored.write(folder.with_name(f"{folder.name}-clean.jsonl"), records)
    chats = [*scorer.ladders(scores.read([str(path)], []), 3)]
    given = {"epochs": 2, "batch_size": 16, "lr": 5e-4, "seq_len": 512, "init": str(init)}
    return scorer.train(chats, folder, CPU, **given, device="cpu", log_every=50)


def measured(out: Path, records: list[dict], folder: Path, *parts: str) -> list[dict]:
    """Lines of scores.jsonl with `digits` or `context` of one model, as build_sft.py makes them."""
    path = scored.write(out.with_name(f"{out.name}.jsonl"), records)
    items, lines = scores.read([str(path)], []), {}
    c = build_sft.Chats(data=[str(path)], device="cpu", micro_tokens=2048)
    build_sft.measured(c, items, out, str(folder), list(parts), CPU, lines)
    return scores.write(out / "scores.jsonl", items, lines, "mean")


def limits_that_keep(lines: list[dict], share: float) -> dict[str, float]:
    """Of these good chats, each limit passed by as many, so that `share` of them is kept."""
    crs = [line["cr"] for line in lines if line["cr"] is not None] or [0.0]
    for cut in np.arange(0.2, 0, -0.0025):
        found = {
            "min_score": float(np.quantile([line["score"] for line in lines], cut)),
            "min_cr": float(np.quantile(crs, cut / 4)),
            "max_cr": float(np.quantile(crs, 1 - cut)),
            "max_answer_loss": float(np.quantile([x["answer_loss"] for x in lines], 1 - cut)),
        }
        if sum(passes(line, found) for line in lines) >= share * len(lines):
            break
    return found


def selected_half(
    records: list[dict], lines: list[dict], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """(selected, unselected): of each kind as many as half of it. Selected are drawn among those
    that pass the limits of their kind, the others among all. The best ones by score would be about
    fewer facts: a score depends on what a chat is about, too."""
    selected, unselected = [], []
    for kind in sorted({record["kind"] for record in records}):
        mine = [i for i, record in enumerate(records) if record["kind"] == kind]
        limits = limits_that_keep([lines[i] for i in mine if not records[i]["defect"]], 0.9)
        passing = [i for i in mine if passes(lines[i], limits)]
        for rows, drawn_from in ((selected, passing), (unselected, mine)):
            rows += rng.permutation(drawn_from)[: len(mine) // 2].tolist()
    assert len(selected) == len(unselected)
    return sorted(selected), sorted(unselected)


def passes(line: dict, limits: dict[str, float]) -> bool:
    fits = line["cr"] is None or limits["min_cr"] <= line["cr"] <= limits["max_cr"]
    right = line["answer_loss"] <= limits["max_answer_loss"]
    return fits and right and line["score"] >= limits["min_score"]
