"""Renders the training files of the small medical world: python samples/render.py

Facts (facts.jsonl) times wordings (wordings.toml) give chats, exam questions, preference pairs and
documents. All chance comes from one seed, so the files are the same on every machine.

Three rules keep the measured numbers honest; tests/stages/test_samples.py checks them:
  wordings   questions.jsonl and exam.jsonl ask for a fact in words in which no chat asks for it
  documents  some facts stand in documents alone
  nowhere    some facts stand nowhere: what a model gets right of them it has guessed
"""

import argparse
import json
import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from documents import general_documents, medical_documents
from pairs import careful, pairs
from world import (
    HERE,
    SEED,
    WORDINGS,
    Fact,
    all_facts,
    as_prompt,
    chosen_answer,
    fill,
    fours,
    held_out,
    kept,
    letter_of,
    long_answer,
    read_facts,
    say,
    trained,
)

# Chats of each kind, in the paper's proportions (27, 14, 34 and 25%): every fact is asked about
# seven times in Chinese, six times with options, and in seventeen dialogues. One fact of each four
# is asked in English, too, fourteen times: so few chats would not teach a small model all of them.
CHATS = {"single_turn_zh": 432, "single_turn_en": 224, "multi_turn_zh": 544, "option_zh": 400}
GREETINGS = ["", "", "您好，", "我想了解一下，", "想请教一个问题，"]
GREETINGS_EN = ["", "Hello. ", "I have a question. ", "Please tell me: "]


# ---------------------------------------------------------------- chats


