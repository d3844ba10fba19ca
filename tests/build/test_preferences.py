"""Objective and subjective pairs, and what is said of a judge that is not fair."""

import json
import random
import sys
from collections import Counter
from unittest import mock

import pytest

import build_dpo
from nanomed import store
from nanomed.build import preferences
from nanomed.config import InputError
from nanomed.evals import answers, judge
from nanomed.records.exams import Exam
from tests.build import scored
from tests.build.scored import chat, lines, write
from tests.endpoint import serving
from tests.evals.test_judge import answers_in


def exam(i: int, n: int = 4, answer: str = "A", **options: str) -> dict:
    texts = {letter: f"值{i}{letter}" for letter in "ABCDE"[:n]} | options
    return {"question": f"问题{i}是什么？", "options": texts, "answer": answer}


def build(out, *flags: str):
    argv = ["build_dpo.py", "--out", str(out), "--device", "cpu", *flags]
    with mock.patch.object(sys, "argv", argv):
        build_dpo.main()
    return lines(out / "pairs.jsonl"), json.loads((out / "report.json").read_text("utf-8"))


# ---------------------------------------------------------------- objective


def test_an_objective_pair_is_two_options_in_the_same_words(tmp_path, encoder):
    records = [exam(i, answer="AAAAAABC"[i % 8]) for i in range(200)]
    pairs, report = build(tmp_path / "out", "--exam", str(write(tmp_path / "e.jsonl", records)))
    assert len(pairs) == 200 and {pair["kind"] for pair in pairs} == {"objective"}
    for i, pair in enumerate(pairs):
        (turn,) = pair["prompt"]
        shown = dict(line.split(". ", 1) for line in turn["content"].splitlines()[1:])
        letter, other = pair["chosen"][0], pair["rejected"][0]
        right = records[i]["options"][records[i]["answer"]]
        assert letter != other and shown[letter] == right  # moved, and still the right one
        assert sorted(shown.values()) == sorted(records[i]["options"].values())
        for side in ("chosen", "rejected"):
            assert pair[side] == f"{pair[side][0]}。{shown[pair[side][0]]}"
    letters = report["objective"]["letters"]
    assert letters["chosen"] == {"A": 50, "B": 50, "C": 50, "D": 50}
    assert all(30 < letters["rejected"][letter] < 70 for letter in "ABCD")
    data = store.pairs([str(tmp_path / "out/pairs.jsonl")], encoder, 512, 0.0)
    assert len(data) == 200 and data.meta["kinds"] == ["objective"]
    assert not data.meta["report"].get("unread")


def test_the_wrong_option_is_each_of_the_others_equally_often():
    found = Counter()
    for i in range(900):
        question = Exam(f"q{i}", {letter: letter.lower() for letter in "ABCD"}, "B")
        pair, _ = preferences.objective(question, 1, seed=0)
        found[pair["rejected"]] += 1
    assert len(found) == 3 and all(250 < n < 350 for n in found.values())
    again = [preferences.objective(question, 1, seed)[1] for seed in range(20)]
    assert len(set(again)) == 3 and all(letters[0] == "B" for letters in again)


def test_questions_with_several_answers_are_counted_and_left_out(tmp_path):
    records = [exam(1), exam(2, answer="AB"), exam(3, D="以上都是"), exam(4, B="值4A")]
    pairs, report = build(tmp_path / "out", "--exam", str(write(tmp_path / "e.jsonl", records)))
    assert [pair["id"].rsplit(":")[-1] for pair in pairs] == ["1", "3"]
    assert pairs[1]["prompt"][0]["content"].endswith("D. 以上都是")
    assert pairs[1]["chosen"].startswith("A")  # its options stay in their places
    gone = lines(tmp_path / "out/dropped.jsonl")  # in the last one the right text stands twice
    assert [(x["record"], x["reason"]) for x in gone] == [(n, "several_answers") for n in (2, 4)]
    assert report["dropped"] == {"several_answers": 2}


def test_option_chats_are_questions_too_and_benchmarks_are_protected(tmp_path):
    asked = "下列哪一项是糖尿病最常用的检查方法和诊断依据？\nA. 血糖\nB. 胸片\nC. 心电图"
    data = write(tmp_path / "chats.jsonl", [chat(asked, "A。血糖。"), chat("怎么办？", "看医生。")])
    pairs, _ = build(tmp_path / "out", "--data", str(data))
    assert len(pairs) == 1 and {pairs[0]["chosen"][2:], pairs[0]["rejected"][2:]} > {"血糖"}
    benchmark = write(tmp_path / "b.jsonl", [{"question": asked.splitlines()[0]}])
    pairs, report = build(tmp_path / "two", "--data", str(data), "--decontaminate", str(benchmark))
    assert pairs == [] and report["dropped"] == {"contaminated": 1}


