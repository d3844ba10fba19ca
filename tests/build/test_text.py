"""Tokens and n-grams as numbers, compared with what they stand for."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomed.build.text import Lookup, Ragged, distinct, ngrams, tokens

CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\u3005-\u30ff\uf900-\ufaff"
PLAIN = re.compile(f"[{CHINESE}]|[^\\W_{CHINESE}]+")
# Letters of several scripts, digits, punctuation, compatibility forms, invisible characters.
LETTERS = "abcZÉñжЖ0279 \n,.;-_！，。患者发热ＡＢ１２ガ㎎℃Ⅱ½ﬁ\u200b\u00ad\ufeff\u2060"
PIECES = st.sampled_from([*LETTERS, "ｶﾞ", "e\u0301"])
TEXTS = st.lists(st.lists(PIECES, max_size=40).map("".join), min_size=1, max_size=8)


def plain(text: str) -> list[str]:
    """What a token is, in a line of regular expressions."""
    seen = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return PLAIN.findall(unicodedata.normalize("NFKC", seen).casefold())


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_hashes_are_the_same_where_tokens_are(texts):
    found, words = tokens(texts), [plain(text) for text in texts]
    assert found.lengths.tolist() == [len(w) for w in words]
    pairs = {(w, int(h)) for i, ws in enumerate(words) for w, h in zip(ws, found[i], strict=True)}
    assert len({w for w, _ in pairs}) == len({h for _, h in pairs}) == len(pairs)


@given(TEXTS, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_a_text_is_read_alike_whoever_stands_beside_it(texts, n):
    together, runs = tokens(texts), ngrams(tokens(texts), n)
    for i, text in enumerate(texts):
        alone = tokens([text])
        assert together[i].tolist() == alone[0].tolist()
        assert runs[i].tolist() == ngrams(alone, n)[0].tolist()
        k = len(alone[0])
        assert len(runs[i]) == (max(1, k - n + 1) if k else 0)


def test_runs_are_the_same_where_their_tokens_are():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abc"), size=rng.integers(0, 30))) for _ in range(40)]
    found, words = tokens(texts), [text.split() for text in texts]
    for n in (1, 2, 5, 8):
        runs = ngrams(found, n)
        pairs = set()
        for i, ws in enumerate(words):
            spans = [tuple(ws[k : k + n]) for k in range(max(1, len(ws) - n + 1))] if ws else []
            pairs |= set(zip(spans, runs[i].tolist(), strict=True))
        assert len({span for span, _ in pairs}) == len({run for _, run in pairs}) == len(pairs)


DISGUISES = {
    "upper case": "The BMI OF the patient IS 30 患者",
    "punctuation": "the, BMI... of;the\npatient — is 30，患。者",
    "full width": "ｔｈｅ ＢＭＩ of the patient is ３０ 患者",
    "tags": "the <b class='x'>BMI</b> of<br/> the patient is 30 患<i>者</i>",
    "entities": "the&nbsp;BMI of the&#x20;patient is 30 &#24739;者",
    "invisible": "the B\u200bM\u00adI of the pat\ufeffient is 30 患\u2060者",
    "comments": "the BMI <!-- a note --> of the patient is 30 患者",
}


@pytest.mark.parametrize("how", DISGUISES)
def test_disguises_hide_nothing(how):
    found = tokens(["the BMI of the patient is 30 患者", DISGUISES[how]])
    assert found[0].tolist() == found[1].tolist()


def test_what_looks_like_a_tag_and_is_none_stays():
    a, b = tokens(["p<0.05 in a and b>3", "p 0 05 in a and b 3"]), tokens(["x <AUC and y> z"])
    assert a[0].tolist() == a[1].tolist()
    assert b.lengths.tolist() == [2]  # this one is a tag, by all that can be seen


def test_anagrams_and_palindromes_differ():
    words = ["abba", "baab", "abab", "ab", "ba", "aab", "aba", "a" * 70, "a" * 71]
    assert len({int(tokens([w])[0][0]) for w in words}) == len(words)


def test_hashes_are_the_same_in_every_process_and_forever():
    """Stored keys would be worthless otherwise."""
    assert [int(h) for h in tokens(["患 bmi"])[0]] == GOLDEN


GOLDEN = [6029828295939200918, 10411911544278186571]


def test_first_letters_only():
    cut, whole = tokens(["cardiology hepat 患"], 4), tokens(["card hepa 患"])
    assert cut[0].tolist() == whole[0].tolist()


def test_lookup_finds_what_a_set_does():
    rng = np.random.default_rng(1)
    for size in (1, 10, 5000):
        known = rng.integers(0, 2**64, size, dtype=np.uint64)
        asked = np.concatenate((known[: size // 2], rng.integers(0, 2**64, 300, dtype=np.uint64)))
        members = set(known.tolist())
        at, place = (lookup := Lookup(np.concatenate((known, known)))).find(asked)
        assert at.tolist() == [i for i, v in enumerate(asked.tolist()) if v in members]
        assert lookup.values[place].tolist() == asked[at].tolist()
    assert distinct(np.array([3, 1, 3, 2], np.uint64)).tolist() == [1, 2, 3]


def test_nothing_is_read_as_nothing():
    for texts in ([], [""], ["", "!!!", "\u200b"]):
        found = tokens(texts)
        assert len(found) == len(texts) and not len(found.values)
        assert ngrams(found, 5).lengths.tolist() == [0] * len(texts)
    assert isinstance(tokens(["\ud800 患"]), Ragged)  # half an emoji stops nothing here
