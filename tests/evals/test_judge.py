"""Judging against a stand-in of known tastes and faults, and the paper's own figures."""

import json
import random
import socket

import pytest

import evaluate
from nanomed.build.labeller import EndpointError
from nanomed.config import InputError
from nanomed.evals import judge
from tests.endpoint import reply_of, serving, status
from tests.evals.test_requests import write_lines

GOOD = '{"fluency": 5, "relevance": 4, "completeness": 3, "proficiency": 4}'


def write_answers(folder, texts: list[str], rounds: int = 1):
    """Dialogues of `rounds` turns, answered by the texts one after another."""
    lines = [
        {
            "id": str(i // rounds),
            "round": 1 + i % rounds,
            "question": f"question {i}",
            "history": [["before", "so"]] * (i % rounds),
            "reference": "the reference",
            "answer": text,
        }
        for i, text in enumerate(texts)
    ]
    write_lines(folder / "answers.jsonl", lines)
    return folder


def answers_in(messages: list[dict]) -> tuple[str, str]:
    """Both answers of a pair, without the marks around them."""
    _, first, second = messages[0]["content"].split("<text ")[1:4]
    return tuple(part.split(">\n", 1)[1].split("\n</text", 1)[0] for part in (first, second))


def longer_wins(messages: list[dict]) -> str:
    first, second = answers_in(messages)
    side = "Answer 1 is better" if len(first) > len(second) else "Answer 2 is better"
    return f"Because.\n{side if len(first) != len(second) else 'Both are equal'}"


def run(a, out, *more: str) -> dict:
    evaluate.judge(["--answers", str(a), "--out", str(out), *map(str, more)])
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("So.\nAnswer 1 is better", 1),
        ("**Answer 2 is better.**", -1),
        ("Both are equal\n", 0),
        ("Answer 1 is better\nI think.", None),
        ("Answer 1 is better than Answer 2", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_or_nothing(text, verdict):
    assert judge.parse_verdict(text) == verdict


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("5", "5.0"),
        GOOD.replace("5", "6"),
        GOOD.replace("5", "true"),
        GOOD.replace('"', "'"),
        f"Sure! {GOOD}",
        GOOD.replace(', "proficiency": 4', ""),
        "",
    ],
)
def test_scores_that_are_not_exactly_right_are_none(text):
    assert judge.parse_scores(text) is None


def test_our_own_example_can_be_read():
    example = judge.prompts()["turn"].format(history="", question="", reference="", answer="")
    assert judge.parse_scores(example.splitlines()[-1]) is not None
    assert judge.parse_scores(f"```json\n{GOOD}\n```")["fluency"] == 5


def test_pairs_in_both_orders(tmp_path):
    a = write_answers(tmp_path / "a", ["xxxx", "x", "xx", "xxxxxx"])
    b = write_answers(tmp_path / "b", ["yy", "yyy", "yy", "yy"])
    with serving(longer_wins) as judge_:
        found = run(a, tmp_path / "out", "--against", b, "--judge", judge_.url)["pairs"]
        assert judge_.n_paid == 8
    assert (found["win"], found["tie"], found["loss"]) == (2, 1, 1)
    assert found["score"] == 0.625 and found["longer_wins"] == 1.0
    assert found["orders_disagree"] == 0.0 and found["first_seat_wins"] == 0.5
    assert found["mean_length"] == [13 / 4, 9 / 4]


def test_a_pairs_judge_reads_the_conversation(tmp_path):
    a, b = (write_answers(tmp_path / n, ["x", "y"], rounds=2) for n in "ab")
    first, _, second, _ = judge.pairs(evaluate.answers.read(a), evaluate.answers.read(b))
    texts = [asked.request.messages[0]["content"] for asked in (first, second)]
    assert ">\nquestion 0\n<" in texts[0]
    assert ">\nPatient: before\n\nDoctor: so\n\nPatient: question 1\n<" in texts[1]
    lines = evaluate.answers.read(b)
    lines[1]["history"] = [["older", "so"], *lines[1]["history"]]  # b reads more than a
    *_, longer, _ = judge.pairs(evaluate.answers.read(a), lines)
    assert "Patient: older" in longer.request.messages[0]["content"]
    lines[1]["history"][-1] = ["before", "another answer"]
    with pytest.raises(InputError, match=r"dialogue 0, round 2: .* answer it with --history gold"):
        judge.pairs(evaluate.answers.read(a), lines)