def test_a_file_of_questions_must_hold_questions(tmp_path):
    data = write(tmp_path / "e.jsonl", [exam(1), {"question": "q", "answer": "x"}])
    with pytest.raises(InputError, match=r"e\.jsonl, record 2"):
        build(tmp_path / "out", "--exam", str(data))
    unclear = write(tmp_path / "u.jsonl", [exam(1, answer="9")])
    with pytest.raises(InputError, match=r"u\.jsonl, record 1.*which of its options"):
        build(tmp_path / "out", "--exam", str(unclear))
    with pytest.raises(InputError, match="need both"):
        build(tmp_path / "out", "--exam", str(data), "--judge", "http://127.0.0.1:1/v1")


# ---------------------------------------------------------------- subjective


@pytest.fixture(scope="module")
def model(encoder, tmp_path_factory):
    return scored.folder_of(encoder, tmp_path_factory.mktemp("answers") / "model")


def first_seat(share: float, better):
    """A judge that prefers the first seat with this probability, whoever sits there, and else the
    answer that is `better`. Its lot is drawn from what it reads, so it says the same again."""

    def answer(messages: list[dict]) -> str:
        first, second = answers_in(messages)[-2:]
        biased = random.Random(messages[0]["content"]).random() < share
        return f"Answer {1 if biased or better(first) > better(second) else 2} is better"

    return answer


def test_a_judge_that_likes_the_first_seat_is_found_out(tmp_path, model, monkeypatch):
    """The original is always better to it; in a fifth of the requests it takes the first seat. The
    two orders of a pair then differ exactly where the model's answer sat first and it was biased:
    a fifth of the pairs, which are dropped; no pair has the worse answer chosen but by no order."""
    records = [chat(f"问题{i}怎么办？", f"答案{i}，请就医。") for i in range(300)]
    data = write(tmp_path / "chats.jsonl", records)
    given = {record["messages"][1]["content"] for record in records}
    monkeypatch.setattr(build_dpo, "answered", made_up)
    judge = first_seat(0.2, lambda text: text in given)
    with serving(judge) as standin:
        flags = ["--data", str(data), "--model", str(model), "--judge", standin.url]
        pairs, report = build(tmp_path / "out", *flags)
        assert standin.n_paid == 600
        again, _ = build(tmp_path / "out", *flags)
        assert standin.n_paid == 600 and again == pairs  # nothing is paid twice
    found = report["subjective"]
    disagree = found["orders_disagree"]
    assert disagree == pytest.approx(0.2, abs=3 * (0.2 * 0.8 / 300) ** 0.5)
    assert found["orders_reverse"] == disagree and found["win"] == 0
    # Of 600 verdicts those for the first seat: half, and a fifth of the other half.
    assert found["first_seat_wins"] == pytest.approx(0.5 + 0.2 / 2, abs=0.04)
    assert report["dropped"] == {"orders_disagree": round(300 * disagree)}
    assert len(pairs) + report["dropped"]["orders_disagree"] == 300
    assert all(pair["chosen"] in given and pair["rejected"] not in given for pair in pairs)


def made_up(c, chats, out):
    """Answers without a model."""
    return [
        {
            "id": name,
            "round": len(x.turns) // 2,
            "history": [],
            "question": x.turns[-2][1],
            "reference": x.turns[-1][1],
            "answer": f"不同的回答{name}，而且写得长一些。",
            "end": "stop",
        }
        for name, x in chats.items()
    ]


