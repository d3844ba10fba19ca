"""What the scores are worth: planted defects found, real histories told from others, and what a
selection does for fine-tuning. `pytest -m slow -s` prints the figures."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.build import context
from nanomed.build.scorer import digit_loss
from nanomed.config import SFT
from nanomed.distributed import start
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.records import Chat, chats_of, read_json, read_pairs
from nanomed.run.log import RunFolder
from nanomed.stages import stage, world
from nanomed.training.step import evaluate
from nanomed.training.trainer import fit
from tests.build import scored
from tests.build.planted import (
    CPU,
    DEFECTS,
    halves,
    limits_that_keep,
    measured,
    passes,
    planted,
    trained,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scored_world(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """(records with defects, their lines of scores.jsonl)"""
    folder = tmp_path_factory.mktemp("planted") / "scorer"
    clean, pool = halves()
    records = planted(pool)
    trained(folder, clean, epochs=5)
    return records, measured(folder, records)


def test_planted_defects_are_found(scored_world):
    """The scorer has seen other chats of the same world, and ladders made of those. It learns what
    a question of one word is; it does not know the facts of chats that it has not read, so of the
    other defects it finds hardly more than a tenth, as of good chats."""
    records, lines = scored_world
    good = [line for r, line in zip(records, lines, strict=True) if not r["defect"]]
    limits = limits_that_keep(good, 0.9)
    kept = np.mean([passes(x, limits) for x in good])
    print(f"\n{len(records)} chats, good ones kept: {kept:.0%}")
    recall = {}
    for defect in DEFECTS:
        mine = [line for r, line in zip(records, lines, strict=True) if r["defect"] == defect]
        gone = [not passes(line, limits) for line in mine]
        recall[defect] = np.mean(gone)
        print(f"{defect:<18} {len(mine):>4} planted, {np.mean(gone):.0%} found")
    assert kept >= 0.9
    assert recall["one_word"] > 0.5


def test_fine_tuning_on_the_selected_half_beats_a_random_half(scored_world, tmp_path):
    """Three seeds each: held-out loss of clean chats, and right answers of the exam."""
    records, lines = scored_world
    good = [line for r, line in zip(records, lines, strict=True) if not r["defect"]]
    limits = limits_that_keep(good, 0.9)
    order = sorted(
        range(len(records)),
        key=lambda i: (not passes(lines[i], limits), -lines[i]["score"], i),
    )
    half = len(records) // 2
    rng = np.random.default_rng(0)
    results = {"selected": [], "random": []}
    for seed in range(3):
        chosen = {"selected": order[:half], "random": rng.permutation(len(records))[:half]}
        for name, rows in chosen.items():
            path = scored.write(
                tmp_path / f"{name}{seed}.jsonl", [records[i] for i in sorted(rows)]
            )
            results[name].append(fine_tuned(path, tmp_path / f"run-{name}{seed}", seed))
            print(name, seed, results[name][-1], flush=True)
    losses = {name: np.mean([loss for loss, _ in runs]) for name, runs in results.items()}
    right = {name: np.mean([n for _, n in runs]) for name, runs in results.items()}
    print(f"held-out loss {losses}, right answers {right}")
    assert losses["selected"] < losses["random"] and right["selected"] > right["random"]


def fine_tuned(path: Path, out: Path, seed: int) -> tuple[float, int]:
    """(loss of chats of the other half, right texts of the exam)"""
    clean = scored.write(path.with_name("held_out.jsonl"), halves()[0][:150])
    settings = SFT.FRESH | {"epochs": 5, "seq_len": 512, "log_every": 50, "seed": seed}
    c = SFT(data=[str(path)], val_data=[str(clean)], out=str(out), **settings)
    config, encoder = stage.model_and_encoder(c)
    data = store.chats([*c.data, *c.val_data], encoder, c.seq_len, c.allow_drop)
    facts = {fact for record in halves()[1] for fact in record["facts"]}
    items = [r for _, r, _ in read_json(str(world.EXAM)) if facts.issuperset(r["facts"])]
    with start(CPU) as alone:
        loader = Loader.of(c, data, alone.rank, alone.size)
        model = stage.build_model(c, config, alone)
        run = RunFolder(c, alone, stage.identity(c, config, encoder, loader))
        fit(c, model, loader, digit_loss, run)
        loss = evaluate(model, loader, digit_loss, run, loader.n_steps)
        return float(loss), sum(world.right_texts(model, encoder, items))


# ---------------------------------------------------------------- histories


def auc(real: list[float], others: list[float]) -> float:
    a, b = np.array(real)[:, None], np.array(others)[None]
    return float((b > a).mean() + (b == a).mean() / 2)


def relevances(model, encoder, chats: list[Chat], targets: str = "turn") -> list[float]:
    longest = min(4096, model.config.max_seq_len)
    found = [context.dialogue(chat, encoder, longest, targets) for chat in chats]
    values = []
    for row in context.rows(found, 4096):
        for losses, _ in context.run(model, [found[i] for i in row]):
            defined = [cr for cr in context.relevance(losses) if cr is not None]
            values.append(sum(defined) / len(defined))
    return values


def with_other_histories(chats: list[Chat]) -> list[Chat]:
    """Each dialogue's later turns behind the first one of another dialogue."""
    others = chats[len(chats) // 2 :] + chats[: len(chats) // 2]
    return [
        Chat([*other.turns[:2], *chat.turns[2:]]) for chat, other in zip(chats, others, strict=True)
    ]


@pytest.mark.xfail(reason="5 million parameters learn no histories from 250 dialogues: AUC 0.51")
def test_real_histories_beat_shuffled_ones_on_cmtmedqa(shared_data, tmp_path):
    records = [r for _, r, _ in read_json(str(shared_data / "cmtmedqa_multi_turn.json"))]
    records = [r for r in records if r.get("history") and "instruction" in r]
    assert len(records) == 500
    learn, test = records[::2], [chats_of(r)[0] for r in records[1::2]]
    folder = dialogues_learned(scored.write(tmp_path / "half.jsonl", learn), tmp_path / "model")
    _, encoder = pretrained.describe(folder)
    model = pretrained.load(folder, CPU, torch.float32)
    real = relevances(model, encoder, test)
    others = relevances(model, encoder, with_other_histories(test))
    print(f"\nCMtMedQA: AUC {auc(real, others):.3f}, medians {np.median(real):.3f}, "
          f"{np.median(others):.3f}")  # fmt: skip
    assert auc(real, others) > 0.8


def dialogues_learned(path: Path, out: Path) -> Path:
    flags = "--seq_len 1024 --epochs 5 --batch_size 4 --lr 2e-3 --val_fraction 0.05 --log_every 20"
    command = [sys.executable, str(ROOT / "train_cpt.py"), "--data", str(path), "--out", str(out)]
    subprocess.run([*command, *flags.split()], cwd=path.parent, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def real_model():
    folder = Path(
        os.environ.get("NANOMED_REAL_MODEL") or Path.home() / ".cache/nanomed/smollm2-135m"
    )
    if not (folder / "tokenizer_config.json").exists():
        pytest.skip("no real model: docs/real_model.py makes one, NANOMED_REAL_MODEL names it")
    _, encoder = pretrained.describe(folder)
    model = pretrained.load(folder, CPU, torch.float32)
    pack_linears(model)
    return model, encoder


def test_a_real_model_knows_whose_history_it_is(real_model, shared_data):
    """24 English dialogues of two turns, each text cut at 200 characters: 135 million parameters
    are slow on a CPU."""
    chats = []
    for _, pair, _ in read_pairs(str(shared_data / "general/lf_dpo_en_demo.json")):
        turns = [(role, text[:200]) for role, text in pair.turns]
        if [role for role, _ in turns[:3]] == ["user", "assistant", "user"]:
            answer = turns[3] if len(turns) > 3 else ("assistant", pair.chosen[:200])
            chats.append(Chat([*turns[:3], answer]))
    real = relevances(*real_model, chats[:24])
    others = relevances(*real_model, with_other_histories(chats[:24]))
    print(f"\nEnglish: AUC {auc(real, others):.3f}, medians {np.median(real):.3f}, "
          f"{np.median(others):.3f}")  # fmt: skip
    assert auc(real, others) > 0.8


def test_a_turn_that_repeats_is_near_0(real_model):
    texts = [
        "My knee hurts when I climb stairs. What could it be?",
        "It may be wear of the cartilage behind the kneecap, which stairs strain.",
        "How is a urinary tract infection found out?",
        "A urine sample is tested for white cells and nitrite, then cultured.",
    ]
    roles = ["user", "assistant"] * 2
    said = lambda parts: Chat(list(zip(roles, parts, strict=True)))  # noqa: E731
    repeated, unrelated = relevances(*real_model, [said(texts[:2] * 2), said(texts)])
    print(f"\nrepeated {repeated:.3f}, unrelated {unrelated:.3f}")
    assert repeated < 0.25 and unrelated > 0.8
