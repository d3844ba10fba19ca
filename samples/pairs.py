"""Preference pairs: two facts of a four, asked in several wordings each, in Chinese.

A pair's group is its question: the two facts and the wording. So a held-out pair asks
in words that no training pair uses for its fact, and training pairs ask that fact in other words.
"""

import random

from world import SEED, WORDINGS, Fact, as_prompt, chosen_answer, fill, trained

# Two facts together are twins. As many as give the paper's proportions of pairs (71 and 29%).
SUBJECTIVE_TWINS, OBJECTIVE_TWINS = 25, 16
WORDS = 3  # in which a fact is asked, in pairs of either kind
SENTENCES = 3  # in which a subjective question is answered
OPTION_SETS = 2  # with which an objective question is asked
CAREFUL = 2  # pairs for each wording of a fact


def pair(prompt: str, chosen: str, rejected: str, kind: str, group: str, fact: Fact) -> dict:
    return {
        "conversations": [{"from": "human", "value": prompt}],
        "chosen": chosen,
        "rejected": rejected,
        "kind": kind,
        "group": group,
        "tags": [fact.key],
    }


def subjective(rng: random.Random, a: Fact, b: Fact) -> list[dict]:
    """Both facts in the same wordings, each with both values in the same sentence: what one pair
    chooses the other rejects. They stand on one side of the split, so an answer's text or length
    alone is right for exactly one of the two, and nothing but knowing the fact helps."""
    made = []
    for i, ask in asked_in(rng, a, b):
        group = f"{a.entity}+{b.entity}/{a.relation}/subjective_{i}_zh"
        for tell in rng.sample(WORDINGS[a.relation]["tell"], SENTENCES):
            for fact, other in ((a, b), (b, a)):
                chosen, rejected = fill(tell, fact), fill(tell, fact, other.zh)
                made.append(pair(fill(ask, fact), chosen, rejected, "subjective", group, fact))
    return made


def asked_in(rng: random.Random, a: Fact, b: Fact) -> list[tuple[int, str]]:
    """Numbered wordings, without those that are kept for what is measured."""
    both = [(i, ask) for i, ask in enumerate(WORDINGS[a.relation]["ask"])
            if ask in trained(a, "ask") and ask in trained(b, "ask")]  # fmt: skip
    return rng.sample(both, WORDS)


def objective(rng: random.Random, a: Fact, b: Fact, four: list[Fact]) -> list[dict]:
    """Both facts in the same wordings with the same options: the own value is right, the other's
    is rejected."""
    made = []
    for i, stem in asked_in(rng, a, b):
        group = f"{a.entity}+{b.entity}/{a.relation}/objective_{i}_zh"
        for _ in range(OPTION_SETS):
            options = dict(zip("ABCD", (f.zh for f in rng.sample(four, 4)), strict=True))
            for fact, other in ((a, b), (b, a)):
                chosen, rejected = (chosen_answer(options, f.zh) for f in (fact, other))
                prompt = as_prompt(fill(stem, fact), options)
                made.append(pair(prompt, chosen, rejected, "objective", group, fact))
    return list({str(record): record for record in made}.values())


def careful(told: list[list[Fact]]) -> list[dict]:
    """What is preferred here is a way to answer: both answers have the fact in the same words, and
    the chosen one goes on with the doctor, the other with something else that is true. The chats
    have both sorts of sentences; so nothing that they teach tells which is preferred."""
    rng, made = random.Random(f"{SEED}/careful"), []
    for fact in (fact for four in told for fact in four):
        words = WORDINGS[fact.relation]
        doctor = [more for more in words["more"] if "医生" in more]
        other = [more for more in words["more"] if "医" not in more and "急" not in more]
        for ask in trained(fact, "ask") if doctor and other else ():
            group = f"{fact.key}/careful_{words['ask'].index(ask)}_zh"
            for tell in rng.sample(words["tell"], CAREFUL):
                chosen, rejected = (fill(tell, fact) + rng.choice(more) for more in (doctor, other))
                made.append(pair(fill(ask, fact), chosen, rejected, "subjective", group, fact))
    return rng.sample(made, len(made))


def pairs(told: list[list[Fact]]) -> tuple[list[dict], list[dict]]:
    """Preference pairs on what the chats teach, and those on the twins that are left, to measure
    on."""
    rng = random.Random(f"{SEED}/pairs")
    twins = []
    for four in told:
        a, b, c, d = rng.sample(four, 4)
        twins += [(a, b, four), (c, d, four)]
    rng.shuffle(twins)
    asked, others = [], []
    for number, (a, b, four) in enumerate(twins):
        kept = asked if number < SUBJECTIVE_TWINS else others
        kept += subjective(rng, a, b)
        if number < OBJECTIVE_TWINS or kept is others:
            kept += objective(rng, a, b, four)
    return rng.sample(asked, len(asked)), others