def test_a_model_s_answers_are_judged_and_become_pairs(tmp_path, model, encoder, monkeypatch):
    records = [
        chat("头痛怎么办？", "先休息。", "还是痛呢？", "请就医。", group="g"),
        chat("What is gout?", "A disease.", system="Be brief."),
        chat("下列哪项正确？\nA. 一\nB. 二", "B。二"),
        chat("痛" * 600, "这个问题比模型能读的长。"),
    ]
    data, asked = write(tmp_path / "selected.jsonl", records), []
    systems, prompt_of = [], answers.prompt_of

    def noted(encoder, chat, longest):
        systems.append(chat.system)
        return prompt_of(encoder, chat, longest)

    monkeypatch.setattr(answers, "prompt_of", noted)

    def longer(messages: list[dict]) -> str:
        asked.append(messages[0]["content"])
        first, second = (len(text) for text in answers_in(messages)[-2:])
        return f"Answer {1 if first > second else 2} is better"

    with serving(longer) as standin:
        flags = ["--data", str(tmp_path), "--model", str(model), "--judge", standin.url]
        pairs, report = build(tmp_path / "out", *flags, "--max_new", "24", "--subjective", "9")
    assert systems.count("Be brief.") == 1  # a pair's answers have its own system text
    kinds = Counter(pair["kind"] for pair in pairs)
    assert kinds["objective"] == 1  # of the option chat, which is not judged
    n = kinds["subjective"]
    assert report["dropped"].pop("question_too_long") == 1
    assert n + sum(report["dropped"].values()) == 2
    for pair in pairs[1:]:
        assert len(pair["chosen"]) > len(pair["rejected"])
    assert str(data) and all("fluency" in text and "proficiency" in text for text in asked)
    if asked and any("还是痛呢" in text for text in asked):
        assert any("Patient: 头痛怎么办？\n\nDoctor: 先休息。" in text for text in asked)
    assert len(store.pairs([str(tmp_path / "out/pairs.jsonl")], encoder, 512, 0.0)) == len(pairs)


def test_every_record_is_a_pair_or_a_line_that_says_why(tmp_path, model, monkeypatch):
    records = [chat(f"问题{i}怎么办？", f"答案{i}，请就医。") for i in range(6)]
    records += [chat("空的？", ""), {"prompt": "Once upon", "completion": "a time."}]
    twice = [{"role": "user", "content": "甲？"}, *chat("乙？", "丙。")["messages"]]
    data = write(tmp_path / "chats.jsonl", [*records, {"messages": twice}, exam(99)])
    exams = write(tmp_path / "e.jsonl", [exam(i, answer="AB" if i < 5 else "A") for i in range(12)])
    monkeypatch.setattr(build_dpo, "answered", made_up)
    with serving(first_seat(0.0, len)) as standin:
        flags = ["--data", str(data), "--exam", str(exams), "--model", str(model)]
        flags += ["--judge", standin.url, "--subjective", "4", "--objective", "5"]
        pairs, report = build(tmp_path / "out", *flags)
    gone = lines(tmp_path / "out/dropped.jsonl")
    places = [pair["id"] for pair in pairs] + [f"{x['file']}:{x['record']}" for x in gone]
    assert len(places) == len({*places}) == report["read"] == 10 + 12
    assert report["pairs"] == {"objective": 5, "subjective": 4}
    assert report["dropped"] == {
        "several_answers": 5, "not_drawn": 3 + 2, "empty_answer": 1, "no_template": 1,
        "turns_do_not_alternate": 1,
    }  # fmt: skip


def test_a_judge_that_likes_what_is_long_is_warned_of(tmp_path, model, monkeypatch, capsys):
    data = write(tmp_path / "chats.jsonl", [chat(f"问题{i}？", f"短{i}") for i in range(9)])
    monkeypatch.setattr(build_dpo, "answered", made_up)
    with serving(first_seat(0.0, len)) as standin:
        flags = ["--data", str(data), "--model", str(model), "--judge", standin.url]
        pairs, report = build(tmp_path / "out", *flags)
    assert report["subjective"]["longer_wins"] == 1 and len(pairs) == 9
    assert "WARNING: the longer answer wins 100%" in capsys.readouterr().out


def test_ties_and_what_cannot_be_read_give_no_pair():
    lines = [
        {"id": name, "round": 1, "order": order, "value": value}
        for name, values in {"tie": (0, 0), "half": (1, 0), "none": (1, None), "won": (1, -1),
                             "lost": (-1, 1), "seat": (1, 1)}.items()
        for order, value in zip(("ab", "ba"), values, strict=True)
    ]  # fmt: skip
    found = {name: judge.verdict(*both) for (name, _), both in judge.both_orders(lines).items()}
    assert found == {
        "tie": "tie", "half": "orders_disagree", "none": "unread", "won": 1, "lost": -1,
        "seat": "orders_disagree",
    }  # fmt: skip
