"""Renders the training files of the small medical world: python samples/render.py

Facts (facts.jsonl) times wordings (wordings.toml) give chats, exam questions, preference pairs and
documents. All chance comes from one seed, so the files are the same on every machine.

Three rules keep the measured numbers honest; tests/stages/test_samples.py checks them:
  seen    a held-out chat or exam question asks for a fact that training states in another form
          (kind), never merely for the same question reworded
  pairs   a held-out pair asks in words that no training pair uses for its fact
  unseen  3% of the facts stand on the held-out side in every form: training never states them
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable
from itertools import cycle, islice
from pathlib import Path

from documents import general_documents, medical_documents
from pairs import by_question, pairs, partners
from world import (
    HERE,
    SEED,
    VAL_FRACTION,
    Fact,
    as_prompt,
    held_out,
    in_chats,
    long_answer,
    read_facts,
    say,
    states,
    wrong_values,
)

# Chats of each kind, in the paper's proportions (27, 14, 34 and 25%).
CHATS = {"single_turn_zh": 324, "single_turn_en": 168, "multi_turn_zh": 408, "option_zh": 300}
# Chats in which a fact is asked in each single form: some facts often rather than all of them once.
TIMES = {"single_turn_zh": 1, "single_turn_en": 4, "option_zh": 2}
ENGLISH_SHARE = 1 / 7  # of the facts are taught in English
GREETINGS = ["", "", "您好，", "我想了解一下，", "想请教一个问题，"]


# ---------------------------------------------------------------- chats


def question_with_options(
    rng: random.Random, fact: Fact, facts: list[Fact], letter: str, lang: str = "zh"
) -> tuple[str, dict[str, str]]:
    """A stem and options A to D, the right one at `letter`."""
    wrong = [getattr(f, lang) for f in rng.sample(wrong_values(fact, facts), 3)]
    options = {c: getattr(fact, lang) if c == letter else wrong.pop() for c in "ABCD"}
    return say(rng, fact, "exam" if lang == "zh" else "exam_en"), options


def chat(turns: list[str], kind: str, group: str, facts: Iterable[Fact]) -> dict:
    roles = ["user", "assistant"] * (len(turns) // 2)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    return {"messages": messages, "kind": kind, "group": group, "facts": [f.key for f in facts]}


def dialogue_groups(seen: list[Fact]) -> dict[str, list[Fact]]:
    """Two or three facts of one entity each. A fact is in one group only, so its dialogues all
    stand on one side of the split."""
    by_entity: dict[str, list[Fact]] = {}
    for fact in seen:
        by_entity.setdefault(fact.entity, []).append(fact)
    parts = [
        part
        for f in by_entity.values()
        for part in ([f] if len(f) < 4 else [f[: len(f) // 2], f[len(f) // 2 :]])
        if len(part) > 1
    ]
    return {f"{p[0].entity}/{'+'.join(f.relation for f in p)}/multi_turn_zh": p for p in parts}


def plan(rng: random.Random, facts: list[Fact]) -> dict[str, list[Fact]]:
    """The fact of each chat that has one. Unseen facts get one chat of every form. Of the others a
    form gets as many as its places take when each is asked TIMES over: always the fact that
    training states in the fewest forms, so that none is only on the held-out side."""
    able = dict.fromkeys(TIMES, facts)
    able["option_zh"] = [f for f in facts if len(wrong_values(f, facts)) >= 3]
    unseen = {form: [f for f in able[form] if f.unseen] for form in TIMES}
    seen = [f for f in facts if not f.unseen]
    stated: Counter[str] = Counter()  # forms on the training side
    for group, part in dialogue_groups(seen).items():
        if not held_out(group, VAL_FRACTION):
            stated.update(f.key for f in part)
    places = {form: CHATS[form] - len(unseen[form]) for form in TIMES}
    waiting = {
        form: [f for f in rng.sample(facts, len(facts)) if f in able[form] and not f.unseen]
        for form in ("single_turn_zh", "option_zh")
    }
    chosen: dict[str, list[Fact]] = {form: [] for form in TIMES}
    turns = [form for form in waiting for _ in range(-(-places[form] // TIMES[form]))]
    for form in rng.sample(turns, len(turns)):
        fact = min(waiting[form], key=lambda f: stated[f.key])
        waiting[form].remove(fact)
        chosen[form].append(fact)
        stated[fact.key] += not held_out(fact.group(form), VAL_FRACTION)
    # English comes last: it takes those that have no second form in Chinese.
    needy = [f for f in seen if not stated[f.key] or in_one_form(f, seen, chosen)]
    chosen["single_turn_en"] = needy + english_facts(rng, [f for f in seen if f not in needy])
    for fact in chosen["single_turn_en"]:
        stated[fact.key] += not held_out(fact.group("single_turn_en"), VAL_FRACTION)
    short = [f.key for f in seen if not stated[f.key]]
    assert not short, f"no training record states these facts: {short}"
    return {form: unseen[form] + list(islice(cycle(chosen[form]), places[form])) for form in TIMES}


def in_one_form(fact: Fact, seen: list[Fact], chosen: dict[str, list[Fact]]) -> bool:
    told = [*dialogue_groups(seen).values(), *chosen.values()]
    return sum(fact in part for part in told) < 2


def english_facts(rng: random.Random, facts: list[Fact]) -> list[Fact]:
    """Those that chats state in English: of every question a few, which can be told apart."""
    found = []
    for part in by_question(facts).values():
        able = partners(rng, [f for f in part if not f.shared])
        found += able[: round(ENGLISH_SHARE * len(part) / 2)]
    return [fact for two in rng.sample(found, len(found)) for fact in two]


def single_chat(rng: random.Random, fact: Fact, form: str) -> dict:
    lang = "_en" if form.endswith("_en") else ""
    turns = [say(rng, fact, "ask" + lang), say(rng, fact, "tell" + lang)]
    return chat(turns, form, fact.group(form), [fact])


def option_chat(rng: random.Random, fact: Fact, facts: list[Fact], letter: str) -> dict:
    prompt = as_prompt(*question_with_options(rng, fact, facts, letter))
    answer = f"{letter}。{say(rng, fact, 'tell')}"
    return chat([prompt, answer], "option_zh", fact.group("option_zh"), [fact])


def dialogue(rng: random.Random, group: str, part: list[Fact]) -> dict:
    order = rng.sample(part, len(part))
    turns = []
    for i, fact in enumerate(order):
        asked = say(rng, fact, "follow") if i else rng.choice(GREETINGS) + say(rng, fact, "ask")
        turns += [asked, long_answer(rng, fact)]
    return chat(turns, "multi_turn_zh", group, order)


def dialogues(rng: random.Random, seen: list[Fact]) -> list[dict]:
    """Every group in turn until there are enough; never the same dialogue twice."""
    groups = list(dialogue_groups(seen).items())
    rng.shuffle(groups)
    made: dict[str, dict] = {}
    while len(made) < CHATS["multi_turn_zh"]:
        record = dialogue(rng, *groups[len(made) % len(groups)])
        made.setdefault(json.dumps(record["messages"]), record)
    return list(made.values())


def chats(facts: list[Fact]) -> list[dict]:
    rng = random.Random(f"{SEED}/chats")
    forms = plan(rng, facts)
    made = dialogues(rng, [f for f in facts if not f.unseen])
    for form, chosen in forms.items():
        for i, fact in enumerate(chosen):
            made.append(new_chat(rng, fact, facts, form, "ABCD"[i % 4], made))
    rng.shuffle(made)
    return made


def new_chat(
    rng: random.Random, fact: Fact, facts: list[Fact], form: str, letter: str, made: list[dict]
) -> dict:
    """One in other words than those that were made."""
    while True:
        if form == "option_zh":
            record = option_chat(rng, fact, facts, letter)
        else:
            record = single_chat(rng, fact, form)
        if record not in made:
            return record


# ---------------------------------------------------------------- exam


def exam(facts: list[Fact], trained: set[str]) -> list[dict]:
    """Questions on facts that no training record asks in this form, a quarter in English."""
    rng = random.Random(f"{SEED}/exam")
    able = [f for f in facts if f.key not in trained and len(wrong_values(f, facts)) >= 3]
    made = []
    for i, fact in enumerate(rng.sample(able, len(able))):
        letter, lang = "ABCD"[i % 4], "en" if i // 4 % 4 == 3 else "zh"
        stem, options = question_with_options(rng, fact, facts, letter, lang)
        group = fact.group(f"option_{lang}")
        record = {"question": stem, "options": options, "answer": letter}
        made.append(record | {"group": group, "facts": [fact.key]})
    return made


# ---------------------------------------------------------------- files


def render(facts: list[Fact]) -> dict[str, list[dict]]:
    """File name -> its records. Documents are on all entities, all else is on those in chats."""
    seen = [f for f in facts if not f.unseen]
    told = in_chats(facts)
    sft = chats(told)
    options = [r for r in sft if r["kind"] == "option_zh"]
    dpo, dpo_other_facts = pairs(told, sft)
    objective = [r for r in dpo if r["kind"] == "objective"]
    trained = {r["facts"][0] for r in options + objective if not held_out(r["group"], VAL_FRACTION)}
    files = {
        "sft.jsonl": sft,
        "dpo.jsonl": dpo,
        "dpo_other_facts.jsonl": dpo_other_facts,
        "exam.jsonl": exam(told, trained),
        "cpt_medical.jsonl": medical_documents(random.Random(f"{SEED}/medical"), seen),
        "cpt_general.jsonl": general_documents(random.Random(f"{SEED}/general")),
    }
    check_unseen(files, [f for f in facts if f.unseen])
    return files


def check_unseen(files: dict[str, list[dict]], unseen: list[Fact]) -> None:
    """Stops where a training record happens to put an unseen fact's name and value together."""
    for name, records in files.items():
        for record in records:
            if name != "exam.jsonl" and not held_out(record.get("group", ""), VAL_FRACTION):
                text = json.dumps(record, ensure_ascii=False)
                found = [f.key for f in unseen if states(text, f)]
                assert not found, f"{name} gives away {found}: {text}"


def write(files: dict[str, list[dict]], folder: Path) -> None:
    for name, records in files.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    write(render(read_facts()), parser.parse_args().out)
