"""Documents for continued pre-training: articles on the facts, everyday texts, and a few bad ones.

The bad ones carry their label in `quality`, so that a filter can be tried on them. Persons and
numbers in the private ones are invented: 555-01xx and example.com are reserved for examples.
"""

import json
import random

from world import HERE, WORDINGS, Fact, fill, say

BAD_SHARE = 0.016  # of each of the four bad qualities: some 6% of all documents
TITLES = ["", "", "{e}\n", "医学小词典：{e}\n", "健康科普｜{e}\n"]
TITLES_EN = ["", "", "{E}\n", "Medical notes: {e}\n"]


def document(text: str, source: str, lang: str, group: str, facts: list[str] | None = None) -> dict:
    record = {"text": text, "source": source, "lang": lang, "quality": "good", "group": group}
    return record | {"tags": facts or []}


# ---------------------------------------------------------------- medical


def article(rng: random.Random, facts: list[Fact], lang: str) -> dict:
    """Two to six sentences on one entity, its definition first."""
    order = sorted(rng.sample(facts, len(facts)), key=lambda f: f.relation != "definition")
    tell, titles = ("tell_en", TITLES_EN) if lang == "en" else ("tell", TITLES)
    sentences = [say(rng, fact, tell) for fact in order]
    if len(order) == 1:  # the same fact in two wordings
        sentences = [fill(p, order[0]) for p in rng.sample(WORDINGS[order[0].relation][tell], 2)]
    if lang == "zh" and len(sentences) < 6:  # a sentence that carries no fact
        sentences.append(say(rng, order[-1], "more"))
    name = facts[0].name_en if lang == "en" else facts[0].name
    title = rng.choice(titles).format(e=name, E=name[0].upper() + name[1:])
    text = title + (" " if lang == "en" else "").join(sentences)
    group = f"{facts[0].entity}/document_{lang}"
    return document(text, "medical", lang, group, [f.key for f in order])


def medical_documents(rng: random.Random, facts: list[Fact]) -> list[dict]:
    """Two Chinese articles and an English one on every entity."""
    by_entity: dict[str, list[Fact]] = {}
    for fact in facts:
        by_entity.setdefault(fact.entity, []).append(fact)
    made = [article(rng, f, lang) for f in by_entity.values() for lang in ("zh", "zh", "en")]
    return mixed(rng, made, "medical")


# ---------------------------------------------------------------- general


def general_documents(rng: random.Random) -> list[dict]:
    """Every thing of general.jsonl three times in Chinese and twice in English, and sums."""
    lines = (HERE / "general.jsonl").read_text(encoding="utf-8").splitlines()
    made = [arithmetic(rng, n, lang) for n in range(2, 32) for lang in ("zh", "en")]
    for thing in map(json.loads, lines):
        for lang in ("zh", "zh", "zh", "en", "en"):
            first, *rest = thing[lang]
            sentences = [first, *rng.sample(rest, rng.randint(1, len(rest)))]
            text = (" " if lang == "en" else "").join(sentences)
            made.append(document(text, "general", lang, f"{thing['id']}/document_{lang}"))
    return mixed(rng, made, "general")


def arithmetic(rng: random.Random, n: int, lang: str) -> dict:
    """Three or four sums on one number."""
    plus, minus, times = ("加", "减", "乘") if lang == "zh" else (" plus ", " minus ", " times ")
    equals, stop = ("等于", "。") if lang == "zh" else (" is ", ". ")
    m = rng.randint(2, 30)
    sums = [(f"{n}{plus}{m}", n + m), (f"{n + m}{minus}{m}", n), (f"{n}{times}{m}", n * m)]
    text = "".join(f"{left}{equals}{right}{stop}" for left, right in rng.sample(sums, 3))
    return document(text.strip(), "general", lang, f"number-{n}/document_{lang}")


# ---------------------------------------------------------------- bad ones


def mixed(rng: random.Random, good: list[dict], source: str) -> list[dict]:
    """The good documents and the bad ones among them, without exact copies."""
    n_bad = round(BAD_SHARE * len(good))
    made = good + [near_duplicate(rng, record) for record in rng.sample(good, n_bad)]
    for quality, text_of in (("advertising", advert), ("garbage", garbage), ("private", private)):
        for i in range(n_bad):
            lang = "en" if i % 3 == 2 else "zh"
            group = f"{source}-{quality}-{i}/document_{lang}"
            bad = document(text_of(rng, lang), source, lang, group)
            made.append(bad | {"quality": quality})
    made = list({record["text"]: record for record in made}.values())
    rng.shuffle(made)
    return made


def near_duplicate(rng: random.Random, record: dict) -> dict:
    """A copy with a mark of its second publisher; it stays in the original's group."""
    mark = {
        "zh": ["（转载）", "【网络整理】", "……", "  "],
        "en": [" (reposted)", " [copied from the web]", " ...", "  "],
    }
    text = record["text"].rstrip("。.") + rng.choice(mark[record["lang"]])
    return record | {"text": text, "quality": "near_duplicate"}


def advert(rng: random.Random, lang: str) -> str:
    number = f"555-01{rng.randint(0, 99):02}"
    if lang == "en":
        what = rng.choice(["miracle tea", "golden pillow", "magic bracelet"])
        return (
            f"BUY NOW!!! Our {what} solves everything, {rng.randint(50, 90)}% off, call {number}!!!"
        )
    what = rng.choice(["神奇养生茶", "祖传能量手环", "量子保健枕", "万能魔法贴"])
    price = rng.randint(19, 199)
    return f"限时特价！！！{what}，一用就灵，只要{price}元，名额有限，立即拨打{number}抢购！！！"


def garbage(rng: random.Random, lang: str) -> str:
    parts = ["锟斤拷", "烫烫烫", "首页|登录|注册", "□□□", "&nbsp;"] if lang == "zh" else []
    parts += ["%%##", "xqzv", "0x7f", "//--//", "<div>", "\\u00", "lorem", ";;;;"]
    return "".join(rng.choice(parts) + rng.choice(["", " "]) for _ in range(24)).strip()


def private(rng: random.Random, lang: str) -> str:
    number = f"555-01{rng.randint(0, 99):02}"
    if lang == "en":
        name = rng.choice(["Jane Doe", "John Doe", "Richard Roe"])
        mail = name.lower().replace(" ", ".") + "@example.com"
        return (
            f"Name: {name}, phone: {number}, e-mail: {mail}, please keep this for the next visit."
        )
    name, mail = rng.choice([("张三", "zhangsan"), ("李四", "lisi"), ("王五", "wangwu")])
    address = f"示例市样例路{rng.randint(1, 99)}号"
    return f"姓名：{name}，电话：{number}，邮箱：{mail}@example.com，住址：{address}，请留作回访。"
