"""The demonstration data: rendered as committed, split as promised, and without a shortcut."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))  # the generator is a script with neighbours, not a package
import render  # noqa: E402
import world  # noqa: E402

SHARES = {"single_turn_zh": 27, "single_turn_en": 14, "multi_turn_zh": 34, "option_zh": 25}
RENDERED = [
    "sft.jsonl",
    "dpo.jsonl",
    "dpo_other_facts.jsonl",
    "dpo_careful.jsonl",
    "questions.jsonl",
    "exam.jsonl",
]
RENDERED += ["cpt_medical.jsonl", "cpt_general.jsonl"]


def read(name: str) -> list[dict]:
    return [json.loads(x) for x in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


ENTITIES = {e["id"]: e for e in read("facts.jsonl")}
FACTS = {f"{i}/{r}": f for i, e in ENTITIES.items() for r, f in e["facts"].items()}
FOURS = world.fours(world.all_facts())
STATED = {
    where: {f.key for four in FOURS for f in four if f.stated == where}
    for where in ("chats", "documents", "nowhere")
}
DATA = {name: read(name) for name in RENDERED}
SFT, DPO, EXAM = DATA["sft.jsonl"], DATA["dpo.jsonl"], DATA["exam.jsonl"]
DPO_OTHERS, QUESTIONS = DATA["dpo_other_facts.jsonl"], DATA["questions.jsonl"]


def answers(record: dict) -> list[str]:
    return [m["content"] for m in record["messages"] if m["role"] == "assistant"]


def prompts(record: dict) -> list[str]:
    turns = record.get("messages") or record["conversations"]
    return [
        m.get("content") or m["value"]
        for m in turns
        if m.get("role") == "user" or m.get("from") == "human"
    ]


# ---------------------------------------------------------------- the facts


def test_each_fact_is_stated_once():
    def once(pairs):
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), keys
        return dict(pairs)

    lines = (SAMPLES / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    entities = [json.loads(line, object_pairs_hook=once) for line in lines]
    assert len(entities) >= 150
    assert len({e["id"] for e in entities}) == len(entities)
    # A department may bear the name of its specialty, so English names are compared within a kind.
    for names in ([e["zh"] for e in entities], [(e["kind"], e["en"]) for e in entities]):
        assert [name for name, n in Counter(names).items() if n > 1] == []
    for e in entities:
        assert 2 <= len(e["facts"]) <= 4, e["id"]
        for fact in e["facts"].values():
            assert re.search("[\u4e00-\u9fff]", fact["zh"]) and fact["en"].isascii()
            assert fact["source"]


def test_most_values_of_a_relation_differ():
    by_relation: dict[str, list[str]] = {}
    for key, fact in FACTS.items():
        by_relation.setdefault(key.split("/")[1], []).append(fact["zh"])
    for relation, values in by_relation.items():
        assert len(set(values)) >= 0.8 * len(values), relation


# In a four: values of these exclude each other even for related entities: a drug has one class.
EXCLUSIVE = {"drug_class", "location", "transmission"}


def parts(value: str) -> set[str]:
    """Of an enumeration: {"发热", "咳嗽", "咳痰"} of 发热、咳嗽和咳痰."""
    return set(re.split("[、，和]", value))


def test_the_values_of_a_four_exclude_one_another():
    """So three options of a question are wrong. Entities that share a field (a part of medicine)
    may well share a symptom; a value marked as shared is true of many entities."""
    assert Counter(len(four) for four in FOURS) == {4: len(FOURS)}
    for four in FOURS:
        assert len({(f.kind, f.relation, f.four) for f in four}) == 1
        for a in four:
            assert not FACTS[a.key].get("shared")
            for b in four:
                if a is b:
                    continue
                fields = [set(ENTITIES[f.entity]["fields"]) for f in (a, b)]
                assert a.relation in EXCLUSIVE or not fields[0] & fields[1], (a.key, b.key)
                assert not parts(a.zh) & parts(b.zh) and a.en != b.en, (a.key, b.key)


def test_facts_are_stated_in_chats_in_documents_alone_or_nowhere():
    sizes = {where: len(keys) for where, keys in STATED.items()}
    assert sizes == {"chats": 64, "documents": 48, "nowhere": 24}
    assert STATED["nowhere"].isdisjoint(f.key for f in world.read_facts())


def test_what_is_stated_nowhere_cannot_be_guessed_from_words():
    """No character of its own links it to its entity's names or to the entity's other facts."""
    common = set("的和、类药治疗抑制剂抗性炎病急慢性大小多少增")
    for key in STATED["nowhere"]:
        entity, relation = ENTITIES[key.split("/")[0]], key.split("/")[1]
        others = [f["zh"] for r, f in entity["facts"].items() if r != relation]
        known = set(entity["zh"] + "".join(others))
        assert not known & set(FACTS[key]["zh"]) - common, key


# ---------------------------------------------------------------- the files


def test_committed_files_are_what_the_generator_renders(tmp_path):
    render.write(render.render(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(RENDERED)
    for name in RENDERED:
        assert (tmp_path / name).read_bytes() == (SAMPLES / name).read_bytes(), name


def test_size():
    assert sum(p.stat().st_size for p in SAMPLES.glob("*.jsonl")) < 2_000_000


def test_the_papers_proportions_of_chats():
    counts = Counter(r["kind"] for r in SFT)
    assert set(counts) == set(SHARES)
    for kind, share in SHARES.items():
        assert abs(100 * counts[kind] / len(SFT) - share) < 1


def test_chats_are_alternating_and_no_two_alike():
    for r in SFT:
        roles = [m["role"] for m in r["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in r["messages"])
        assert len(roles) in ((4, 6) if r["kind"] == "multi_turn_zh" else (2,))
    assert len({json.dumps(r["messages"]) for r in SFT}) == len(SFT)


def test_every_answer_of_a_dialogue_is_long():
    for r in SFT:
        if r["kind"] == "multi_turn_zh":
            assert min(world.n_chinese(a) for a in answers(r)) >= 36, answers(r)


def test_answers_state_their_facts():
    for r in SFT:
        lang = "en" if r["kind"].endswith("_en") else "zh"
        for key, answer in zip(r["tags"], answers(r), strict=True):
            assert FACTS[key][lang].lower() in answer.lower(), (key, answer)


def test_every_fact_of_the_chats_is_asked_in_every_kind_in_several_words():
    asked: dict[tuple[str, str], set[str]] = {}
    for r in SFT:
        for key in r["tags"][:1]:
            asked.setdefault((key, r["kind"]), set()).add(prompts(r)[0].splitlines()[0])
    english = {four[0].key for four in FOURS if four[0].stated == "chats"}
    assert set(asked) == {
        (key, kind)
        for kind in SHARES
        for key in (english if kind == "single_turn_en" else STATED["chats"])
    }
    assert min(map(len, asked.values())) >= 2


def test_pairs_have_the_papers_two_kinds():
    counts = Counter(r["kind"] for r in DPO)
    assert abs(counts["subjective"] / len(DPO) - 9019 / 12727) < 0.01
    assert counts["subjective"] + counts["objective"] == len(DPO)
    assert all(r["chosen"] != r["rejected"] for r in DPO)


def test_documents_are_labelled():
    for name in ("cpt_medical.jsonl", "cpt_general.jsonl"):
        texts = [r["text"] for r in DATA[name]]
        assert len(set(texts)) == len(texts)
        quality = Counter(r["quality"] for r in DATA[name])
        assert set(quality) == {"good", "advertising", "garbage", "private", "near_duplicate"}
        assert 0.05 < 1 - quality["good"] / len(texts) < 0.07
        for r in DATA[name]:
            if r["quality"] == "good":
                assert (r["lang"] == "zh") == bool(re.search("[\u4e00-\u9fff]", r["text"]))
            for number in re.findall(r"\d{3}-\d+", r["text"]) * (r["quality"] == "private"):
                assert number.startswith("555-01")  # reserved for examples


# ---------------------------------------------------------------- the split


def test_the_hash_is_the_librarys():
    store = pytest.importorskip("nanomed.store")
    for key in ("", "gout/main_cause", "痛风"):
        for fraction in (0.03, 0.1, 0.5):
            expected = store.group_key(key) < int(fraction * 2**64)
            assert world.held_out(key, fraction) == expected


def stems(record: dict) -> set[str]:
    """The words of a record's questions, without options and without a greeting."""
    firsts = [prompt.splitlines()[0] for prompt in prompts(record)]
    greetings = "|".join(filter(None, render.GREETINGS + render.GREETINGS_EN))
    return {re.sub(f"^({greetings})", "", x) for x in firsts}


