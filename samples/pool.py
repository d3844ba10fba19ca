"""Makes samples/pool.jsonl.gz: what a collection of chats is like before anybody has chosen.

    python samples/pool.py

Chats as in sft.jsonl, half as many again, and as useless ones a third of all: their answers are cut
off in the middle, evasive, or about something else. `category` says what a chat was made as;
nothing that selects reads it.
pool_labels.jsonl.gz is what a labeller would have said of some of them: how complex a question is,
how good its answer, from 1 to 6.
"""

import random

import render
from raw import write
from render import CHATS
from world import HERE, SEED, all_facts, fours

EVASIVE = {
    "zh": ["这个问题不好说。", "请您自行上网查询。", "谢谢您的提问，祝您生活愉快！"],
    "en": ["That is hard to say.", "Please look it up yourself.", "Thank you for your question!"],
}
QUALITY = {"good": 6, "cut": 3, "evasive": 1, "elsewhere": 1}
TIMES = 1.5  # as many as in sft.jsonl
BAD = 1200
# How: in these proportions. A small scorer does not see that an answer is about something else; the
# loss of the answer shows it, once a model has read the other chats.
SPOILED = {"cut": 9, "evasive": 10, "elsewhere": 1}
LABELLED = 0.25  # of the chats


def spoiled(rng: random.Random, chat: dict, others: list[dict], how: str) -> dict:
    """The chat with other answers: their first third, none, or another chat's."""
    lang = "en" if chat["kind"].endswith("_en") else "zh"
    of_kind = [other for other in others if other["kind"] == chat["kind"]]
    other = rng.choice([o for o in of_kind if not {*o["tags"]} & {*chat["tags"]}])
    turns = []
    for turn, elsewhere in zip(chat["messages"], other["messages"], strict=True):
        text = turn["content"]
        if turn["role"] == "assistant":
            text = {
                "cut": text[: len(text) // 3],
                "evasive": rng.choice(EVASIVE[lang]),
                "elsewhere": elsewhere["content"],
            }[how]
        turns.append(turn | {"content": text})
    return chat | {"messages": turns, "category": how, "tags": []}


def make() -> list[dict]:
    rng = random.Random(f"{SEED}/pool")
    told = [four for four in fours(all_facts()) if four[0].stated == "chats"]
    numbers = {kind: round(TIMES * n) for kind, n in CHATS.items()}
    chats = [chat | {"category": "good"} for chat in render.chats(told, numbers)]
    ways = rng.choices([*SPOILED], [*SPOILED.values()], k=BAD)
    drawn = rng.sample(chats, BAD)
    bad = [spoiled(rng, one, chats, how) for one, how in zip(drawn, ways, strict=True)]
    return rng.sample(chats + bad, len(chats) + BAD)


def labelled(pool: list[dict]) -> list[dict]:
    """The first question and answer of some chats, with what a labeller would have said."""
    rng, found = random.Random(f"{SEED}/pool labels"), []
    for chat in rng.sample(pool, round(LABELLED * len(pool))):
        label = {"quality": QUALITY[chat["category"]]}
        label["complexity"] = 4 if chat["kind"] == "option_zh" else 3
        found.append({"messages": chat["messages"][:2]} | label)
    return found


def files() -> dict[str, list[dict]]:
    pool = make()
    return {"pool.jsonl.gz": pool, "pool_labels.jsonl.gz": labelled(pool)}


if __name__ == "__main__":
    for name, records in files().items():
        write(HERE / name, records)
        print(f"{name}: {len(records):,} records")
