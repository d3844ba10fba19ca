"""Limits, diversity and proportions; scores that are computed once; the script from end to end."""

import json
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import build_sft
from nanomed import store
from nanomed.build import scores, selection
from nanomed.build.shards import read_shard
from nanomed.config import InputError
from nanomed.hf import pretrained
from nanomed.model.scoring import Scorer
from tests.build import scored
from tests.build.scored import chat, lines, write

CPU = torch.device("cpu")
CHATS = [
    chat(
        "头痛三天了怎么办？", "先量体温，必要时就医。", "要吃药吗？", "先不用，多休息。", group="a"
    ),
    chat("What is gout?", "A disease of the joints.", source="books"),
    chat("发热怎么办？", "多休息，多喝水，注意保暖。"),
    chat("发热怎么办？", "多休息，多喝水，注意保暖。"),
    chat("下列哪项正确？\nA. 一\nB. 二", "B。二"),
    chat("咳嗽呢？", " "),
]


def line(score=10.0, cr=None, dropped="", kind="single_turn_zh") -> dict:
    named = {"file": "f", "record": 1, "score": score, "cr": cr, "dropped": dropped}
    return named | {"kind": kind, "cr_is_missing": False, "answer_loss": 1.0}


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("scored_line", "reason"),
    [
        (line(), None),
        (line(score=4.9), "score"),
        (line(cr=0.1), "repeated_turns"),
        (line(cr=1.01), "unrelated_turns"),
        (line(cr=0.2), None),
        (line(cr=1.0), None),
        (line(score=None), "no_score"),
        (line(dropped="empty answer"), "empty_answer"),
        (line() | {"cr_is_missing": True}, "no_cr"),
        (line() | {"answer_loss": 2.1}, "answer_loss"),
        (line() | {"answer_loss": None}, "no_answer_loss"),
    ],
)
def test_a_limit_says_which_value_passed_it(scored_line, reason):
    found = selection.Limits(5.0, 0.2, 1.0, 0.9, 0, {}, 2.0).of(scored_line)
    assert next((f.name for f in found if not f.keeps), None) == reason


def one_by_one(vectors: np.ndarray, order: list[int], limit: float) -> list[int]:
    kept = []
    for row in order:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        if not kept or (unit[kept] @ unit[row]).max() <= limit:
            kept.append(row)
    return kept


def test_diversity_in_blocks_is_the_greedy_pass_one_by_one(monkeypatch):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 8))
    vectors = (centres[rng.integers(40, size=300)] + 0.3 * rng.normal(size=(300, 8))).astype("f4")
    order = rng.permutation(300).tolist()
    for block in (1, 7, 300):
        monkeypatch.setattr(selection, "BLOCK", block)
        gone = selection.diverse(vectors, order, 0.9, CPU)
        kept = [row for row in order if row not in gone]
        assert kept == one_by_one(vectors, order, 0.9) and 30 < len(kept) < 200
        for row, (value, other) in gone.items():
            a, b = vectors[row], vectors[other]
            assert other in kept and order.index(other) < order.index(row)
            assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_a_chat_without_an_embedding_is_like_no_other():
    vectors = np.array([[np.nan, np.nan], [1, 0], [1, 0.1], [np.nan, np.nan]], np.float32)
    assert list(selection.diverse(vectors, [0, 1, 2, 3], 0.9, CPU)) == [2]


def test_proportions_are_kept_as_far_as_the_scarcest_allows():
    keys = ["zh"] * 80 + ["en"] * 20
    assert selection.quotas(keys, {"zh": 0.5, "en": 0.5}, 0) == {"zh": 20, "en": 20}
    assert selection.quotas(keys, {"zh": 0.5, "en": 0.5}, 10) == {"zh": 5, "en": 5}
    assert selection.quotas(["zh"] * 80 + [""] * 40, {"zh": 0.5}, 0) == {"zh": 40, "": 40}
    assert selection.quotas(["", ""], {}, 1) == {"": 1}
    halves, thirds = {"zh": 0.5, "en": 0.5}, {"zh": 0.3, "en": 0.3}
    assert [sum(selection.quotas(keys, halves, n).values()) for n in (1, 3, 7)] == [1, 3, 7]
    assert sum(selection.quotas([*keys, *[""] * 40], thirds, 5).values()) == 5
    with pytest.raises(InputError, match=r"--shares fr: no chat"):
        selection.quotas(keys, {"fr": 0.5}, 0)


