"""bench/corpus.py: its sides do the same work, so that their times can be compared."""

from bench import corpus
from nanomed.build import duplicates, text

TEXTS = [
    "发热三天，伴有咳嗽和咳痰，体温最高三十九度，口服退烧药后可以降到正常，夜间又升高。",
    "too short",
    "The same ten words stand here again and again. " * 9,
    "锟斤拷 锟斤拷 锟斤拷 锟斤拷 12 words are not enough to hide what this line was once",
    "The BMI of 31 patients (ＢＭＩ＞30) fell within 12 weeks; none of them took another medicine.",
    "",
]


def test_the_rules_of_both_sides_keep_the_same_texts():
    ours = corpus.nanomed_rules(TEXTS)
    assert ours == [corpus.passes(t, set(text.ORDINARY)) for t in TEXTS]
    assert True in ours and ours.count(False) >= 4


def test_the_rivals_get_our_tokens_and_our_runs():
    for one in TEXTS:
        found = text.tokens([one])
        assert len(corpus.words(one)) == found.lengths[0]
        if one:
            assert len(corpus.shingles(one)) == text.ngrams(found, corpus.N).lengths[0]
    ours = (duplicates.BANDS, duplicates.ROWS, duplicates.N)
    assert ours == (corpus.BANDS, corpus.ROWS, corpus.N)
