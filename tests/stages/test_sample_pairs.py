"""The preference pairs of the demonstration cannot be told without knowing the fact."""

import re
from collections import Counter

import numpy as np

from tests.stages.test_samples import (
    DATA,
    DPO,
    DPO_OTHERS,
    ENTITIES,
    FACTS,
    QUESTIONS,
    prompts,
    world,
)


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
    """Both facts are asked in the same words and with the same options; each answer of a question
    is chosen once and rejected once."""
    by_question: dict[tuple, list[dict]] = {}
    for r in DPO + DPO_OTHERS:
        options = prompts(r)[0].partition("\n")[2]
        by_question.setdefault((r["group"], options), []).append(r)
    for (group, _), pairs in by_question.items():
        chosen, rejected = (
            Counter(without_name(r, r[side]) for r in pairs) for side in ("chosen", "rejected")
        )
        assert chosen == rejected and len(chosen) in (2, 6), group


def without_name(record: dict, text: str) -> str:
    for entity in record["group"].split("/")[0].split("+"):
        for lang in ("zh", "en"):
            name = re.escape(ENTITIES[entity][lang])
            text = re.sub(rf"{name}(?![a-z])", "_", text, flags=re.IGNORECASE)
    return text


def test_held_out_pairs_ask_in_words_of_their_own():
    trained = {prompts(r)[0].partition("\n")[::2] for r in DPO if not world.held_out(r["group"])}
    words = {(stem, bool(options)) for stem, options in trained}
    for r in DPO:
        if world.held_out(r["group"]):
            stem, _, options = prompts(r)[0].partition("\n")
            assert (stem, bool(options)) not in words, stem
    asked = [(prompts(r)[0], r["chosen"]) for r in DPO]
    assert len(set(asked)) == len(asked)


def test_careful_pairs_differ_in_their_last_sentence_alone():
    pairs = DATA["dpo_careful.jsonl"]
    for r in pairs:
        fact = FACTS[r["tags"][0]]["zh"]
        chosen, rejected = (r[side].split("。", 1) for side in ("chosen", "rejected"))
        assert chosen[0] == rejected[0] and fact in chosen[0], r
        assert "医生" in chosen[1] and "医" not in rejected[1], r
    longer = [len(r["chosen"]) - len(r["rejected"]) for r in pairs]  # of some fifty characters
    assert max(map(abs, longer)) <= 4 and abs(np.mean(longer)) < 1
    held_out = [r for r in pairs if world.held_out(r["group"])]
    asked = {prompts(r)[0] for r in pairs} - {prompts(r)[0] for r in held_out}
    assert len(held_out) > 25 and not {prompts(r)[0] for r in held_out} & asked
    assert not {prompts(r)[0] for r in pairs} & {q["question"] for q in QUESTIONS}
