"""A scorer that is trained here: what it is taught, and that it learns."""

import gc
import json
import sys
from collections import Counter
from unittest import mock

import pytest

import build_sft
from nanomed.build import scorer, scores
from nanomed.config import InputError
from tests.build import scored
from tests.build.scored import chat, lines, write
from tests.conftest import ROOT


def test_a_label_becomes_a_prompt_and_its_digit(tmp_path, encoder):
    data = write(tmp_path / "l.jsonl", [chat("怎么办？", "看医生。", complexity=2, quality=5)])
    first, second = scorer.labelled([str(data)])
    assert [one["messages"][1]["content"] for one in (first, second)] == ["2", "5"]
    assert "看医生" not in first["messages"][0]["content"]
    assert "看医生" in second["messages"][0]["content"]
    asker = scores.deita.Asker(encoder, 512)
    _, encoded = asker.encode("answer_quality", "怎么办？", "看医生。")
    taught = scores.Chat([("user", second["messages"][0]["content"]), ("assistant", "5")])
    taught.system = second["system"]
    ids, trained, _ = encoder.chat(taught, 512)
    n = len(encoded.inputs[0])  # what it learns is what it is asked
    assert ids[:n] == [*encoded.inputs[0]] and ids[n] == asker.digits[4] and trained[n]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("q", "a"), "neither 'complexity' nor 'quality'"),
        (chat("q", "a", quality=7), "'quality': 7 is none of 1 to 6"),
        (chat("q", "a", complexity=True), "'complexity': True"),
        (chat("q", "a", quality="4"), "'quality': '4'"),
        (chat("q", "a", "r", "b", quality=4), "one question and answer"),
    ],
)
def test_a_label_that_is_none_is_named(tmp_path, record, message):
    data = write(tmp_path / "l.jsonl", [chat("q", "a", quality=1), record])
    with pytest.raises(InputError, match=rf"l\.jsonl, record 2.*{message}"):
        scorer.labelled([str(data)])


def test_ladders_are_of_the_chats_and_say_what_was_done():
    items = scores.read([str(ROOT / "samples/sft.jsonl")], [], 300)
    made = [*scorer.ladders(items)]
    assert made == [*scorer.ladders(items)]
    steps = {json.dumps(one) for one in scorer.ladders(items, 3)}
    assert len(steps) > 1.5 * len(made)  # other steps each time
    said = {text for item in items for pair in scores.deita.exchanges(item.chat) for text in pair}
    steps = Counter((one["kind"], one["messages"][1]["content"]) for one in made)
    assert {digit for kind, digit in steps if kind == "answer_quality"} == {"1", "3", "6"}
    assert {digit for kind, digit in steps if kind == "complexity"} == {"1", "3", "5", "6"}
    for one in made:
        text, digit = (turn["content"] for turn in one["messages"])
        if one["kind"] == "answer_quality":
            whole = any(text.endswith(said_text) for said_text in said)
            assert whole == (digit != "3")


def test_a_scorer_is_trained_once_and_learns_its_labels(tmp_path, encoder):
    """Long questions are complex here, short ones are not: after training the model says so."""
    rows = [("怎么办？", 1), ("头痛三天并且发热咳嗽还有胸闷气短应该怎么检查和治疗？", 6)]
    labels = [chat(q + str(i), "看医生。", complexity=n) for i in range(40) for q, n in rows]
    write(tmp_path / "labels.jsonl", labels)
    data = write(tmp_path / "chats.jsonl", [chat(q + "呢", "看医生。") for q, _ in rows])
    model = scored.folder_of(encoder, tmp_path / "model")
    argv = ["build_sft.py", "--data", str(data), "--out", str(tmp_path / "out"), "--workers", "1"]
    argv += ["--scorer", str(model), "--labels", str(tmp_path / "labels.jsonl"), "--device", "cpu"]
    fast = {"epochs": 4, "batch_size": 8, "lr": 3e-3}
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(build_sft.TUNED, fast):
        with (
            mock.patch.object(scorer, "fit", side_effect=RuntimeError("killed")),
            pytest.raises(RuntimeError),
        ):
            build_sft.main()
        gc.collect()  # the run folder's lock goes with what was killed
        build_sft.main()
        short, long = lines(tmp_path / "out/scores.jsonl")
        assert short["complexity"] < 2 < 5 < long["complexity"]
        with mock.patch.object(scorer, "fit", lambda *_: pytest.fail("trained again")):
            build_sft.main()
            write(tmp_path / "labels.jsonl", labels[2:])
            with pytest.raises(InputError, match="other labels"):
                build_sft.main()
