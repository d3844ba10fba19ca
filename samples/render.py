"""Renders the training files of the small medical world: python samples/render.py

Facts (facts.jsonl) times wordings (wordings.toml) give chats, exam questions, preference pairs and
documents. All chance comes from one seed, so the files are the same on every machine.

Two rules keep the measured numbers honest; tests/test_samples.py checks both:
  seen    a held-out record asks for a fact that training states in another form (kind), never
          merely for the same question reworded
  unseen  3% of the facts stand on the held-out side in every form: training never states them
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from documents import general_documents, medical_documents
from world import (
    HERE,
    VAL_FRACTION,
    WORDINGS,
    Fact,
    fill,
    held_out,
    long_answer,
    read_facts,
    say,
    states,
    wrong_for,
    wrong_values,
)

SEED = "nanomed"
# Chats of each kind, in the paper's proportions (27, 14, 34 and 25%).
CHATS = {"single_turn_zh": 324, "single_turn_en": 168, "multi_turn_zh": 408, "option_zh": 300}
GREETINGS = ["", "", "您好，", "我想了解一下，", "想请教一个问题，"]


# ---------------------------------------------------------------- chats


def question_with_options(
    rng: random.Random, fact: Fact, facts: list[Fact], letter: str, lang: str = "zh"
) -> tuple[str, dict[str, str]]:
    """A stem and options A to D, the right one at `letter`."""
    wrong = [getattr(f, lang) for f in rng.sample(wrong_values(fact, facts), 3)]
    options = {c: getattr(fact, lang) if c == letter else wrong.pop() for c in "ABCD"}
    return say(rng, fact, "exam" if lang == "zh" else "exam_en"), options


def as_prompt(stem: str, options: dict[str, str]) -> str:
    return "\n".join([stem, *(f"{letter}. {text}" for letter, text in options.items())])


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
    """Which fact gets which single form. Unseen facts get all; after that every place goes to the
    fact that training states in the fewest forms, so that none is only on the held-out side."""
    forms = [form for form in CHATS if form != "multi_turn_zh"]
    chosen: dict[str, list[Fact]] = {form: [] for form in forms}
    stated: Counter[str] = Counter()  # forms on the training side
    for group, part in dialogue_groups([f for f in facts if not f.unseen]).items():
        if not held_out(group, VAL_FRACTION):
            stated.update(f.key for f in part)
    places = [form for form in forms for _ in range(CHATS[form])]
    rng.shuffle(places)
    waiting = {form: rng.sample(facts, len(facts)) for form in forms}
    waiting["option_zh"] = [f for f in waiting["option_zh"] if len(wrong_values(f, facts)) >= 3]
    for form in places:
        fact = min(waiting[form], key=lambda f: stated[f.key] - 9 * f.unseen)  # the neediest
        waiting[form].remove(fact)
        chosen[form].append(fact)
        stated[fact.key] += not held_out(fact.group(form), VAL_FRACTION)
    short = [f.key for f in facts if not f.unseen and stated[f.key] < 1]
    assert not short, f"no training record states these facts: {short}"
    return chosen


def single_chat(rng: random.Random, fact: Fact, form: str) -> dict:
    lang = "_en" if form.endswith("_en") else ""
    turns = [say(rng, fact, "ask" + lang), say(rng, fact, "tell" + lang)]
    return chat(turns, form, fact.group(form), [fact])


def option_chat(rng: random.Random, fact: Fact, facts: list[Fact], letter: str) -> dict:
    prompt = as_prompt(*question_with_options(rng, fact, facts, letter))
    answer = rng.choice([fact.zh + "。", say(rng, fact, "tell")])
    return chat([prompt, f"{letter}。{answer}"], "option_zh", fact.group("option_zh"), [fact])


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
    for form in ("single_turn_zh", "single_turn_en"):
        made += [single_chat(rng, fact, form) for fact in forms[form]]
    made += [
        option_chat(rng, fact, facts, "ABCD"[i % 4]) for i, fact in enumerate(forms["option_zh"])
    ]
    rng.shuffle(made)
    return made


# ---------------------------------------------------------------- preference pairs and exam


def partners(rng: random.Random, facts: list[Fact]) -> list[tuple[Fact, Fact]]:
    """Facts two by two, each of whose values is wrong for the other; a few may stay alone."""
    waiting, found = rng.sample(facts, len(facts)), []
    while waiting:
        fact = waiting.pop()
        other = next((f for f in waiting if wrong_for(fact, f) and wrong_for(f, fact)), None)
        if other:
            waiting.remove(other)
            found.append((fact, other))
    return found


def pair(prompt: str, chosen: str, rejected: str, kind: str, group: str, fact: Fact) -> dict:
    return {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "kind": kind,
        "group": group,
        "facts": [fact.key],
    }


def subjective_pairs(rng: random.Random, a: Fact, b: Fact, lang: str) -> list[dict]:
    """Both questions, each with both values in the same sentence: what one pair chooses the other
    rejects. They stand on one side of the split, so an answer's text or length alone is right for
    exactly one of the two, and nothing but knowing the fact helps."""
    suffix = "_en" if lang == "en" else ""
    pattern = rng.choice(WORDINGS[a.relation]["tell" + suffix])
    group = f"{a.entity}+{b.entity}/{a.relation}/subjective_{lang}"
    return [
        pair(
            say(rng, fact, "ask" + suffix),
            fill(pattern, fact),
            fill(pattern, fact, getattr(other, lang)),
            "subjective",
            group,
            fact,
        )
        for fact, other in ((a, b), (b, a))
    ]


def objective_pair(rng: random.Random, fact: Fact, facts: list[Fact], letter: str) -> dict:
    stem, options = question_with_options(rng, fact, facts, letter)
    wrong = rng.choice([c for c in "ABCD" if c != letter])
    chosen, rejected = (f"{c}。{options[c]}。" for c in (letter, wrong))
    group = fact.group("option_zh")
    return pair(as_prompt(stem, options), chosen, rejected, "objective", group, fact)


def pairs(facts: list[Fact], with_option_chat: set[str]) -> list[dict]:
    """Objective pairs only for facts that are also option chats: the exam keeps the others."""
    rng = random.Random(f"{SEED}/pairs")
    by_question: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        if not fact.unseen and not fact.shared:
            by_question.setdefault((fact.kind, fact.relation), []).append(fact)
    made = []
    for group in by_question.values():
        rng.shuffle(group)
        cut, end = round(0.53 * len(group)), round(0.75 * len(group))  # enough for the demo run
        for lang, part in (("zh", group[:cut]), ("en", group[cut:end])):
            for a, b in partners(rng, part):
                made += subjective_pairs(rng, a, b, lang)
    able = [f for f in facts if f.key in with_option_chat and not f.unseen]
    n_objective = round(len(made) * 3708 / 9019)  # the paper's subjective and objective pairs
    for i, fact in enumerate(rng.sample(able, n_objective)):
        made.append(objective_pair(rng, fact, facts, "ABCD"[i % 4]))
    rng.shuffle(made)
    return made


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
    """File name -> its records."""
    sft = chats(facts)
    options = [r for r in sft if r["kind"] == "option_zh"]
    dpo = pairs(facts, {r["facts"][0] for r in options})
    objective = [r for r in dpo if r["kind"] == "objective"]
    trained = {r["facts"][0] for r in options + objective if not held_out(r["group"], VAL_FRACTION)}
    seen = [f for f in facts if not f.unseen]
    files = {
        "sft.jsonl": sft,
        "dpo.jsonl": dpo,
        "exam.jsonl": exam(facts, trained),
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
