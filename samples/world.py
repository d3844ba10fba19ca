"""The facts, the split they obey, and the sentences that state them."""

import hashlib
import json
import random
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HERE = Path(__file__).parent
# WORDINGS[relation][what] is a list of patterns, explained in the file.
WORDINGS = tomllib.loads((HERE / "wordings.toml").read_text(encoding="utf-8"))
SEED = "nanomed"
VAL_FRACTION, UNSEEN_FRACTION = 0.1, 0.03
CHATS_FRACTION = 0.66  # of the entities
MIN_TURN = 36  # Chinese characters of every answer in a dialogue: some twenty tokens or more
# Here two different values exclude each other even for related entities: a drug has one class.
EXCLUSIVE = {"drug_class", "location", "transmission"}


@dataclass(frozen=True)
class Fact:
    entity: str
    kind: str
    fields: frozenset[str]  # where related entities are: their values may be true here as well
    name: str
    name_en: str
    relation: str
    zh: str
    en: str
    shared: bool  # true of other entities too, so never a wrong option

    @cached_property
    def key(self) -> str:
        return f"{self.entity}/{self.relation}"

    @cached_property
    def unseen(self) -> bool:
        return held_out(self.key, UNSEEN_FRACTION)

    def group(self, form: str) -> str:
        """What the split goes by. An unseen fact has one group for all forms, and because its
        hash is below UNSEEN_FRACTION it is also below VAL_FRACTION: held out everywhere."""
        return self.key if self.unseen else f"{self.key}/{form}"


def held_out(key: str, fraction: float) -> bool:
    """The split's hash, as in nanomed.store.group_key and nanomed.batches.loader.split."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 < fraction


def read_facts(path: Path = HERE / "facts.jsonl") -> list[Fact]:
    facts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        e = json.loads(line)
        for relation, f in e["facts"].items():
            names = e["id"], e["kind"], frozenset(e["fields"]), e["zh"], e["en"]
            facts.append(Fact(*names, relation, f["zh"], f["en"], f.get("shared", False)))
    return facts


def in_chats(facts: list[Fact]) -> list[Fact]:
    """The facts that chats, pairs and exam are about, those of two entities in three: what two
    minutes of training can teach. Every entity with an unseen fact is among them."""
    marked = {f.entity for f in facts if f.unseen}
    return [f for f in facts if f.entity in marked or held_out(f.entity, CHATS_FRACTION)]


# ---------------------------------------------------------------- sentences


def fill(pattern: str, fact: Fact, value: str = "") -> str:
    """A pattern of wordings.toml with this entity, and its value unless another is given."""
    if not re.search(r"[\u4e00-\u9fff]", pattern):
        name = fact.name_en
        text = pattern.format(e=name, E=name[0].upper() + name[1:], v=value or fact.en)
        return text[0].upper() + text[1:]
    return pattern.format(e=fact.name, v=value or fact.zh)


def say(rng: random.Random, fact: Fact, what: str, value: str = "") -> str:
    return fill(rng.choice(WORDINGS[fact.relation][what]), fact, value)


def as_prompt(stem: str, options: dict[str, str]) -> str:
    return "\n".join([stem, *(f"{letter}. {text}" for letter, text in options.items())])


def long_answer(rng: random.Random, fact: Fact, value: str = "") -> str:
    """The fact and one or two sentences that carry no fact, at least MIN_TURN characters."""
    more = rng.sample(WORDINGS[fact.relation]["more"], 2)
    text = say(rng, fact, "tell", value) + more[0]
    return text if n_chinese(text) >= MIN_TURN else text + more[1]


def n_chinese(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]", text))


def states(text: str, fact: Fact) -> bool:
    """Whether a text holds both the entity's name and the value, in either language."""
    lower = text.lower()
    en = fact.name_en.removeprefix("the ").lower() in lower and fact.en.lower() in lower
    return en or (fact.name in text and fact.zh in text)


# ---------------------------------------------------------------- wrong options


def items(value: str) -> set[str]:
    """The parts of an enumeration: {"发热", "咳嗽", "咳痰"} of 发热、咳嗽和咳痰."""
    return set(re.split("[、，和]", value))


def wrong_for(fact: Fact, other: Fact) -> bool:
    """Whether the other entity's value is surely not also true of this one: it comes from another
    field and has no part in common."""
    if (fact.kind, fact.relation) != (other.kind, other.relation):
        return False
    apart = fact.relation in EXCLUSIVE or not fact.fields & other.fields
    usable = not other.shared and not other.unseen and other.entity != fact.entity
    return apart and usable and not items(fact.zh) & items(other.zh)


def wrong_values(fact: Fact, facts: list[Fact]) -> list[Fact]:
    """One fact for each different value that is wrong here."""
    return list({f.zh: f for f in facts if wrong_for(fact, f)}.values())
