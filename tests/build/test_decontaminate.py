"""Decontamination: leaked questions are found in every disguise that loses nothing, and no more."""

import gzip
import json
import random
import re
from pathlib import Path
from unittest import mock

import pytest

from nanomed.build import decontaminate
from nanomed.build.decontaminate import Benchmarks, Index, Item, items_of
from nanomed.build.shards import Doc
from nanomed.build.text import tokens
from nanomed.config import InputError
from nanomed.records import read_chats, read_records
from tests.build.corpora import text, write


def full_width(t: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t)


def cut(t: str, n: int) -> list[str]:
    return [t[i : i + n] for i in range(0, len(t), n)]


def replaced(t: str, rng: random.Random) -> str:
    if " " in t:
        return " ".join(w if rng.random() > 1 / 16 else "patient" for w in t.split())
    return "".join(c if rng.random() > 1 / 16 else "的" for c in t)


# Each loses nothing of the question; f is a text around it.
LOSSLESS = {
    "verbatim": lambda t, f: f"{f} {t} {f}",
    "upper case": lambda t, f: f"{f} {t.upper()}",
    "punctuation": lambda t, f: f"{f} " + re.sub(r"[,.;:，。、]", " \n", t) + f" {f}",
    "full width": lambda t, f: f"{f} {full_width(t)}",
    "tags": lambda t, f: f"{f} " + re.sub(" ", "<br/> ", t, count=8) + f" {f}",
    "invisible": lambda t, f: f"{f} " + "\u200b".join(cut(t, 9)) + f" {f}",
}
LOSSY = {
    "one word in 16 replaced": lambda t, f: f"{f} {replaced(t, random.Random(t))} {f}",
    "sentences in another order": lambda t, f: " ".join(sorted(re.split(r"(?<=[.?!。？])", t))),
    "first half only": lambda t, f: f"{f} {t[: len(t) // 2]} {f}",
}


def dropped(index: Index, texts: list[str]) -> list[tuple[str, int] | None]:
    """The item that each text goes for."""
    hits = index.hits(texts)
    found = (hits.get(i, (False, 0, 0, None)) for i in range(len(texts)))
    return [(item.file, item.record) if goes else None for goes, _, _, item in found]


def questions(n: int, seed: int = 0) -> list[Item]:
    rng, made = random.Random(seed), []
    for i in range(n):
        lang = rng.choice(("zh", "en"))
        asked = text(rng, lang, rng.randint(1, 3))
        if i % 4 == 0:  # short ones
            asked = asked[: rng.randint(6, 9)] if lang == "zh" else " ".join(asked.split()[:6])
        made.append(Item("exam.jsonl", i, asked, "rest\nwater\nsleep\n" + str(i)))
    return made


@pytest.mark.parametrize("disguise", LOSSLESS)
def test_lossless_disguises_hide_nothing(disguise):
    items, rng = questions(120), random.Random(9)
    index = Index(items)
    texts = [LOSSLESS[disguise](i.question, text(rng, "en", 3)) for i in items]
    found = dropped(index, texts)
    long_enough = tokens([i.question for i in items]).lengths >= decontaminate.SHORTEST
    missed = [
        i.question
        for i, hit, long in zip(items, found, long_enough, strict=True)
        if long and not hit
    ]
    assert missed == [] and long_enough.sum() > 100


def test_what_is_no_question_stays():
    rng = random.Random(11)
    texts = [text(rng, rng.choice(("zh", "en"))) for _ in range(300)]
    assert [
        t for t, hit in zip(texts, dropped(Index(questions(120)), texts), strict=True) if hit
    ] == []


def test_half_of_its_runs_make_a_leak_and_any_is_noted():
    asked = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november"
    words = asked.split()  # 14 tokens, 7 runs of 8
    index = Index([Item("a", 1, asked, "")])
    for n, expected in ((7, None), (8, 1), (10, 3), (11, 4), (14, 7)):
        hits = index.hits([f"before {' '.join(words[:n])} after"])
        assert bool(hits) == (expected is not None)
        if hits:
            goes, part, needed, _ = hits[0]
            assert (part, needed, goes) == (pytest.approx(expected / 7), 0.5, expected >= 4)


COMMON = "Which of the following statements is true?"


def test_a_short_question_must_stand_by_itself_and_a_term_with_its_options():
    index = Index([
        Item("a", 1, "传染源是指", "病原体\n带菌的人"),
        Item("b", 1, "帕金森综合征", "共济失调\n角膜环阳性\n有家族史"),
        Item("b", 2, "肝豆状核变性", "共济失调\n角膜环阳性\n有家族史"),
        *(Item("c", i, COMMON, f"one{i}\ntwo{i} words\nthree{i}") for i in range(4)),
        Item("d", 1, "治疗首选", ""),
    ])  # fmt: skip
    leaks = ["题：传染源是指（ ）", "帕金森综合征 A 共济失调 B 角膜环阳性 C 有家族史",
             "which of the following statements is true? a one2 b two2 words c three2"]  # fmt: skip
    clean = ["我们说传染源是指体内有病原体的人", "帕金森综合征，肝豆状核变性。", "治疗首选手术",
             "Which of the following statements is true? The sky is blue."]  # fmt: skip
    assert [hit is not None for hit in dropped(index, leaks + clean)] == [True] * 3 + [False] * 4
    assert index.unprotected() == {"d": 1}


# ---------------------------------------------------------------- files

