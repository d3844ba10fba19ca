"""The rules: each value by its definition, private data all found, and nothing that is none."""

import random
import re
import unicodedata

import pytest

from nanomed.build import private, rules, text
from nanomed.build.shards import Doc
from tests.build import corpora
from tests.build.scored import chat
from tests.conftest import ROOT

LIMITS = rules.Limits(20, 0.2, 0.3, 5.0, "drop")


def judged(texts: list[str], limits: rules.Limits = LIMITS) -> list[Doc]:
    docs = [Doc(i, {"text": t}, t, {}) for i, t in enumerate(texts)]
    limits.judge(docs)
    return docs


def reasons(doc: Doc) -> list[str]:
    return [found.name for found in doc.findings if not found.keeps]


# ---------------------------------------------------------------- values


def some_texts() -> list[str]:
    rng = random.Random(1)
    made = [corpora.text(rng, rng.choice(("zh", "en"))) for _ in range(40)]
    made += [t[: len(t) // 2] * 3 for t in made[:10]]
    return [
        *made,
        "",
        "患",
        "%%##~~^^||",
        "锟斤拷锟斤拷 text",
        "a\u200bb ©®",
        "！？。，",
        "�" * 9 + "ok",
    ]


def test_the_share_of_special_characters_is_that_of_its_definition():
    for one, value in zip(some_texts(), rules.special(some_texts()), strict=True):
        broken = sum(len(mark) * one.count(mark) for mark in rules.BROKEN)
        kind = [unicodedata.category(c)[0] for c in one]
        plain = sum(k in "LNM" or c in text.ORDINARY for k, c in zip(kind, one, strict=True))
        expected = 1 - (plain - broken) / len(one) if one else 0
        assert value == pytest.approx(expected, abs=1e-9), one


def test_repetition_is_that_of_its_definition():
    texts = some_texts()
    for one, value in zip(texts, rules.repetition(text.tokens(texts)), strict=True):
        words = re.findall("[\u4e00-\u9fff]|[a-z]+", one.lower()) if "\u200b" not in one else []
        runs = [tuple(words[i : i + 10]) for i in range(max(1, len(words) - 9))] if words else []
        assert value == pytest.approx((len(runs) - len(set(runs))) / max(1, len(runs)))


def test_toxic_words_are_counted_per_1000_characters_and_only_whole():
    clean, bad = "患者" * 200, "患者" * 195 + "裸聊 porn CASINO 赌 场"
    assert rules.toxic(text.tokens([clean, bad]), [clean, bad]).tolist() == [0, 1000 * 4 / len(bad)]
    whole = ["a pornographer in Scunthorpe", "性生活 月经 阴道 乳房"]
    assert rules.toxic(text.tokens(whole), whole).tolist() == [0, 0]


def test_each_rule_drops_what_it_is_for_and_says_why(tmp_path):
    good = corpora.text(random.Random(2), "zh", 6)
    cases = {
        "length": "太短了。",
        "special": good[:40] + " %#|~^" * 12,
        "repetition": good * 2,
        "toxic": "裸聊 porn CASINO 赌场 " * 3 + good,
        "private": good + "手机13800138000。",
    }
    for name, one in cases.items():
        (doc,) = judged([one])
        assert reasons(doc)[0] == name, (name, doc.findings)
        found = next(f for f in doc.findings if f.name == name)
        assert (found.value < found.limit) if name == "length" else (found.value > found.limit)
    assert reasons(judged([good])[0]) == []
    words = tmp_path / "words.txt"
    words.write_text("# mine\n注意\n")
    assert "toxic" in reasons(judged(["注意" * 20], rules.Limits(0, 1, 1, 5, "keep", words))[0])


def test_private_data_can_be_masked_instead(tmp_path):
    one = corpora.text(random.Random(3), "en", 6) + " Call 13800138000 or mail a.b@example.com."
    record = {"text": one, "turns": [{"by": "c@example.com"}], "n": 1}
    doc = Doc(0, record, one, {})
    rules.Limits(20, 0.2, 0.3, 5.0, "mask").judge([doc])
    assert reasons(doc) == [] and doc.text.endswith("Call [phone] or mail [email].")
    assert doc.known["tokens"] == text.tokens([doc.text]).lengths[0]
    assert doc.record == {"text": doc.text, "turns": [{"by": "[email]"}], "n": 1}
    assert reasons(judged([one], rules.Limits(20, 0.2, 0.3, 5.0, "keep"))[0]) == []

    for how, wanted in (("drop", ["private"]), ("mask", [])):  # a system text is kept with its chat
        doc = Doc(0, chat("Why?", "Because.", system="Call 13800138000."), "Why?\nBecause.", {})
        rules.Limits(0, 1, 1, 1000, how).judge([doc])
        assert reasons(doc) == wanted
    assert doc.record["system"] == "Call [phone]."


def test_nothing_private_is_left_behind_a_mask():
    assert private.masked("住址：北京市海淀区a@b.com") == "[address]"  # one within another
    assert private.masked("住址：北京协和医院病历号123456楼") == "[address]"
    record = chat("我发烧了，怎么办？", "请问您的家庭住址：", "北京市海淀区一号院", "好的。")
    doc = Doc(0, record, "\n".join(turn["content"] for turn in record["messages"]), {})
    rules.Limits(0, 1, 1, 1000, "mask").judge([doc])
    assert reasons(doc) == ["private"]  # over two turns, neither of which can be masked by itself


# ---------------------------------------------------------------- private data


def citizen(rng: random.Random, region: str) -> str:
    year, month, day = rng.randint(1900, 2024), rng.randint(1, 12), rng.randint(1, 28)
    number = f"{region}{year}{month:02}{day:02}{rng.randint(0, 999):03}"
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # as GB 11643 prints them
    total = sum(int(d) * w for d, w in zip(number, weights, strict=True))
    return number + "10X98765432"[total % 11]


def card(rng: random.Random, prefix: str, length: int) -> str:
    """Completed to a right checksum, by trying."""
    body = prefix + "".join(rng.choices("0123456789", k=length - len(prefix) - 1))
    for last in "0123456789":
        total = 0
        for i, d in enumerate(reversed(body + last)):
            n = int(d) * (1 + i % 2)
            total += n - 9 if n > 9 else n
        if total % 10 == 0:
            return body + last
    raise AssertionError


PHONES = (
    *("13800138000", "138-0013-8000", "+86 138 0013 8000", "17000000000", "010-55501234"),
    *("(0755) 5550123", "(202) 555-0143", "202-555-0143", "+1 202.555.0143", "+44 20 5550 1234"),
)


def planted() -> list[tuple[str, str]]:
    rng = random.Random(4)
    found = [("id", citizen(rng, "100101")) for _ in range(200)]
    found += [
        ("card", card(rng, *kind)) for kind in (("62", 19), ("62", 16), ("4", 16), ("53", 16))
    ]
    found += [("phone", number) for number in PHONES]
    found += [("email", "zhang.san@example.com"), ("email", "a_b+c@mail.example.com.cn")]
    found += [("ip", "203.0.113.77"), ("ip", "198.51.100.23"), ("ssn", "219-09-9999")]
    return found


@pytest.mark.parametrize(
    "around", ["{}", "号码是{}，请", "call {} now", "电话：{}。", "({})", "患者{}男"]
)
def test_private_data_is_found_wherever_it_stands(around):
    for kind, number in planted():
        one = around.format(number)
        spans = [(k, one[a:b]) for k, a, b in private.found(one)]
        assert len(spans) == 1 and spans[0][0] == kind, (one, spans)
        assert number.strip("()+") in spans[0][1] or number in spans[0][1]


def test_named_fields_are_found():
    cases = {
        "record": ["住院号：0012345", "病历号 A123456", "MRN: 884512"],
        "account": ["加微信号：abc_12345", "QQ：1234567"],
        "address": ["家庭住址：示例市样例路5号", "家庭地址: 示例市样例路5号"],
        "phone": ["电话：555-0123", "Phone: 555-0123"],
    }
    for kind, texts in cases.items():
        for one in texts:
            assert [k for k, *_ in private.found(one)] == [kind], one


def no_private_data() -> list[str]:
    """Numbers that are none: laboratory ids with a wrong checksum or no date, versions, doses."""
    rng = random.Random(5)
    ids = []
    while len(ids) < 300:
        number = "".join(rng.choices("0123456789", k=18))
        if not private._identity_card(number):
            ids.append(f"样本{number}")
    return [
        *ids,
        "version 1.2.3.4 and v10.2.33.4, 版本12.10.100.2", "ICD-10 J18.9, section 3.12.4.1",
        "每次0.25g，每日3次，共7天", "5 mg/kg per day for 10-14 days", "血压 120/80-140/90 mmHg",
        "1998-2003 年 1,234,567 例", "2024-01-15 10:30:00", "p = 0.0001, 95% CI 1.02-1.15",
        "WBC 10.5 12.3 9.8 11.0 13.2", "ISBN 978-7-117-12345-6", "CAS 7732-18-5", "NCT01234567",
        "PMID 12345678", "doi:10.1000/182.12345", "chr1:123456-234567", "10 000 000 units",
        "GB/T 2828.1-2012", "3.14159265358979", "0.9% 500 ml 100 ml 250 ml", "12345678901234567890",
        "4000 5000 6000 7000", "2-3-4 day", "at 100-120-140 beats", "@home", "a @ b",
    ]  # fmt: skip


def test_numbers_that_are_no_private_data_are_left_alone():
    found = {one: spans for one in no_private_data() if (spans := private.found(one))}
    assert found == {}


# ---------------------------------------------------------------- real texts


def test_real_medical_chats_are_hardly_called_toxic(shared_data):
    from nanomed.records import read_chats

    for name in (
        "medical_sft_sharegpt.jsonl",
        "huatuo26m_single_turn.json",
        "cmtmedqa_multi_turn.json",
    ):
        chats = [chat for _, chat, _ in read_chats(str(shared_data / name))]
        texts = ["\n".join(turn for _, turn in chat.turns) for chat in chats]
        share = sum("toxic" in reasons(doc) for doc in judged(texts)) / len(texts)
        assert share <= 0.01, name


def test_the_words_of_the_list_are_counted_each_by_itself():
    words = [w for w in rules.WORDS.read_text("utf-8").splitlines() if w and w[0] != "#"]
    for word in words:
        assert rules.toxic(text.tokens([word]), [word])[0] > 0, word
    assert ROOT / "nanomed/build/words.txt" == rules.WORDS
