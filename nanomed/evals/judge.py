"""Answers judged by a model: in pairs with both orders, or turn by turn by four aspects."""

import functools
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanomed.build.labeller import Answer, Request, parse_object, quoted
from nanomed.config import InputError
from nanomed.evals.stats import bootstrap, mean, sign_test, wilson

ASPECTS = ("fluency", "relevance", "completeness", "proficiency")
VERDICTS = {"Answer 1 is better": 1, "Answer 2 is better": -1, "Both are equal": 0}
REFERENCE = "reference"  # stands for the answers of the data set


@functools.cache
def prompts() -> dict[str, str]:
    text = Path(__file__).with_name("judge.toml").read_text(encoding="utf-8")
    return {name: prompt.strip() for name, prompt in tomllib.loads(text).items()}


@dataclass(frozen=True)
class Asked:
    """One request, and what it is about."""

    request: Request
    about: dict[str, Any]  # id, round; of a pair the order and both lengths in characters too


def pairs(a: Sequence[dict], b: Sequence[dict] | str, prompt: str = "pair") -> list[Asked]:
    """Both orders of every answer of a against that of b, or against the reference; what was said
    before a question stands before it. Raises InputError unless both answered the same."""
    if b == REFERENCE:
        b = [line | {"answer": line["reference"]} for line in a]
    sides = [{(line["id"], line["round"]): line for line in lines} for lines in (a, b)]
    for name in sorted({*sides[0], *sides[1]}):
        if any(name not in side for side in sides) or len({s[name]["question"] for s in sides}) > 1:
            raise InputError(f"dialogue {name[0]}, round {name[1]}: both must have answered it")
    asked = []
    for name, line in sides[0].items():
        mine, other = line["answer"], sides[1][name]["answer"]
        lengths = {"lengths": [len(mine), len(other)]}
        question = _with_history(line, sides[1][name])
        for order, (first, second) in {"ab": (mine, other), "ba": (other, mine)}.items():
            text = prompts()[prompt].format(
                question=quoted(question), first=quoted(first), second=quoted(second)
            )
            asked.append(_asked(text, line, {"order": order} | lengths))
    return asked


def _with_history(*lines: dict) -> str:
    """The question of two answers. A model that reads less may have lost the oldest turns."""
    history = max((line["history"] for line in lines), key=len)
    if any(history[len(history) - len(line["history"]) :] != line["history"] for line in lines):
        raise InputError(
            f"dialogue {lines[0]['id']}, round {lines[0]['round']}: each model saw answers of its "
            "own before it, so these two are no pair; answer it with --history gold"
        )
    question = lines[0]["question"]
    return conversation(history, question) if history else question


def conversation(history: Sequence[Sequence[str]], question: str) -> str:
    said = [f"Patient: {q}\n\nDoctor: {a}" for q, a in history]
    return "\n\n".join([*said, f"Patient: {question}"])


def turns(lines: Sequence[dict]) -> list[Asked]:
    """Every turn with its history, by four aspects."""
    asked = []
    for line in lines:
        history = "\n\n".join(f"Patient: {q}\nDoctor: {a}" for q, a in line["history"]) or "(none)"
        texts = {name: quoted(line[name]) for name in ("question", "reference", "answer")}
        asked.append(_asked(prompts()["turn"].format(history=quoted(history), **texts), line, {}))
    return asked


def _asked(text: str, line: dict, more: dict) -> Asked:
    request = Request([{"role": "user", "content": text}], max_tokens=512)
    return Asked(request, {"id": line["id"], "round": line["round"]} | more)


def parse_verdict(text: str) -> int | None:
    """1, -1 or 0 from the last line, which must be one of three; else None."""
    lines = text.strip().splitlines()
    return VERDICTS.get(lines[-1].strip().strip("*`. ")) if lines else None


def parse_scores(text: str) -> dict[str, int] | None:
    return parse_object(text, dict.fromkeys(ASPECTS, (1, 2, 3, 4, 5)))


def judged(
    asked: Sequence[Asked], model: str, answers: dict[str, Answer], parse: Callable[[str], Any]
) -> list[dict]:
    """A line for each request: what it is about, the raw reply, and its value; None where there is
    no reply, it cannot be read, or it was cut off."""
    lines = []
    for one in asked:
        reply = answers.get(one.request.key(model))
        whole = reply is not None and reply.finish == "stop"
        raw = {"raw": reply and reply.text, "served": reply and reply.served}
        lines.append(one.about | {"value": parse(reply.text) if whole else None} | raw)
    return lines


