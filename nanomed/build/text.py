"""Texts as numbers: tokens and n-grams, hashed, many texts in one array.

A Chinese character is a token, and so is a run of Latin letters or digits. Case, punctuation, tags,
full-width forms and invisible characters do not count:

    "BMI＞30 的<b>患者</b>"    ->    bmi  30  的  患  者

Texts stand in one array one after another, with the borders between them: numpy then works on a
thousand short texts as fast as on a long one. All hashes are fixed functions of 64 bits, the same
in every process (Python's own hash() is not).
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

U64 = np.uint64
AT_ONCE = 1 << 17  # characters in one batch: its arrays stay in the processor's cache


class Ragged(NamedTuple):
    """Values of many texts: those of text i are values[borders[i]:borders[i+1]]."""

    values: np.ndarray  # [n] uint64
    borders: np.ndarray  # [texts+1] int64

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.borders[i] : self.borders[i + 1]]

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.borders)


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the result depends on every bit of x, one to one."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def constants(n: int, seed: int) -> np.ndarray:
    """n odd numbers of 64 bits, always the same."""
    return mix(np.arange(1, n + 1, dtype=U64) + U64(seed << 32)) | U64(1)


# ---------------------------------------------------------------- tokens

TAG = re.compile(r"</?[A-Za-z][A-Za-z0-9]{0,15}(\s[^<>]{0,200})?/?>|<!--.{0,200}?-->")
# Kinds of characters. A COMPOSED one means several, or belongs to its neighbour (℃, Ⅱ, an accent of
# its own): a text with one is normalised first, and what is left then is a letter.
BREAK, ALONE, JOINED, COMPOSED, UNSEEN = range(5)
# An entry of the table: is ordinary << 24 | kind << 21 | the code point in lower case
ORDINARY_BIT, KIND_BIT, KIND, LETTER = 24, 21, 7, (1 << 21) - 1
ORDINARY = set(
    " \t\n\r\u3000，。！？、；：“”‘’（）《》【】「」—…·,.!?;:'\"()-/%&"
)  # beside letters


def without_tags(text: str) -> str:
    """Without HTML's tags and entities. "p<0.05" holds no tag."""
    if "<" in text:
        text = TAG.sub(" ", text)
    return html.unescape(text) if "&" in text else text


def tokens(texts: Sequence[str], letters: int = 0) -> Ragged:
    """The hash of every token of every text; with `letters`, of its first letters only."""
    plain = [without_tags(text) for text in texts]
    entries, borders = _entries(plain)
    if len(composed := np.flatnonzero(entries >> KIND_BIT & KIND == COMPOSED)):
        for i in set((np.searchsorted(borders, composed, "right") - 1).tolist()):
            plain[i] = unicodedata.normalize("NFKC", plain[i])
        entries, borders = _entries(plain)
    kinds = entries >> KIND_BIT & KIND
    seen = kinds != UNSEEN
    if not seen.all():
        borders = np.concatenate(([0], np.cumsum(seen)))[borders]
        entries, kinds = entries[seen], kinds[seen]
    joined = kinds >= JOINED
    starts = joined.copy()
    starts[1:] &= ~joined[:-1]
    inner = borders[:-1][borders[:-1] < len(joined)]  # a text's first letter begins a token
    starts[inner] = joined[inner]
    starts |= kinds == ALONE
    first = np.flatnonzero(starts)
    if not len(first):
        return Ragged(np.zeros(0, U64), np.zeros(len(texts) + 1, np.int64))
    # A token's hash is a sum over its letters, each times a number for its place in the token; what
    # is no letter counts 0. Sums of neighbours are differences of one running sum.
    place = np.arange(first[0], len(entries))
    place -= np.repeat(first, np.diff(np.append(first, len(entries))))
    values = (entries[first[0] :] & LETTER) * _PLACES[place & (len(_PLACES) - 1)]
    if letters:
        values[place >= letters] = 0
    sums = np.concatenate((U64([0]), np.cumsum(values)))[np.append(first, len(entries)) - first[0]]
    return Ragged(mix(np.diff(sums)), np.searchsorted(first, borders))