def test_what_is_measured_asks_in_words_of_its_own():
    """Of chats and pairs none asks in a question's words, none with options in the exam's; but
    every wording of a question is in some chat, about another fact."""
    trained = set().union(*map(stems, SFT + DPO))
    assert trained.isdisjoint(r["question"] for r in QUESTIONS)
    options = [r for r in SFT + DPO if "\nD. " in prompts(r)[0]]
    assert set().union(*map(stems, options)).isdisjoint(r["question"] for r in EXAM)


def test_held_out_chats_ask_in_words_that_training_does_not():
    """A single question, with or without options, stands on one side only."""
    trained = Counter(
        (x, r["kind"] == "option_zh") for r in SFT if not world.held_out(r["group"])
        for x in stems(r)
    )  # fmt: skip
    held = [r for r in SFT if world.held_out(r["group"])]
    assert 0.07 * len(SFT) < len(held) < 0.13 * len(SFT)
    assert {r["kind"] for r in held} == set(SHARES)
    for r in held:
        if r["kind"] != "multi_turn_zh":
            assert not any((x, r["kind"] == "option_zh") in trained for x in stems(r)), stems(r)
    stated = {key for r in SFT if not world.held_out(r["group"]) for key in r["tags"]}
    assert stated == STATED["chats"]


