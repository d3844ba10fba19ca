"""The facts, how far they are stated, and the sentences that state them."""

import hashlib
import json
import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# WORDINGS[relation][what] is a list of patterns, explained in the file.
WORDINGS = tomllib.loads((HERE / "wordings.toml").read_text(encoding="utf-8"))
SEED = "nanomed"
VAL_FRACTION = 0.1
MIN_TURN = 36  # Chinese characters of every answer in a dialogue: some twenty tokens or more


@dataclass(frozen=True)
class Fact:
    entity: str
    kind: str
    name: str
    name_en: str
    relation: str
    zh: str
    en: str
    four: str  # "chats 7": where these four facts are stated, and their number; "" for most facts

    @property
    def key(self) -> str:
        return f"{self.entity}/{self.relation}"

    @property
    def stated(self) -> str:
        """ "chats" (and documents), "documents" alone, or "nowhere"."""
        return self.four.split()[0] if self.four else "documents"


def all_facts(path: Path = HERE / "facts.jsonl") -> list[Fact]:
    facts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        e = json.loads(line)
        for relation, f in e["facts"].items():
            names = e["id"], e["kind"], e["zh"], e["en"]
            facts.append(Fact(*names, relation, f["zh"], f["en"], f.get("four", "")))
    return facts


def read_facts(path: Path = HERE / "facts.jsonl") -> list[Fact]:
    """Those that anything may state. The others are in the exam and the questions only."""
    return [fact for fact in all_facts(path) if fact.stated != "nowhere"]


def fours(facts: list[Fact]) -> list[list[Fact]]:
    """Four facts of one relation each, whose values exclude one another: a question on one of them
    has all four values as its options, so whoever does not know is right once in four times."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.four:
            found.setdefault(fact.four, []).append(fact)
    return list(found.values())


def kept(fact: Fact, what: str) -> str:
    """The wording in which no training record asks for this fact. Of another fact it may be one of
    the others, so a model meets all the words, and never with this entity."""
    patterns = WORDINGS[fact.relation][what]
    return patterns[_hash(fact.key) % len(patterns)]


def trained(fact: Fact, what: str) -> list[str]:
    return [p for p in WORDINGS[fact.relation][what] if p != kept(fact, what)]


def held_out(key: str, fraction: float = VAL_FRACTION) -> bool:
    """The split's hash, as in nanomed.store.group_key and nanomed.batches.loader.split."""
    return _hash(key) / 2**64 < fraction


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


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


def letter_of(options: dict[str, str], value: str) -> str:
    return next(letter for letter, text in options.items() if text == value)


def chosen_answer(options: dict[str, str], value: str) -> str:
    return f"{letter_of(options, value)}。{value}。"


def long_answer(rng: random.Random, fact: Fact, value: str = "") -> str:
    """The fact and one or two sentences that carry no fact, at least MIN_TURN characters."""
    more = rng.sample(WORDINGS[fact.relation]["more"], 2)
    text = say(rng, fact, "tell", value) + more[0]
    return text if n_chinese(text) >= MIN_TURN else text + more[1]


def n_chinese(text: str) -> int:
    return len(re.findall(r"[\u4e00-\u9fff]", text))
