"""Makes samples/raw: what a general corpus is like before anybody has looked through it.

    python samples/raw.py

About 3,000 documents of the small medical world in the layout of IndustryCorpus, most of them not
medical, many of them useless. `category` says what a document was made as; nothing that builds a
corpus reads it. All persons, numbers and addresses are invented, from ranges that belong to nobody
(555-01xx, example.com, 203.0.113.x, citizens' numbers of a region that does not exist).
raw_labels.jsonl.gz is what a labeller would have answered about some of them.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from documents import TITLES, TITLES_EN, advert, arithmetic, garbage
from world import HERE, SEED, Fact, fill, read_facts, say, trained

JOIN = {"zh": "", "en": " "}
QUESTIONS = 0.5  # share of medical documents that are questions, each with its answer
Made = tuple[str, str, str]  # (text, what it was made as, source)
QUALITY = {"medical": 5, "general": 5, "advert": 1, "spliced": 2, "shuffled": 1, "menu": 2,
           "incoherent": 2, "garbage": 0, "private": 4, "short": 1}  # fmt: skip


def text(parts: list[str], lang: str) -> str:
    return JOIN[lang].join(parts).replace("\n ", "\n").strip()


def asked(rng: random.Random, fact: Fact, lang: str) -> str:
    """A question and its answer, in words that are not kept for what is measured."""
    ask, tell = ("ask_en", "tell_en") if lang == "en" else ("ask", "tell")
    form = "Q: {}\nA: {}\n" if lang == "en" else "问：{}\n答：{}\n"
    return form.format(fill(rng.choice(trained(fact, ask)), fact), say(rng, fact, tell))


def sentences(rng: random.Random, facts: list[Fact], lang: str) -> list[str]:
    told = [say(rng, fact, "tell_en" if lang == "en" else "tell") for fact in facts]
    if lang == "en":
        return told
    return [s for fact, one in zip(facts, told, strict=True)
            for s in ([one, say(rng, fact, "more")] if rng.random() < 0.4 else [one])]  # fmt: skip


class World:
    """Of the facts those that questions ask about: so few that a small model meets each of them
    often enough to learn it from documents."""

    def __init__(self):
        self.facts: dict[str, list[Fact]] = {}
        for fact in (fact for fact in read_facts() if fact.four):
            self.facts.setdefault(fact.entity, []).append(fact)
        lines = (HERE / "general.jsonl").read_text("utf-8").splitlines()
        self.things = [json.loads(line) for line in lines]

    def medical(self, rng: random.Random, lang: str) -> list[str]:
        """Sentences on two to four entities of one kind, or questions and answers, under a title
        or none."""
        entity = rng.choice(list(self.facts))
        kind = self.facts[entity][0].kind
        alike = [e for e, facts in self.facts.items() if facts[0].kind == kind and e != entity]
        chosen = [entity, *rng.sample(alike, min(len(alike), rng.randint(1, 3)))]
        body, as_questions = [], rng.random() < QUESTIONS
        for one in chosen:
            facts = self.facts[one]
            facts = rng.sample(facts, rng.randint(max(1, len(facts) - 1), len(facts)))
            if as_questions:
                body += [asked(rng, fact, lang) for fact in facts]
            else:
                body += sentences(rng, facts, lang)
        first = self.facts[entity][0]
        name = first.name_en if lang == "en" else first.name
        title = rng.choice(TITLES_EN if lang == "en" else TITLES)
        return [title.format(e=name, E=name[0].upper() + name[1:]), *body]

    def general(self, rng: random.Random, lang: str) -> list[str]:
        body = list(chain.from_iterable(
            rng.sample(thing[lang], rng.randint(2, 3)) for thing in rng.sample(self.things, 3)
        ))  # fmt: skip
        if rng.random() < 0.2:
            body.append(arithmetic(rng, rng.randint(2, 99), lang)["text"])
        return body


# ---------------------------------------------------------------- what is wrong with documents


def spliced(world: World, rng: random.Random, lang: str) -> str:
    """Two texts that have nothing to do with each other, cut into one."""
    a, b = world.medical(rng, lang)[:4], world.general(rng, lang)
    cut = JOIN[lang].join(a)
    return cut[: len(cut) * 2 // 3] + JOIN[lang].join(b) + JOIN[lang].join(a[-1:])


def shuffled(world: World, rng: random.Random, lang: str) -> str:
    """Grammar that is broken: the words stand in any order."""
    text = JOIN[lang].join(world.medical(rng, lang))
    parts = list(text) if lang == "zh" else text.split()
    for i in range(0, len(parts) - 6, 6):
        parts[i : i + 6] = rng.sample(parts[i : i + 6], 6)
    return JOIN[lang].join(parts)


def incoherent(world: World, rng: random.Random, lang: str) -> str:
    """Sentences that do not follow from one another."""
    body = [s for _ in range(4) for s in world.medical(rng, lang)[1:3]]
    body += world.general(rng, lang)
    return JOIN[lang].join(rng.sample(body, len(body)))


MENU = {
    "zh": "首页 | 健康 | 视频 | 登录 | 注册\n点击播放视频 00:00 / 03:2{n}\n{t}\n[图片加载失败]\n"
    "上一篇 下一篇 相关阅读 分享到 收藏 打印\n版权所有 转载请注明出处 扫码关注我们 客服在线",
    "en": "Home | Health | Videos | Log in | Sign up\nPlay video 00:00 / 03:2{n}\n{t}\n[image not "
    "found]\nPrevious Next Related Share Print\nAll rights reserved. Cookies. Terms. Contact us",
}


def menu(world: World, rng: random.Random, lang: str) -> str:
    text = JOIN[lang].join(world.medical(rng, lang)[:3])
    return MENU[lang].format(n=rng.randint(0, 9), t=text)


def long_advert(world: World, rng: random.Random, lang: str) -> str:
    name = rng.choice(list(world.facts.values()))[0]
    if lang == "en":
        return f"{advert(rng, lang)} Doctors hate it! Say goodbye to {name.name_en}, order today!"
    return f"{advert(rng, lang)}告别{name.name}，无效退款，今日下单再送一盒，先到先得！"


def private(world: World, rng: random.Random, lang: str) -> str:
    body = JOIN[lang].join(world.medical(rng, lang))
    who = rng.choice(["zhang.san", "li.si", "jane.doe", "john.roe"])
    number = f"555-01{rng.randint(0, 99):02}"
    kinds = {
        "zh": [f"姓名：张三，身份证号：{citizen(rng)}。", f"邮箱：{who}@example.com。",
               f"电话：{number}，请家属留意。", f"家庭住址：示例市样例路{rng.randint(1, 99)}号。",
               f"登录地址203.0.113.{rng.randint(10, 99)}已记录。"],
        "en": [f"Patient: Jane Doe, phone: {number}.", f"Write to {who}@example.com, please.",
               f"Call (202) {number} to reach the family.", f"MRN: {rng.randint(100000, 999999)}.",
               f"Logged in from 203.0.113.{rng.randint(10, 99)}."],
    }  # fmt: skip
    return body + JOIN[lang] + rng.choice(kinds[lang])


def citizen(rng: random.Random) -> str:
    """A number with a right checksum, of a region (10) that no one is from."""
    day = f"19{rng.randint(30, 99)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    number = f"10{rng.randint(0, 9999):04}{day}{rng.randint(0, 999):03}"
    total = sum(int(digit) << (17 - i) for i, digit in enumerate(number))
    return number + "10X98765432"[total % 11]


# ---------------------------------------------------------------- copies and leaks

REPOSTED = {
    "zh": ["（转载）", "【网络整理】", "……", "——来源：网络", "\n阅读全文"],
    "en": [" (reposted)", " [copied from the web]", " ...", "\nRead more", " - source: web"],
}


def reposted(rng: random.Random, text: str, lang: str) -> str:
    return rng.choice(["", "　", "\n"]) + text.rstrip("。.") + rng.choice(REPOSTED[lang])


def leaks(world: World, rng: random.Random) -> Iterator[tuple[str, Made]]:
    """Three exam questions of the samples, each in another disguise."""
    lines = (HERE / "exam.jsonl").read_text("utf-8").splitlines()
    asked = [r["question"] for r in map(json.loads, lines)]
    zh = [q for q in asked if q.isascii() is False and len(q) >= 18]
    en = [q for q in asked if q.isascii() and len(q.split()) >= 8]
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in en[0].upper())
    hidden = "\u200b".join(zh[0][i : i + 4] for i in range(0, len(zh[0]), 4))
    tagged = "<b>" + "</b><br/><i>".join(zh[1][i : i + 7] for i in range(0, len(zh[1]), 7)) + "</i>"
    for lang, question in (("en", wide), ("zh", hidden), ("zh", tagged)):
        body = world.medical(rng, lang)
        yield lang, (JOIN[lang].join([*body[:2], question, *body[2:]]), "leak", "forum")


# ---------------------------------------------------------------- files

Maker = Callable[[World, random.Random, str], str]
# What a document is made as: (how many in Chinese, in English; how; its sources)
KINDS: dict[str, tuple[int, int, Maker, tuple[str, ...]]] = {
    "medical": (640, 420, lambda w, r, k: text(w.medical(r, k), k), ("encyclopedia", "forum")),
    "general": (640, 420, lambda w, r, k: JOIN[k].join(w.general(r, k)), ("news", "encyclopedia")),
    "advert": (110, 70, long_advert, ("shop", "forum")),
    "garbage": (50, 30, lambda w, r, k: garbage(r, k), ("news",)),
    "private": (50, 40, private, ("forum",)),
    "spliced": (50, 40, spliced, ("news", "forum")),
    "shuffled": (50, 40, shuffled, ("forum",)),
    "incoherent": (50, 40, incoherent, ("forum", "news")),
    "menu": (50, 40, menu, ("news",)),
    "short": (30, 20, lambda w, r, k: w.medical(r, k)[1][:18], ("forum",)),
}  # fmt: skip
COPIES = {"near_copy": 150, "copy": 60}
LABELLED = 0.3  # of the documents, and all but the first source's label is of the pool


def make() -> list[dict]:
    world, rng = World(), random.Random(f"{SEED}/raw")
    made: list[tuple[str, Made]] = []
    for kind, (*counts, how, sources) in KINDS.items():
        for lang, n in zip(("zh", "en"), counts, strict=True):
            for _ in range(n):
                made.append((lang, (how(world, rng, lang), kind, rng.choice(sources))))
    good = [(lang, m) for lang, m in made if m[1] in ("medical", "general")]
    for lang, (text, _, source) in rng.sample(good, COPIES["near_copy"]):
        made.append((lang, (reposted(rng, text, lang), "near_copy", source)))
    for lang, (text, _, source) in rng.sample(good, COPIES["copy"]):
        made.append((lang, (text, "copy", source)))
    made += leaks(world, rng)
    rng.shuffle(made)
    return [{"text": text, "source": source, "lang": lang, "category": kind}
            for lang, (text, kind, source) in made]  # fmt: skip


def labelled(records: list[dict]) -> list[dict]:
    """What two answers of a careful labeller would have agreed on, for some of the documents."""
    rng = random.Random(f"{SEED}/raw labels")
    found = []
    for record in rng.sample(records, round(LABELLED * len(records))):
        kind = record["category"]
        if kind in QUALITY:
            domain = {"general": "daily life", "garbage": "other", "advert": "advertisement"}
            found.append({"text": record["text"], "domain": domain.get(kind, "medicine"),
                          "quality": min(6, max(0, QUALITY[kind] + rng.choice((-1, 0, 0, 0, 1)))),
                          "source": record["source"], "in_pool": rng.random() < 0.5})  # fmt: skip
    return found


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def files() -> dict[str, list[dict]]:
    records = make()
    zh, en = ([r for r in records if r["lang"] == lang] for lang in ("zh", "en"))
    half = len(zh) // 2
    return {
        "raw/zh/rank_0.jsonl.gz": zh[:half],
        "raw/zh/rank_1.jsonl.gz": zh[half:],
        "raw/en/rank_0.jsonl.gz": en,
        "raw_labels.jsonl.gz": labelled(records),
    }


if __name__ == "__main__":
    for name, records in files().items():
        write(HERE / name, records)
        print(f"{name}: {len(records):,} records")
