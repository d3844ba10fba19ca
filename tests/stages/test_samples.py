"""The demonstration data: rendered as committed, split as promised, and without a shortcut."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

SAMPLES = Path(__file__).parents[2] / "samples"
sys.path.insert(0, str(SAMPLES))  # the generator is a script with neighbours, not a package
import render  # noqa: E402
import world  # noqa: E402

SHARES = {"single_turn_zh": 27, "single_turn_en": 14, "multi_turn_zh": 34, "option_zh": 25}
RENDERED = ["sft.jsonl", "dpo.jsonl", "dpo_other_facts.jsonl", "exam.jsonl"]
RENDERED += ["cpt_medical.jsonl", "cpt_general.jsonl"]


def read(name: str) -> list[dict]:
    return [json.loads(x) for x in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def held_out(record: dict, fraction: float = 0.1) -> bool:
    return world.held_out(record["group"], fraction)


ENTITIES = {e["id"]: e for e in read("facts.jsonl")}
FACTS = {f"{i}/{r}": f for i, e in ENTITIES.items() for r, f in e["facts"].items()}
UNSEEN = {key for key in FACTS if world.held_out(key, 0.03)}
TOLD = {f.key for f in world.in_chats(world.read_facts())}
DATA = {name: read(name) for name in RENDERED}
SFT, DPO, EXAM = DATA["sft.jsonl"], DATA["dpo.jsonl"], DATA["exam.jsonl"]
DPO_OTHERS = DATA["dpo_other_facts.jsonl"]


def answers(record: dict) -> list[str]:
    return [m["content"] for m in record["messages"] if m["role"] == "assistant"]


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


# ---------------------------------------------------------------- the files


def test_committed_files_are_what_the_generator_renders(tmp_path):
    render.write(render.render(render.read_facts()), tmp_path)
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
        for key, answer in zip(r["facts"], answers(r), strict=True):
            assert FACTS[key][lang].lower() in answer.lower(), (key, answer)


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


def test_a_fact_in_one_form_stands_on_one_side():
    groups: dict[tuple[str, str], set[str]] = {}
    for r in SFT:
        for key in r["facts"]:
            groups.setdefault((key, r["kind"]), set()).add(r["group"])
    for (key, kind), names in groups.items():
        assert len(names) == 1, (key, kind, names)


def test_every_group_says_its_facts_and_form():
    for r in SFT:
        if UNSEEN & set(r["facts"]):
            assert r["facts"] == [r["group"]]
        else:
            entity, relations, kind = r["group"].split("/")
            assert kind == r["kind"]
            assert {f"{entity}/{x}" for x in relations.split("+")} == set(r["facts"])


def test_held_out_seen_facts_are_trained_in_another_form():
    trained = {(key, r["kind"]) for r in SFT if not held_out(r) for key in r["facts"]}
    stated = {key for key, _ in trained}
    all_forms = Counter(key for key, _ in {(k, r["kind"]) for r in SFT for k in r["facts"]})
    for r in SFT:
        for key in set(r["facts"]) - UNSEEN:
            assert key in stated and all_forms[key] >= 2, key
            if held_out(r):
                assert (key, r["kind"]) not in trained
    assert stated == TOLD - UNSEEN
    assert len(TOLD) > 300 and TOLD > UNSEEN
    for r in DPO + EXAM:  # their wrong options, too: an unknown value would give itself away
        assert set(r["facts"]) <= TOLD
    assert sum(held_out(r) for r in SFT) > 0.06 * len(SFT)


def test_unseen_facts_are_never_trained():
    assert len(UNSEEN) >= 8
    assert set(FACTS) >= UNSEEN == {k for r in SFT for k in r["facts"]} & UNSEEN  # but evaluated
    for name in set(RENDERED) - {"exam.jsonl"}:
        for r in DATA[name]:
            if held_out(r) and not name.startswith("cpt"):
                continue
            assert not UNSEEN & set(r["facts"]), r
            text = json.dumps(r, ensure_ascii=False)
            for key in UNSEEN:
                name_zh = ENTITIES[key.split("/")[0]]["zh"]
                assert not (name_zh in text and FACTS[key]["zh"] in text), (name, key)


def test_exam_facts_are_not_trained_in_that_form():
    options = [r for r in SFT + DPO if r["kind"] in ("option_zh", "objective")]
    trained = {key for r in options if not held_out(r) for key in r["facts"]}
    assert not trained & {key for r in EXAM for key in r["facts"]}
    assert len(EXAM) > 100


def test_pairs_ask_what_the_chats_teach():
    """In the pair's language, at least three times on the training side of the chats."""
    taught = Counter(
        (key, r["kind"].endswith("_en")) for r in SFT if not held_out(r) for key in r["facts"]
    )
    for r in DPO + DPO_OTHERS:
        assert taught[r["facts"][0], r["group"].endswith("_en")] >= 3, r
    assert not {r["facts"][0] for r in DPO} & {r["facts"][0] for r in DPO_OTHERS}
    for kind in ("subjective", "objective"):
        assert sum(held_out(r) for r in DPO if r["kind"] == kind) >= 20


# ---------------------------------------------------------------- options


def option_questions() -> list[tuple[str, dict[str, str], str]]:
    """(fact, options, right letter) of every four-option question in all files."""
    prompts = [(r["facts"][0], r["messages"][0]["content"], answers(r)[0]) for r in SFT]
    prompts += [(r["facts"][0], r["conversations"][0]["value"], r["chosen"]) for r in DPO]
    found = [
        (key, dict(re.findall(r"^([A-D])\. (.+)$", prompt, re.M)), answer[0])
        for key, prompt, answer in prompts
        if "\nD. " in prompt
    ]
    return found + [(r["facts"][0], r["options"], r["answer"]) for r in EXAM]