LAYOUTS = {
    "json lines": ("x.jsonl", '{"question": "Q one?", "options": {"A": "a", "B": "b"}}\n'),
    "array": ("x.json", '[{"question": "Q one?", "choices": ["a", "b"], "answer": 0}]'),
    "by id": ("x.json", '{"1": {"QUESTION": "Q one?", "CONTEXTS": ["long"], "YEAR": "1"}}'),
    "csv with a header": ("x.csv", "﻿,Question,A,B,Answer\n0,Q one?,a,b,A\n"),
    "csv without": ("x.csv", 'Q one?,a,b,A\n\n"Q\ntwo?",a,b,B\n'),
    "one row": ("x.csv", "Q one?,a,b,A\n"),
    "cases": ("x.json", '[{"description": "Q one?", "QA_pairs": [{"question": "Q one?"}]}]'),
    "endings": ("x.jsonl", '{"sent1": "Q one?", "sent2": "", "ending0": "a", "ending1": "b"}'),
    "a dialogue": ("x.json", '[{"instruction": "thanks", "history": [["Q one?", "ok"]]}]'),
    "lists": ("x.json", '[{"questions": [["Q one?", "Q 1?"]], "answers": ["no"]}]'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_benchmark_is_read(tmp_path, layout):
    name, content = LAYOUTS[layout]
    (tmp_path / name).write_text(content, "utf-8")
    found = items_of(str(tmp_path / name))
    assert (found[0].question, found[0].record) == ("Q one?", 1)
    assert not any("long" in i.question + i.options or i.question == "no" for i in found)
    has_options = any(mark in content for mark in ('"b"', ",b,"))
    assert found[0].options == ("a\nb" if has_options else "")


def test_csv_may_be_packed_and_in_gb18030(tmp_path):
    content = "下列哪一项正确？,甲,乙,A\n下列哪一项错误？,甲,乙,B\n".encode("gb18030")
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(content))
    found = items_of(str(tmp_path / "x.csv.gz"))
    assert [(i.question, i.options) for i in found][1] == ("下列哪一项错误？", "甲\n乙")


@pytest.mark.parametrize("content", ["题号,题干,选项\n1,哪一项正确？,甲\n", "1,2\n", "[1, 2]"])
def test_what_is_no_layout_is_not_guessed_at(tmp_path, content):
    (tmp_path / "x.csv").write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"x\.csv"):
        items_of(str(tmp_path / "x.csv"))


def test_a_record_without_a_question_counts_as_not_protected(tmp_path):
    path = write(
        tmp_path / "x.jsonl",
        [{"question": "Which of the following is used first?"}, {"title": "x"}, 3],
    )
    assert Index(items_of(path)).unprotected() == {path: 2}


def test_short_questions_cost_a_long_document_no_more_than_its_length():
    index, often = Index([Item("c", 1, "传染源是指", "")]), "我们说传染源是指人。" * 50
    with mock.patch.object(decontaminate, "tokens", side_effect=tokens) as counted:
        assert index.hits([often + "传染源是指。"])[0][0]
    assert counted.call_count < 5


def test_a_file_without_a_question_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "no question"}])
    with pytest.raises(InputError, match=r"x\.jsonl.*question"):
        Benchmarks((path,)).judge([Doc(0, {}, "text", {})])


# ---------------------------------------------------------------- real benchmarks


def benchmarks(shared_data: Path) -> list[str]:
    return [
        str(shared_data / "general/ma_medqa_test.jsonl"),
        *map(str, sorted((shared_data / "benchmarks/cmmlu_med/test").glob("*.csv"))),
        str(shared_data / "pubmedqa_labeled.json"),
    ]


def clean(shared_data: Path) -> list[str]:
    """2,921 documents that have nothing to do with the benchmarks."""
    general = shared_data / "general"
    found = [r["text"] for _, r, _ in read_records(str(general / "lf_c4_demo.jsonl"))]
    chats = read_chats(str(shared_data / "huatuo26m_single_turn.json"))
    found += list({chat.turns[-1][1]: 0 for _, chat, _ in chats})
    return found + [l for l in (general / "fever.txt").open() if len(l) > 40]  # noqa: E741


def found_share(index: Index, items: list[Item], disguise, around: list[str]) -> float:
    rng = random.Random(3)
    texts = [disguise(item.question, rng.choice(around)[:400]) for item in items]
    found = dropped(index, texts)
    return sum(hit is not None for hit in found) / len(items)


@pytest.mark.slow
def test_real_questions_are_found_and_real_documents_stay(shared_data):
    files = benchmarks(shared_data)
    items = [item for path in files for item in items_of(path)]
    index, texts = Index(items), clean(shared_data)
    lengths = tokens([item.question for item in items]).lengths
    for name in ("ma_medqa", "cmmlu", "pubmedqa"):
        mine = [i for i, n in zip(items, lengths, strict=True) if name in i.file and n >= 5]
        shares = {
            k: found_share(index, mine, how, texts[:300]) for k, how in (LOSSLESS | LOSSY).items()
        }
        print(name, len(mine), {k: round(v, 3) for k, v in shares.items()})
        assert all(shares[k] == 1 for k in LOSSLESS), shares
    # PubMedQA asks about abstracts, and two of its 1,000 hold more than half of their own question:
    # "... in listeners with normal hearing and normal cognition." They are leaks, no false alarms.
    abstracts = [*json.loads((shared_data / "pubmedqa_labeled.json").read_text()).values()]
    hits = index.hits([" ".join(item["CONTEXTS"]) for item in abstracts])
    quotes = {i: item.question for i, (goes, _, _, item) in hits.items() if goes}
    for i, question in quotes.items():
        print(f"{hits[i][1]:.0%} of its own question is in an abstract: {question}")
        assert abstracts[i]["QUESTION"] == question
    assert len(quotes) == 2 and len(texts) == 2921 and not any(dropped(index, texts))
    print(f"none of {len(texts)} other documents goes; not protected: {index.unprotected()}")