def test_a_judge_that_likes_the_first_seat_makes_ties_and_is_seen(tmp_path):
    a = write_answers(tmp_path / "a", ["x"] * 6)
    with serving(lambda _: "Answer 1 is better") as judge_:
        against = ("--against", "reference", "--judge", judge_.url)
        found = run(a, tmp_path / "out", *against)["pairs"]
    assert found["tie"] == 6 and found["first_seat_wins"] == 1.0
    assert found["orders_disagree"] == found["orders_reverse"] == 1.0
    assert found["longer_wins"] is None


def test_bad_replies_and_faults_change_no_verdict(tmp_path):
    rng = random.Random(0)
    texts = ["x" * rng.randint(1, 30) for _ in range(12)]
    a, b = write_answers(tmp_path / "a", texts), write_answers(tmp_path / "b", ["y" * 15] * 12)
    with serving(longer_wins) as judge_:
        clean = run(a, tmp_path / "clean", "--against", b, "--judge", judge_.url)
    faults = {2: status(503, Retry_After="0"), 5: status(429, Retry_After="0")}
    said = iter(["I like the first."] * 3)

    def sometimes(messages: list[dict]) -> str:
        return next(said, None) or longer_wins(messages)

    with serving(sometimes, faults=faults) as judge_:
        arguments = ("--against", b, "--judge", judge_.url)
        first = run(a, tmp_path / "out", *arguments)["pairs"]
        assert first["unread"] > 0 and first["n"] + first["unread"] == 12
        again = run(a, tmp_path / "out", *arguments, "--retry_failed")
        assert again == clean and judge_.n_paid == 24 + 3


def test_judging_that_was_cut_goes_on_to_the_same_bytes(tmp_path):
    a = write_answers(tmp_path / "a", ["x", "xx", "xxx"])
    with serving(longer_wins) as judge_:
        arguments = ("--against", "reference", "--judge", judge_.url)
        run(a, tmp_path / "out", *arguments)
        files = {
            n: (tmp_path / "out" / n).read_bytes() for n in ("judgements.jsonl", "results.json")
        }
        replies = tmp_path / "out/replies.jsonl"
        replies.write_bytes(replies.read_bytes()[:-40])  # within its last line
        run(a, tmp_path / "out", *arguments)
        assert judge_.n_paid == 7
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_turns_by_four_aspects(tmp_path):
    a = write_answers(tmp_path / "a", ["x", "xx", "xxx", "xxxx"], rounds=2)
    with serving(lambda _: GOOD) as judge_:
        found = run(a, tmp_path / "out", "--judge", judge_.url)["turns"]
    assert found["n"] == 4 and found["rounds"] == {"1": 2, "2": 2}
    assert found["aspects"]["fluency"]["micro"] == 5 and found["aspects"]["relevance"]["micro"] == 4
    asked = judge.turns(evaluate.answers.read(a))[1].request.messages[0]["content"]
    assert "Patient: before\nDoctor: so" in asked and "the reference" in asked


def test_requests_answered_elsewhere(tmp_path):
    a = write_answers(tmp_path / "a", ["xxxxxxxxxxxxxxxx", "x"])
    batch, replies = tmp_path / "batch.jsonl", tmp_path / "replies.jsonl"
    against = ("--answers", str(a), "--against", "reference")
    evaluate.judge([*against, "--write_requests", str(batch)])
    requests = [json.loads(line) for line in batch.read_text(encoding="utf-8").splitlines()]
    assert len(requests) == 4 and requests[0]["url"] == "/v1/chat/completions"
    lines = [
        {
            "custom_id": r["custom_id"],
            "response": {"body": reply_of(longer_wins(r["body"]["messages"]))},
        }
        for r in requests
    ]
    lines[0]["request_id"] = "a\u2028b"  # ends no line of a file of JSON lines
    write_lines(replies, lines[:3])
    found = run(a, tmp_path / "out", "--against", "reference", "--replies", replies)["pairs"]
    assert (found["n"], found["unread"], found["win"]) == (
        1,
        1,
        1,
    )  # one is missing: never a default
    with pytest.raises(InputError, match="they are kept, and the same command with --judge"):
        both = ("--replies", replies, "--judge", "http://127.0.0.1:1/v1")
        run(a, tmp_path / "out", "--against", "reference", *both)
    write_lines(replies, [{"custom_id": "another"}])
    with pytest.raises(InputError, match="line 1: no reply to a request of these answers"):
        run(a, tmp_path / "out", "--against", "reference", "--replies", replies)