def test_the_best_of_each_kind_are_kept():
    kinds = ["single_turn_zh"] * 4 + ["option_en"] * 4
    found = [line(score=float(i), kind=kind) for i, kind in enumerate(kinds)]
    shares = {"single_turn_zh": 0.75, "en": 0.25}
    limits = selection.Limits(0.0, 0.0, 99.0, 1.0, 4, shares)
    _, kept = selection.judge(range(8), found, ["x"] * 8, None, limits, CPU)
    assert kept == [7, 3, 2, 1]


@pytest.mark.parametrize("given", [["zh"], ["zh=2"], ["=0.5"], ["zh=0.6", "en=0.6"], ["zh=x"]])
def test_shares_that_cannot_be(given):
    with pytest.raises(InputError, match="--shares"):
        selection.shares_of(given)
    assert sum(selection.shares_of(["paper"]).values()) == pytest.approx(1)


def test_a_chat_has_one_share():
    limits = selection.Limits(0.0, 0.0, 99.0, 1.0, 0, {"zh": 0.5, "single_turn_zh": 0.5})
    with pytest.raises(InputError, match="both zh and single_turn_zh"):
        selection.judge([0], [line()], ["x"], None, limits, CPU)


# ---------------------------------------------------------------- scored once


@pytest.fixture(scope="module")
def model(encoder, tmp_path_factory):
    return scored.folder_of(encoder, tmp_path_factory.mktemp("scorer") / "model")


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "chats.jsonl", CHATS)


def build(data, out, model, *more):
    argv = ["build_sft.py", "--data", str(data), "--out", str(out), "--scorer", str(model)]
    argv += ["--workers", "1", "--device", "cpu", *more]
    with mock.patch.object(sys, "argv", argv):
        build_sft.main()
    return out


def test_from_chats_to_what_fine_tuning_reads(data, model, tmp_path, encoder, capsys):
    out = build(data, tmp_path / "out", model, "--max_similarity", "1", "--near_dup_jaccard", "1")
    found = lines(out / "scores.jsonl")
    assert [(r["file"], r["record"]) for r in found] == [(str(data), i) for i in range(1, 7)]
    first, english, *_, option, empty = found
    assert 1 <= first["complexity"] <= 6 and 1 <= first["quality"] <= 6
    assert first["score"] == pytest.approx(np.mean([c * q for c, q in first["rounds"]]))
    assert first["cr_turns"] == [first["cr"]] and english["cr"] is None
    assert [r["kind"] for r in (first, english, option)] == [
        "multi_turn_zh", "single_turn_en", "option_zh"
    ]  # fmt: skip
    assert empty["score"] is None and empty["dropped"] == "empty answer"
    kept = lines(out / "selected.jsonl")
    assert [{k: v for k, v in r.items() if k != "nanomed"} for r in kept] == [
        CHATS[i] for i in (0, 1, 2, 4)
    ]
    assert kept[0]["nanomed"]["cr"] == first["cr"]
    gone = {(r["record"], r["reason"]) for r in lines(out / "dropped.jsonl")}
    assert gone == {(4, "exact_duplicate"), (6, "empty_answer")}
    read = store.chats([str(out / "selected.jsonl")], encoder, 512, 0.0)
    assert len(read) == 4 and "nanomed" not in json.dumps(read.meta["report"])
    assert "95% of the chats are below" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["stages"][-1]["name"] == "select" and "proportions" in report
    assert "multi_turn_zh" in (out / "report.html").read_text("utf-8")


def test_a_chat_with_a_text_beside_it_is_searched_as_the_chat_that_is_learned(tmp_path):
    question = "Which drug is used first in a patient with acute gout and renal failure?"
    given = [chat(question, "Colchicine.", text="A page's title."), chat("Why?", "So.", text="")]
    data = write(tmp_path / "chats.jsonl", given)
    benchmark = write(tmp_path / "b.jsonl", [{"question": question}])
    c = build_sft.Chats(decontaminate=[str(benchmark)], workers=1)
    stages, folder = build_sft.cleaned(c, [str(data)], tmp_path / "out")
    assert stages[-1][1].dropped == {"contaminated": 1} and stages[-1][1].kept == 1
    (left,) = (doc.text for path in selection.finals(folder) for doc in read_shard(path))
    assert left == "Why?\nSo."


