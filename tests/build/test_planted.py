"""What the scores are worth: planted defects found, and what a selection does for fine-tuning.
`NANOMED_REAL_MODEL=FOLDER pytest -m slow -s tests/build/test_planted.py` prints the figures."""

from pathlib import Path

import numpy as np
import pytest

from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.build.scorer import digit_loss
from nanomed.config import SFT
from nanomed.distributed import start
from nanomed.records import read_json
from nanomed.run.log import RunFolder
from nanomed.stages import stage, world
from nanomed.training.step import evaluate
from nanomed.training.trainer import fit
from tests.build import scored
from tests.build.planted import (
    CPU,
    DEFECTS,
    follows_on,
    halves,
    limits_that_keep,
    measured,
    passes,
    planted,
    scorer_of,
    selected_half,
    trained,
)
from tests.build.real import real_model_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known_world(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """(records with defects, their lines of scores.jsonl). The model that was fine-tuned on the
    other half of the world's chats knows its facts: the scorer begins as that, and its own loss of
    the answers counts."""
    home = tmp_path_factory.mktemp("planted")
    clean, pool = halves()
    base = trained(home / "base", clean)
    scorer = scorer_of(home / "scorer", base, clean)
    records = planted(pool)
    lines = measured(home / "scores", records, scorer, "digits")
    own = measured(home / "own", records, base, "context")
    return records, [
        line | {"answer_loss": mine["answer_loss"], "cr": None}
        for line, mine in zip(lines, own, strict=True)
    ]


def shares_found(records: list[dict], lines: list[dict], limits: dict) -> dict[str, float]:
    """Of each defect, by limits that keep nine tenths of the good chats; printed, with the share of
    good ones and of those that the world itself makes of two questions about nothing in common."""
    kinds = [r["defect"] or "good" for r in records]
    for i, record in enumerate(records):
        if kinds[i] == "good" and len(record["messages"]) > 2 and not follows_on(record):
            kinds[i] = "unrelated"
    found = {}
    print()
    for kind in ("good", "unrelated", *DEFECTS):
        gone = [not passes(x, limits) for x, k in zip(lines, kinds, strict=True) if k == kind]
        found[kind] = float(np.mean(gone)) if gone else float("nan")
        print(f"{kind:<18} {len(gone):>4} chats, {found[kind]:.0%} dropped")
    return found


def test_a_model_that_knows_the_world_finds_poor_questions_and_wrong_answers(known_world):
    """By complexity times quality and by its loss of the answers."""
    records, lines = known_world
    good = [line for r, line in zip(records, lines, strict=True) if not r["defect"]]
    limits = limits_that_keep(good, 0.9)
    found = shares_found(records, lines, limits)
    assert np.mean([passes(line, limits) for line in good]) > 0.89
    assert found["one_word"] > 0.8 and found["wrong_answer"] > 0.6


def test_context_relevance_finds_rounds_that_repeat_and_rounds_of_other_dialogues(
    known_world, tmp_path
):
    """Of a real model, whose language is English and the dialogues Chinese. Good are dialogues
    whose second question follows from the first one."""
    real = real_model_folder()
    records, lines = known_world
    dialogues = [i for i, r in enumerate(records) if len(r["messages"]) > 2]
    unrelated = [i for i in dialogues if not (records[i]["defect"] or follows_on(records[i]))]
    mine = sorted({*dialogues} - {*unrelated[40:]})
    chosen = [records[i] for i in mine]
    crs = measured(tmp_path / "cr", chosen, real, "context")
    both = [lines[i] | {"cr": cr["cr"]} for i, cr in zip(mine, crs, strict=True)]
    good = [line for r, line in zip(chosen, both, strict=True) if follows_on(r) and not r["defect"]]
    found = shares_found(chosen, both, limits_that_keep(good, 0.9))
    assert found["good"] <= 0.1 and found["repeated_turn"] > 0.95
    assert found["another_dialogue"] > 0.8 and found["unrelated"] > 0.8


def test_fine_tuning_on_the_selected_half_beats_a_random_half(known_world, tmp_path):
    """Three seeds each: the loss of clean chats of the other half, and right texts of the exam."""
    records, lines = known_world
    rng, results = np.random.default_rng(0), {"selected": [], "random": []}
    for seed in range(3):
        halves_of_each = selected_half(records, lines, rng)
        for (name, runs), rows in zip(results.items(), halves_of_each, strict=True):
            chosen = [records[i] for i in rows]
            path = scored.write(tmp_path / f"{name}{seed}.jsonl", chosen)
            runs.append(fine_tuned(path, tmp_path / f"run-{name}{seed}", seed))
            defects = np.mean([bool(r["defect"]) for r in chosen])
            print(f"{name} {seed}: {defects:.0%} defects, {runs[-1]}", flush=True)
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
    facts = {fact for record in halves()[1] for fact in record["tags"]}
    items = [r for _, r, _ in read_json(str(world.EXAM)) if facts.issuperset(r["tags"])]
    with start(CPU) as alone:
        loader = Loader(c, data, alone.rank, alone.size)
        model = stage.build_model(c, config, alone)
        run = RunFolder(c, alone, stage.identity(c, config, encoder, loader))
        fit(c, model, loader, digit_loss, run)
        loss = evaluate(model, loader, digit_loss, run, loader.n_steps)
        return float(loss), sum(world.right_texts(model, encoder, items))