def test_what_is_stated_nowhere_is_only_asked():
    """And what documents alone state is in no chat and no pair."""
    for name in ("sft.jsonl", "dpo.jsonl", "dpo_other_facts.jsonl"):
        for r in DATA[name]:
            assert set(r["tags"]) <= STATED["chats"], r
    for name in set(RENDERED) - {"exam.jsonl", "questions.jsonl"}:
        for r in DATA[name]:
            text = json.dumps(r, ensure_ascii=False).lower()
            assert not STATED["nowhere"] & set(r["tags"])
            for key in STATED["nowhere"]:
                names, fact = ENTITIES[key.split("/")[0]], FACTS[key]
                for lang in ("zh", "en"):
                    name = names[lang].lower().removeprefix("the ")
                    assert not (name in text and fact[lang].lower() in text), (r, key)
    documents = {key for r in DATA["cpt_medical.jsonl"] for key in r["tags"]}
    assert documents >= STATED["chats"] | STATED["documents"]


def test_questions_and_exam_ask_every_fact_of_the_fours():
    everything = set().union(*STATED.values())
    for records in (QUESTIONS, EXAM):
        assert {r["tags"][0] for r in records} == everything
        for r in records:
            assert r["tags"][0] in STATED[r["stated"]]
    for r in QUESTIONS:
        assert r["answer"] == FACTS[r["tags"][0]][r["lang"]]


def test_pairs_ask_what_the_chats_teach():
    assert {r["tags"][0] for r in DPO} <= STATED["chats"]
    assert not {r["tags"][0] for r in DPO} & {r["tags"][0] for r in DPO_OTHERS}
    for kind in ("subjective", "objective"):
        assert sum(world.held_out(r["group"]) for r in DPO if r["kind"] == kind) >= 10


# ---------------------------------------------------------------- options


def test_options_are_a_four_and_the_answer_is_the_facts_value():
    """Each of the four facts is asked with the same four options, so one who prefers a text,
    whatever is asked, is right in exactly a quarter."""
    fours = {(f.key, lang): {getattr(x, lang) for x in four}
             for four in FOURS for f in four for lang in ("zh", "en")}  # fmt: skip
    questions = [(r["tags"][0], prompts(r)[0], answers(r)[0]) for r in SFT]
    questions += [(r["tags"][0], prompts(r)[0], r["chosen"]) for r in DPO]
    found = [
        (key, "zh", dict(re.findall(r"^([A-D])\. (.+)$", prompt, re.M)), answer[0])
        for key, prompt, answer in questions
        if "\nD. " in prompt
    ]
    assert len(found) > 400
    found += [(r["tags"][0], r["lang"], r["options"], r["answer"]) for r in EXAM]
    for key, lang, options, letter in found:
        assert list(options) == list("ABCD") and set(options.values()) == fours[key, lang]
        assert options[letter] == FACTS[key][lang], key
    for r in EXAM:
        assert r["sentence"].count("{}") == 1
        assert (r["lang"] == "zh") == bool(re.search("[\u4e00-\u9fff]", r["sentence"]))


def test_right_letters_are_about_balanced():
    """Drawn at random: were they balanced fact by fact, a letter that training had often for a
    fact would be wrong in its exam."""
    for letters in (
        Counter(answers(r)[0][0] for r in SFT if r["kind"] == "option_zh"),
        Counter(r["answer"] for r in EXAM),
    ):
        assert set(letters) == set("ABCD")
        assert max(letters.values()) < 0.35 * sum(letters.values())
