"""Makes samples/pool.jsonl.gz: what a collection of chats is like before anybody has chosen.

    python samples/pool.py

The chats of sft.jsonl, and half as many whose answers are of no use: cut off in the middle,
evasive, or about something else. `planted` says what a chat was made as; nothing that selects
reads it.
pool_labels.jsonl.gz is what a labeller would have said of some of them: how complex a question is,
how good its answer, from 1 to 6.
"""

import json
import random

from raw import write
from world import HERE, SEED

EVASIVE = {
    "zh": ["这个问题不好说。", "请您自行上网查询。", "谢谢您的提问，祝您生活愉快！"],
    "en": ["That is hard to say.", "Please look it up yourself.", "Thank you for your question!"],
}
QUALITY = {"good": 6, "cut": 3, "evasive": 1, "elsewhere": 1}
BAD = 800
SPOILED = ["cut", "cut", "evasive", "evasive", "elsewhere"]  # drawn from
LABELLED = 0.25  # of the chats


def spoiled(rng: random.Random, chat: dict, others: list[dict], how: str) -> dict:
    """The chat with other answers: their first half, none, or another chat's."""
    lang = "en" if chat["kind"].endswith("_en") else "zh"
    of_kind = [other for other in others if other["kind"] == chat["kind"]]
    other = rng.choice([o for o in of_kind if not {*o["facts"]} & {*chat["facts"]}])
    turns = []
    for turn, elsewhere in zip(chat["messages"], other["messages"], strict=True):
        text = turn["content"]
        if turn["role"] == "assistant":
            text = {
                "cut": text[: len(text) // 2],
                "evasive": rng.choice(EVASIVE[lang]),
                "elsewhere": elsewhere["content"],
            }[how]
        turns.append(turn | {"content": text})
    return chat | {"messages": turns, "planted": how, "facts": []}


def make() -> list[dict]:
    rng = random.Random(f"{SEED}/pool")
    lines = (HERE / "sft.jsonl").read_text("utf-8").splitlines()
    chats = [json.loads(line) | {"planted": "good"} for line in lines]
    bad = [spoiled(rng, chat, chats, rng.choice(SPOILED)) for chat in rng.sample(chats, BAD)]
    return rng.sample(chats + bad, len(chats) + BAD)


def labelled(pool: list[dict]) -> list[dict]:
    """The first question and answer of some chats, with what a labeller would have said."""
    rng, found = random.Random(f"{SEED}/pool labels"), []
    for chat in rng.sample(pool, round(LABELLED * len(pool))):
        label = {"quality": QUALITY[chat["planted"]]}
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