def ordinary(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """([characters] whether each is a letter, a digit, a space or common punctuation, borders)"""
    entries, borders = _entries(texts)
    return (entries >> ORDINARY_BIT).astype(np.int64), borders


def _entries(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """([characters] uint32 entries of the table, [texts+1] borders)."""
    code = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return _table()[code], np.cumsum([0, *map(len, texts)])


_PLACES = constants(64, 1)


@cache
def _table() -> np.ndarray:
    """[0x110000] uint32"""
    table = np.arange(0x110000, dtype=np.uint32)
    kinds = np.zeros(0x110000, np.uint32)
    done = 0
    for first, last, kind in SCRIPTS:
        for code in range(done, first):
            kinds[code], table[code] = _entry(chr(code))
        kinds[first : last + 1] = kind
        done = last + 1
    plain = (kinds != BREAK) & (kinds != UNSEEN)
    table[~plain] = 0
    plain[[ord(char) for char in ORDINARY]] = True
    return table | kinds << KIND_BIT | plain.astype(np.uint32) << ORDINARY_BIT


# Large ranges of characters of one kind, which need not be looked at one by one. Above the last one
# no letters stand.
SCRIPTS = (
    (0x3400, 0x4DBF, ALONE),
    (0x4E00, 0x9FFF, ALONE),
    (0xAC00, 0xD7A3, JOINED),  # Korean syllables
    (0xD800, 0xF8FF, BREAK),
    (0xFE00, 0xFE0F, UNSEEN),  # variation marks
    (0x20000, 0x2F7FF, ALONE),
    (0x30000, 0x323AF, ALONE),
    (0x323B0, 0xDFFFF, BREAK),
    (0xE0000, 0xE01EF, UNSEEN),  # variation marks and tags
    (0xE01F0, 0x10FFFF, BREAK),
)
CHINESE_AND_KANA = ((0x3005, 0x30FF), (0x3400, 0x9FFF), (0x20000, 0x323AF))


def _entry(char: str) -> tuple[int, int]:
    """(kind, code point in lower case)"""
    meant = unicodedata.normalize("NFKC", char).casefold()
    categories = {unicodedata.category(c)[0] for c in meant}
    if unicodedata.category(char) == "Cf" or char == "\u034f":
        return UNSEEN, 0
    if not categories & set("LNM"):
        return BREAK, 0
    lower = ord(char.lower()) if len(char.lower()) == 1 else ord(char)
    if len(meant) > 1 or "M" in categories or 0x1100 <= ord(char) <= 0x11FF:  # parts of syllables
        return COMPOSED, lower
    alone = any(first <= ord(meant) <= last for first, last in CHINESE_AND_KANA)
    return ALONE if alone else JOINED, ord(meant)


# ---------------------------------------------------------------- n-grams


def ngrams(found: Ragged, n: int) -> Ragged:
    """The hashes of all runs of n tokens, in order; of a text with fewer tokens, the one run of all
    of them. A text without tokens has none."""
    values, borders = found
    lengths = found.lengths
    owner_end = np.repeat(borders[1:], lengths)  # [tokens]: where its text ends
    factors, size = constants(n, 2), len(values)
    sums = values * factors[0]
    for k in range(1, min(n, size)):
        inside = np.arange(k, size + k) < owner_end
        sums[: size - k] += np.where(inside[: size - k], values[k:] * factors[k], U64(0))
    counts = np.where(lengths, np.maximum(lengths - n + 1, 1), 0)
    new = np.concatenate(([0], np.cumsum(counts)))
    taken = np.arange(new[-1]) + np.repeat(borders[:-1] - new[:-1], counts)
    return Ragged(mix(sums[taken]), new)


def distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once. (np.unique does the same through a hash table, and is slower.)"""
    ordered = np.sort(values)
    return ordered[np.append(ordered[:1] == ordered[:1], ordered[1:] != ordered[:-1])]


class Lookup:
    """A set of hashes that many others are looked up in."""

    def __init__(self, values: np.ndarray):
        self.values = distinct(values)
        self.shift = U64(max(40, 60 - len(self.values).bit_length()))  # 16 places for each or more
        self.maybe = np.zeros(1 << (64 - int(self.shift)), bool)  # by the first bits
        self.maybe[self.values >> self.shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of those that are in the set: their places in `hashes`, and in `self.values`."""
        at = np.flatnonzero(self.maybe[hashes >> self.shift])
        found = np.searchsorted(self.values, hashes[at])
        found[found == len(self.values)] = 0
        same = self.values[found] == hashes[at]
        return at[same], found[same]