def test_other_limits_ask_no_model(data, model, tmp_path, monkeypatch):
    out = build(data, tmp_path / "out", model)
    before = (out / "scores.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(pretrained, "load", lambda *_: pytest.fail("a model was read"))
        build(data, out, model, "--min_score", "99")
        assert lines(out / "selected.jsonl") == []
        build(data, out, model, "--max_similarity", "1", "--keep", "2")
        assert len(lines(out / "selected.jsonl")) == 2
    assert (out / "scores.jsonl").read_bytes() == before


def test_a_killed_run_goes_on_with_the_same_bytes(data, model, tmp_path, monkeypatch):
    whole = build(data, tmp_path / "whole", model)
    monkeypatch.setattr(scores, "ROWS", 0)  # every chat is written by itself
    out, add, left = tmp_path / "out", scores.Kept.add, [2]

    def dying(self, found):
        add(self, found)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(scores.Kept, "add", dying)
        build(data, out, model)
    (torn,) = out.glob("cache/*.jsonl")
    with open(torn, "ab") as file:
        file.write(b'{"key": "half a li')
    with open(torn.with_suffix(".f32"), "ab") as file:
        file.write(b"123")
    build(data, out, model)
    mine, theirs = lines(out / "scores.jsonl"), lines(whole / "scores.jsonl")
    for a, b in zip(mine, theirs, strict=True):
        for name in ("complexity", "quality", "cr"):
            assert a[name] == (b[name] if b[name] is None else pytest.approx(b[name], abs=1e-5))
    assert (out / "selected.jsonl").read_text().count("\n") == (
        (whole / "selected.jsonl").read_text().count("\n")
    )


def filled(world, data, model, out):
    """A rank's part; what rank 0 has kept."""
    items = scores.read([data], [])
    _, encoder = pretrained.describe(model)
    loaded = pretrained.load(model, CPU, torch.float32)
    kept = scores.Kept(out, {}, loaded.config.d_model) if world.is_main else None
    parts = ("digits", "context")
    todo = scores.missing(items, kept)
    scores.Measure(Scorer(loaded, world), encoder, "turn", parts, 128).fill(todo, kept)
    return kept and (kept.lines, kept.vectors()[1].tolist())


def test_one_process_at_a_time_scores_into_a_folder(tmp_path):
    first = scores.Kept(tmp_path, {}, 4)
    with pytest.raises(InputError, match="another process"):
        scores.Kept(tmp_path, {}, 4)
    assert scores.Kept(tmp_path, {"other": "model"}, 4).lines == first.lines == {}


def test_ranks_share_the_work(pool, data, model, tmp_path):
    (alone,) = pool(1, filled, str(data), str(model), tmp_path / "one")
    shared, nothing = pool(2, filled, str(data), str(model), tmp_path / "two")
    assert nothing is None and shared[0] == alone[0] and shared[1] == alone[1]
    assert len(alone[0]) == 4  # the same chat once, the empty one not at all


# ---------------------------------------------------------------- what else may score


def test_an_endpoint_may_give_the_digits(data, tmp_path, capsys):
    from tests.endpoint import serving

    def answer(messages: list[dict]) -> str:
        return "many" if "gout" in messages[-1]["content"] else "4"

    with serving(answer) as standin, mock.patch.object(sys, "argv", [
        "build_sft.py", "--data", str(data), "--out", str(tmp_path / "out"), "--workers", "1",
        "--labeller", standin.url, "--labeller_model", "m"]):  # fmt: skip
        build_sft.main()
        paid = standin.n_paid
        build_sft.main()
        assert standin.n_paid == paid
    assert "--max_similarity is not applied" in capsys.readouterr().out
    found = lines(tmp_path / "out/scores.jsonl")
    assert [r["score"] for r in found] == [16.0, None, 16.0, 16.0, 16.0, None]
    assert all(r["cr"] is None for r in found)
    gone = {(r["record"], r["reason"]) for r in lines(tmp_path / "out/dropped.jsonl")}
    assert {(2, "no_score"), (6, "empty_answer"), (4, "exact_duplicate")} <= gone


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--scorer MODEL"),
        (["--turns", "max"], "turns"),
        (["--targets", "user"], "targets"),
        (["--min_cr", "2", "--max_cr", "1"], "min_cr"),
        (["--max_similarity", "0"], "max_similarity"),
        (["--scorer", "x", "--shares", "zh"], "KEY=SHARE"),
        (["--scorer", "nowhere"], "nowhere"),
        (["--labeller", "http://127.0.0.1:1/v1", "--max_cr", "1"], "--max_cr.* --cr_model"),
        (["--labels", "nowhere.jsonl"], "nowhere"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_before_a_model_is_asked(data, tmp_path, flags, message):
    argv = ["build_sft.py", "--data", str(data), "--out", str(tmp_path / "out"), *flags]
    with mock.patch.object(sys, "argv", argv), pytest.raises(InputError, match=message):
        build_sft.main()
    assert not (tmp_path / "out/scores.jsonl").exists()