def chat(turns: list[str], kind: str, group: str, facts: Iterable[Fact]) -> dict:
    roles = ["user", "assistant"] * (len(turns) // 2)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    return {"messages": messages, "kind": kind, "group": group, "tags": [f.key for f in facts]}


def group(fact: Fact, ask: str, kind: str) -> str:
    """What the split goes by: a fact asked in these words."""
    patterns = WORDINGS[fact.relation]["ask_en" if kind.endswith("_en") else "ask"]
    stems = WORDINGS[fact.relation]["exam"]
    return f"{fact.key}/{kind}_{(stems + patterns if kind == 'option_zh' else patterns).index(ask)}"


def single_chat(fact: Fact, turn: int, kind: str) -> dict:
    """The fact's question number `turn`: each time in other words, as long as there are any."""
    lang, greetings = ("_en", GREETINGS_EN) if kind.endswith("_en") else ("", [""])
    asks, tells = trained(fact, "ask" + lang), WORDINGS[fact.relation]["tell" + lang]
    words = [*product(greetings, asks, tells)]
    random.Random(f"{SEED}/{fact.key}/{kind}").shuffle(words)
    greeting, ask, tell = words[turn % len(words)]
    return chat(
        [greeting + fill(ask, fact), fill(tell, fact)], kind, group(fact, ask, kind), [fact]
    )


def options(rng: random.Random, four: list[Fact], lang: str = "zh") -> dict[str, str]:
    """The values of four facts, in any order, under the letters A to D."""
    return dict(zip("ABCD", (getattr(f, lang) for f in rng.sample(four, 4)), strict=True))


def option_chat(rng: random.Random, fact: Fact, four: list[Fact], turn: int) -> dict:
    stems = trained(fact, "exam") + trained(fact, "ask")
    stem, choice = stems[turn % len(stems)], options(rng, four)
    turns = [as_prompt(fill(stem, fact), choice), chosen_answer(choice, fact.zh)]
    return chat(turns, "option_zh", group(fact, stem, "option_zh"), [fact])


def dialogue(rng: random.Random, fact: Fact, facts: list[Fact], number: int) -> dict:
    """Two questions: a fact, and another one of the same entity or of any."""
    others = [f for f in facts if f.entity == fact.entity and f != fact]
    other = rng.choice(others or [f for f in facts if f != fact])
    second = say(rng, other, "follow") if others else asked(rng, other)
    turns = [rng.choice(GREETINGS) + asked(rng, fact), long_answer(rng, fact)]
    turns += [second, long_answer(rng, other)]
    return chat(turns, "multi_turn_zh", f"{fact.key}/multi_turn_zh_{number}", [fact, other])


def asked(rng: random.Random, fact: Fact) -> str:
    """A question in words that are on the training side of the chats."""
    asks = trained(fact, "ask")
    free = [a for a in asks if not held_out(group(fact, a, "single_turn_zh"))]
    return fill(rng.choice(free or asks), fact)


def chats(told: list[list[Fact]], numbers: dict[str, int]) -> list[dict]:
    """Every fact in turn, again and again, until a kind has its number of chats."""
    rng = random.Random(f"{SEED}/chats")
    facts = [(fact, four) for four in told for fact in four]
    made: dict[str, dict] = {}
    for kind, n in numbers.items():
        asked_about = facts[::4] if kind.endswith("_en") else facts
        order, turn, wanted = rng.sample(asked_about, len(asked_about)), 0, len(made) + n
        while len(made) < wanted:
            fact, four = order[turn % len(order)]
            again, turn = turn // len(order), turn + 1
            assert again < n, f"{kind}: {n} different chats need more wordings"
            if kind == "multi_turn_zh":
                record = dialogue(rng, fact, [f for f, _ in facts], again)
            elif kind == "option_zh":
                record = option_chat(rng, fact, four, again)
            else:
                record = single_chat(fact, again, kind)
            made.setdefault(json.dumps(record["messages"]), record)  # no two alike
    return rng.sample(list(made.values()), len(made))


# ---------------------------------------------------------------- what is measured


def in_english(fact: Fact, four: list[Fact]) -> bool:
    """Of the facts that chats state, one of each four; the others all."""
    return fact == four[0] or fact.stated != "chats"


def questions(asked: list[list[Fact]]) -> list[dict]:
    """Each fact in its kept wording; an answer is right that has the value."""
    return [
        {"question": fill(kept(fact, what), fact), "answer": getattr(fact, lang), "lang": lang,
         "stated": fact.stated, "tags": [fact.key]}
        for four in asked for fact in four for lang, what in (("zh", "ask"), ("en", "ask_en"))
        if lang == "zh" or in_english(fact, four)
    ]  # fmt: skip


def exam(asked: list[list[Fact]]) -> list[dict]:
    """Each fact under its kept stem; of the facts that chats state one in four in English too, and
    those that nothing states under every stem: enough to tell chance from knowledge."""
    rng = random.Random(f"{SEED}/exam")
    return [
        exam_item(rng, fact, four, what, stem)
        for four in asked
        for fact in four
        for what, stem in exam_stems(fact, four)
    ]


def exam_stems(fact: Fact, four: list[Fact]) -> list[tuple[str, str]]:
    if fact.stated == "nowhere":
        return [("exam", stem) for stem in WORDINGS[fact.relation]["exam"]]
    english = [("exam_en", kept(fact, "exam_en"))] if fact.stated == "chats" else []
    return [("exam", kept(fact, "exam")), *(english if in_english(fact, four) else [])]


def exam_item(rng: random.Random, fact: Fact, four: list[Fact], what: str, stem: str) -> dict:
    """`sentence` is the answer with a gap for an option's text."""
    lang = "en" if what == "exam_en" else "zh"
    choice = options(rng, four, lang)
    return {
        "question": fill(stem, fact),
        "options": choice,
        "answer": letter_of(choice, getattr(fact, lang)),
        "sentence": say(rng, fact, "tell" if lang == "zh" else "tell_en", "{}"),
        "lang": lang,
        "stated": fact.stated,
        "tags": [fact.key],
    }


# ---------------------------------------------------------------- files


def render() -> dict[str, list[dict]]:
    """File name -> its records."""
    asked = fours(all_facts())
    told = [four for four in asked if four[0].stated == "chats"]
    dpo, dpo_other_facts = pairs(told)
    files = {
        "sft.jsonl": chats(told, CHATS),
        "dpo.jsonl": dpo,
        "dpo_other_facts.jsonl": dpo_other_facts,
        "dpo_careful.jsonl": careful(told),
        "questions.jsonl": questions(asked),
        "exam.jsonl": exam(asked),
        "cpt_medical.jsonl": medical_documents(random.Random(f"{SEED}/medical"), read_facts()),
        "cpt_general.jsonl": general_documents(random.Random(f"{SEED}/general")),
    }
    return files


def write(files: dict[str, list[dict]], folder: Path) -> None:
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    write(render(), parser.parse_args().out)