def batch_line(one: Asked, model: str) -> str:
    """A request as OpenAI's batch files have it, to be answered elsewhere."""
    line = {"custom_id": one.request.key(model), "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps(line | {"body": one.request.body(model)}, ensure_ascii=False) + "\n"


def replies(path: Path, asked: Sequence[Asked], model: str) -> list[Answer]:
    """The answers of a batch's output file. Raises InputError for a line that is none."""
    requests, found = {one.request.key(model): one.request for one in asked}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            reply = json.loads(line)
            key = reply["custom_id"]
            found.append(Answer.of(key, requests[key], reply["response"]["body"]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: no reply to a request of these answers and this "
                f"--judge_model ({type(error).__name__} {error})"
            ) from None
    return found


def both_orders(lines: Sequence[dict]) -> dict[tuple[str, int], tuple[int | None, int | None]]:
    """By dialogue and round: what was said of each order, seen from a; None if it is unread."""
    seen: dict[tuple[str, int], dict[str, int | None]] = {}
    for line in lines:
        value = line["value"]
        if line["order"] == "ba" and value is not None:
            value = -value
        seen.setdefault((line["id"], line["round"]), {})[line["order"]] = value
    return {name: (values["ab"], values["ba"]) for name, values in seen.items()}


def verdict(ab: int | None, ba: int | None) -> int | str:
    """1 or -1 if both orders prefer a or b, else why nobody wins."""
    if ab is None or ba is None:
        return "unread"
    if ab != ba:
        return "orders_disagree"
    return ab or "tie"


def pair_results(lines: Sequence[dict]) -> dict[str, Any]:
    """Seen from a. A win or a loss needs both orders to agree, all else is a tie (the paper's
    rule). How often the orders disagree, the first seat wins and the longer answer wins say what
    the judge is worth."""
    seen = both_orders(lines)
    lengths = {(line["id"], line["round"]): line["lengths"] for line in lines}
    both = {name: values for name, values in seen.items() if None not in values}
    if not both:
        return {"n": 0, "unread": len(seen)}
    outcome = {name: x if x == y else 0 for name, (x, y) in both.items()}
    values = [*outcome.values()]
    wins, losses, n = values.count(1), values.count(-1), len(values)
    firsts = [v for x, y in both.values() for v in (x, -y) if v]  # 1: the first seat won
    longer = [
        outcome[k] * (a - b) > 0 for k, (a, b) in lengths.items() if outcome.get(k) and a != b
    ]
    return {
        "n": n,
        "unread": len(seen) - n,
        "win": wins,
        "tie": n - wins - losses,
        "loss": losses,
        "win_interval": wilson(wins, n),
        "score": (wins + (n - wins - losses) / 2) / n,
        "score_interval": bootstrap([(v + 1) / 2 for v in values], [name for name, _ in outcome]),
        "p": sign_test(wins, losses),
        "orders_disagree": sum(x != y for x, y in both.values()) / n,
        "orders_reverse": sum(x * y < 0 for x, y in both.values()) / n,
        "first_seat_wins": firsts.count(1) / len(firsts) if firsts else None,
        "longer_wins": sum(longer) / len(longer) if longer else None,
        "mean_length": [sum(side) / len(lengths) for side in zip(*lengths.values(), strict=True)],
    }


def turn_results(lines: Sequence[dict]) -> dict[str, Any]:
    """By aspect: each round's mean, the mean over all turns (micro, the paper's average), and the
    mean of rounds. The interval draws whole dialogues."""
    read = [line for line in lines if line["value"] is not None]
    found = {"n": len(read), "unread": len(lines) - len(read), "rounds": {}, "aspects": {}}
    rounds = sorted({line["round"] for line in read})
    for i in rounds:
        found["rounds"][str(i)] = sum(line["round"] == i for line in read)
    for aspect in ASPECTS if read else ():
        by_round = {
            str(i): mean([line["value"][aspect] for line in read if line["round"] == i])
            for i in rounds
        }
        values = [line["value"][aspect] for line in read]
        found["aspects"][aspect] = {
            "rounds": by_round,
            "micro": mean(values),
            "interval": bootstrap(values, [line["id"] for line in read]),
            "mean_of_rounds": mean([*by_round.values()]),
        }
    return found
