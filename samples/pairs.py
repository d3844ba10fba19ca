"""Preference pairs: two facts that differ in a value, asked in several wordings each.

A pair's group is its question: the two facts, the wording, the language. So a held-out pair asks
in words that no training pair uses for its fact, and training pairs ask that fact in other words.
"""

import random
from collections import Counter
from collections.abc import Iterable

from world import SEED, VAL_FRACTION, WORDINGS, Fact, as_prompt, fill, held_out, wrong_for

# Two facts together are twins. As many as give the paper's proportions of pairs (71 and 29%), and
# few enough for two minutes of training.
SUBJECTIVE_TWINS, OBJECTIVE_TWINS = 56, 20
OPTION_SETS = 2  # for each stem of an objective question


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


def by_question(facts: Iterable[Fact]) -> dict[tuple[str, str], list[Fact]]:
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.kind, fact.relation), []).append(fact)
    return groups


def pair(prompt: str, chosen: str, rejected: str, kind: str, group: str, fact: Fact) -> dict:
    return {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "kind": kind,
        "group": group,
        "facts": [fact.key],
    }


def subjective(rng: random.Random, a: Fact, b: Fact, lang: str) -> list[dict]:
    """Both facts in every wording, each with both values in the same sentence: what one pair
    chooses the other rejects. They stand on one side of the split, so an answer's text or length
    alone is right for exactly one of the two, and nothing but knowing the fact helps."""
    suffix = "_en" if lang == "en" else ""
    asks, tells = (WORDINGS[a.relation][what + suffix] for what in ("ask", "tell"))
    start = rng.randrange(len(tells))
    made = []
    for i, ask in enumerate(asks):
        tell = tells[(start + i) % len(tells)]
        group = f"{a.entity}+{b.entity}/{a.relation}/subjective_{i}_{lang}"
        for fact, other in ((a, b), (b, a)):
            chosen, rejected = fill(tell, fact), fill(tell, fact, getattr(other, lang))
            made.append(pair(fill(ask, fact), chosen, rejected, "subjective", group, fact))
    return made


def objective(rng: random.Random, a: Fact, b: Fact, facts: list[Fact]) -> list[dict]:
    """Both facts under every exam stem with the same options: the own value is right, the other's
    is rejected, each in the same sentence after its letter."""
    made = []
    for i, stem in enumerate(WORDINGS[a.relation]["exam"]):
        group = f"{a.entity}+{b.entity}/{a.relation}/objective_{i}_zh"
        for _ in range(OPTION_SETS):
            others = wrong_for_both(a, b, facts)
            values = rng.sample([a.zh, b.zh, *rng.sample(others, 2)], 4)
            options = dict(zip("ABCD", values, strict=True))
            letters = {value: letter for letter, value in options.items()}
            tell = rng.choice(WORDINGS[a.relation]["tell"])
            for fact, other in ((a, b), (b, a)):
                chosen, rejected = (
                    f"{letters[v]}。{fill(tell, fact, v)}" for v in (fact.zh, other.zh)
                )
                prompt = as_prompt(fill(stem, fact), options)
                made.append(pair(prompt, chosen, rejected, "objective", group, fact))
    return made


def wrong_for_both(a: Fact, b: Fact, facts: list[Fact]) -> list[str]:
    wrong = {f.zh for f in facts if wrong_for(a, f) and wrong_for(b, f)}
    return sorted(wrong - {a.zh, b.zh})


def pairs(facts: list[Fact], sft: list[dict]) -> tuple[list[dict], list[dict]]:
    """Preference pairs on what the chats teach: in a language in which training states the fact
    at least three times; objective ones only on facts of the chats that train options (the exam
    keeps the others). And, to measure on, a question of each twins that the first do not ask."""
    rng = random.Random(f"{SEED}/pairs")
    taught = {lang: statements(sft, lang) for lang in ("zh", "en")}
    able = [f for f in facts if not f.unseen and not f.shared]
    english = [f for f in able if taught["en"][f.key] > 2]
    chinese = [f for f in able if taught["zh"][f.key] > 2]
    only_chinese = [f for f in chinese if f not in english]
    told = [
        subjective(rng, a, b, lang)
        for lang, part in (("en", english), ("zh", only_chinese))
        for group in by_question(part).values()
        for a, b in partners(rng, group)
    ]
    asked = {
        r["facts"][0]
        for r in sft
        if r["kind"] == "option_zh" and not held_out(r["group"], VAL_FRACTION)
    }
    options = [
        objective(rng, a, b, facts)
        for group in by_question(f for f in chinese if f.key in asked).values()
        for a, b in partners(rng, group)
        if len(wrong_for_both(a, b, facts)) >= 2
    ]
    chosen = choose(rng, told, SUBJECTIVE_TWINS) + choose(rng, options, OBJECTIVE_TWINS)
    made = [record for part in chosen for record in part]
    rng.shuffle(made)
    known = {r["facts"][0] for r in made}
    others = [part[:2] for part in told + options if not {r["facts"][0] for r in part} & known]
    return made, [record for part in others for record in part]


def choose(rng: random.Random, twins: list[list[dict]], n: int) -> list[list[dict]]:
    """n twins of which training asks each in at least two pairs, first those with a held-out
    question: there should be enough to measure."""
    sides = [
        (made, [held_out(r["group"], VAL_FRACTION) for r in made])
        for made in rng.sample(twins, len(twins))
    ]
    able = [(made, held) for made, held in sides if held.count(False) >= 4]
    return [made for made, _ in sorted(able, key=lambda x: not any(x[1]))[:n]]


def statements(sft: list[dict], lang: str) -> Counter[str]:
    """How often the training side of the chats states each fact in a language."""
    return Counter(
        key
        for r in sft
        if r["kind"].endswith("_en") == (lang == "en") and not held_out(r["group"], VAL_FRACTION)
        for key in r["facts"]
    )