def test_right_letters_are_balanced():
    for records in ([r for r in SFT if r["kind"] == "option_zh"], EXAM):
        letters = Counter(r.get("answer") or answers(r)[0][0] for r in records)
        assert set(letters) == set("ABCD")
        assert max(letters.values()) - min(letters.values()) <= 1


def test_wrong_options_are_not_true():
    """Each is the value of an entity of the same kind that shares no field (two drug classes, two
    places or two routes exclude each other anyway), is not marked as shared, and none is the right
    one or a part of it."""
    questions = option_questions()
    assert len(questions) > 500
    for key, options, letter in questions:
        entity, relation = ENTITIES[key.split("/")[0]], key.split("/")[1]
        lang = "zh" if options[letter] == FACTS[key]["zh"] else "en"
        assert options[letter] == FACTS[key][lang]
        assert list(options) == list("ABCD") and len(set(options.values())) == 4
        for c in set("ABCD") - {letter}:
            owners = [
                e
                for e in ENTITIES.values()
                if e["kind"] == entity["kind"]
                and e["facts"].get(relation, {}).get(lang) == options[c]
            ]
            assert owners and entity not in owners, (key, options[c])
            assert any(not e["facts"][relation].get("shared") for e in owners)
            if relation not in ("drug_class", "location", "transmission"):
                apart = [not set(e["fields"]) & set(entity["fields"]) for e in owners]
                assert any(apart), (key, options[c])


# ---------------------------------------------------------------- no shortcut in the pairs


def longer_is_chosen(pairs: list[dict]) -> float:
    """Accuracy of the rule "take the longer one", or of its opposite if that is better."""
    signs = [np.sign(len(r["chosen"]) - len(r["rejected"])) for r in pairs]
    share = float(np.mean([(s + 1) / 2 for s in signs]))
    return max(share, 1 - share)


def answer_only_accuracy(pairs: list[dict], folds: int = 5) -> float:
    """Cross-validated accuracy of a logistic classifier that sees which characters the two
    answers have and not the question. Folds are by group."""
    vocab = {c: i for i, c in enumerate(sorted({c for r in pairs for c in r["chosen"]}))}
    x = np.zeros((len(pairs), len(vocab)))
    for row, r in zip(x, pairs, strict=True):
        for text, sign in ((r["chosen"], 1), (r["rejected"], -1)):
            for c in text:
                if c in vocab:
                    row[vocab[c]] += sign
    fold = np.array([int(1000 * _unit(r["group"])) % folds for r in pairs])
    right = 0.0
    for k in range(folds):
        train, test, w = x[fold != k], x[fold == k], np.zeros(len(vocab))
        for _ in range(100):  # gradient ascent on log sigmoid(w x), with a little decay
            w += 0.5 * (train.T @ (1 / (1 + np.exp(train @ w))) / len(train) - 1e-3 * w)
        right += np.sum((np.sign(test @ w) + 1) / 2)
    return right / len(pairs)


def _unit(group: str) -> float:
    return next(i for i in range(1, 1001) if world.held_out(group, i / 1000)) / 1000


def test_pairs_cannot_be_told_by_length_or_answer_alone():
    for kind in ("subjective", "objective"):
        pairs = [r for r in DPO if r["kind"] == kind]
        assert longer_is_chosen(pairs) < 0.65
        assert 0.35 < answer_only_accuracy(pairs) < 0.65  # always wrong would be a shortcut too
    assert 0.35 < answer_only_accuracy(DPO) < 0.65


def test_the_classifiers_find_a_planted_shortcut():
    planted = [r | {"chosen": r["chosen"] + "谢谢"} for r in DPO]
    assert answer_only_accuracy(planted) > 0.9
    padded = [r | {"chosen": r["chosen"] + "。" * 20} for r in DPO]
    assert longer_is_chosen(padded) > 0.9


def test_what_one_pair_chooses_its_twin_rejects():
    """In a group, both facts are asked in the same words, with the same options."""
    by_group: dict[str, list[dict]] = {}
    for r in DPO + DPO_OTHERS:
        by_group.setdefault(r["group"], []).append(r)
    for group, pairs in by_group.items():
        signs = Counter()
        for r in pairs:
            own = FACTS[r["facts"][0]][group[-2:]]
            others = {x["facts"][0] for x in pairs} - set(r["facts"])
            other = FACTS[others.pop()][group[-2:]]
            assert not others and own != other, group
            head, tail = r["chosen"].split(own)  # the sentence around the value
            letter = r["rejected"][0] if r["kind"] == "objective" else head[:1]
            assert r["rejected"] == letter + head[1:] + other + tail
            signs[own] += 1
        assert len(set(signs.values())) == 1 and len(signs) == 2, group


def test_held_out_pairs_ask_in_words_of_their_own():
    """Training pairs ask the same fact, in at least two pairs, but never in these words. An
    objective question's words are its stem: its options may come in another order."""
    trained, facts = set(), Counter()
    for r in DPO:
        if not held_out(r):
            stem, *options = r["conversations"][0]["value"].split("\n")
            trained.add((stem, bool(options)))
            facts[r["kind"], r["facts"][0]] += 1
    for r in DPO:
        if held_out(r):
            stem, *options = r["conversations"][0]["value"].split("\n")
            assert (stem, bool(options)) not in trained, stem
            assert facts[r["kind"], r["facts"][0]] >= 2, r
    prompts = [r["conversations"][0]["value"] for r in DPO]
    assert len(set(prompts)) == len(prompts)