def test_no_socket_without_judge(tmp_path, monkeypatch):
    a = write_answers(tmp_path / "a", ["x"])
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket"))
    assert run(a, tmp_path / "out")["turns"] == {
        "n": 0, "unread": 1, "rounds": {}, "aspects": {}, "set": "",
    }  # fmt: skip


def test_the_cost_stops_it_before_anything_is_sent(tmp_path):
    a = write_answers(tmp_path / "a", ["x"])
    with (
        serving(longer_wins) as judge_,
        pytest.raises(EndpointError, match=r"--max_cost 0\.001 would"),
    ):
        run(
            a,
            tmp_path / "out",
            "--judge",
            judge_.url,
            "--max_cost",
            0.001,
            "--price_in",
            9,
            "--price_out",
            9,
        )
    assert judge_.bodies == []


def test_other_answers_and_other_questions_are_refused(tmp_path):
    a = write_answers(tmp_path / "a", ["x", "y"])
    run(a, tmp_path / "out")
    write_answers(tmp_path / "a", ["x", "z"])
    with pytest.raises(InputError, match="other settings: files was"):
        run(a, tmp_path / "out")
    b = write_answers(tmp_path / "b", ["x"])
    with pytest.raises(InputError, match="dialogue 1, round 1: both must have answered it"):
        run(a, tmp_path / "o", "--against", b)
    with pytest.raises(InputError, match="holds no answers"):
        run(tmp_path, tmp_path / "o")


# ---------------------------------------------------------------- the paper's figures

# CMB-Clin in Figure 7: four rounds and the average, as read off the bars.
FIGURE_7 = {
    "fluency": [4.919, 4.597, 4.298, 4.500, 4.628],
    "relevance": [4.351, 3.736, 3.754, 3.250, 3.952],
    "completeness": [3.743, 3.000, 2.947, 3.500, 3.261],
    "proficiency": [4.270, 4.000, 3.947, 3.750, 4.077],
}


def judged_as(means: dict[str, list[float]], sizes: list[int]) -> list[dict]:
    """Whole grades from 1 to 5 with these means: so many of the lower one, the rest one higher."""
    lines = []
    for i, n in enumerate(sizes):
        for k in range(n):
            value = {}
            for aspect, bars in means.items():
                total = round(bars[i] * n)
                value[aspect] = total // n + (k < total % n)
            lines.append({"id": str(k), "round": i + 1, "value": value})
    return lines


def test_the_papers_averages_are_over_turns():
    """n = 74, 72, 57 and 4; the mean of rounds is another number."""
    found = judge.turn_results(judged_as(FIGURE_7, [74, 72, 57, 4]))
    assert found["n"] == 207 and found["rounds"] == {"1": 74, "2": 72, "3": 57, "4": 4}
    for aspect, (*bars, average) in FIGURE_7.items():
        ours = found["aspects"][aspect]
        assert list(ours["rounds"].values()) == pytest.approx(bars, abs=5.1e-4)
        assert ours["micro"] == pytest.approx(average, abs=5.1e-4)
    relevance = found["aspects"]["relevance"]
    assert abs(relevance["mean_of_rounds"] - FIGURE_7["relevance"][-1]) > 0.1


@pytest.mark.parametrize(
    "win, tie, loss, score, low, high",
    [
        (312, 134, 54, 0.758, 0.727, 0.787),
        (380, 89, 31, 0.849, 0.823, 0.874),
        (12, 118, 370, 0.142, 0.120, 0.164),
        (53, 210, 237, 0.316, 0.286, 0.345),
    ],
)
def test_the_papers_wins_of_500(win, tie, loss, score, low, high):
    """Figures 4 and 5: ties are drawn as orders that disagree."""
    verdicts = [(1, 1)] * win + [(1, -1)] * tie + [(-1, -1)] * loss
    lines = [
        {"id": str(i), "round": 1, "order": order, "value": value, "lengths": [1, 1]}
        for i, (ab, ba) in enumerate(verdicts)
        for order, value in (("ab", ab), ("ba", -ba))
    ]
    found = judge.pair_results(lines)
    assert (found["win"], found["tie"], found["loss"]) == (win, tie, loss)
    assert found["score"] == pytest.approx(score, abs=5e-4)
    assert found["score_interval"] == pytest.approx((low, high), abs=4e-3)
    assert found["orders_disagree"] == tie / 500
