"""Private data in texts: where they are, and how they are masked.

Only what is certain counts: a number must have the length, the prefix and, where there is one, the
checksum of what it is taken for. Laboratory numbers, versions like 1.2.3.4 and doses do not count.
"""

import re
from collections.abc import Callable
from datetime import date
from typing import Any, NamedTuple


def _identity_card(number: str) -> bool:
    """A Chinese citizen's: the date of birth is one, and the checksum fits (GB 11643)."""
    try:
        born = date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) << (17 - i) for i, digit in enumerate(number[:17]))
    return born.year >= 1900 and "10X98765432"[total % 11] == number[17].upper()


def _bank_card(number: str) -> bool:
    """Luhn's checksum: every second digit from the right counts double, by its digit sum."""
    digits = [int(digit) for digit in reversed(number)]
    return (sum(digits[::2]) + sum(sum(divmod(2 * d, 10)) for d in digits[1::2])) % 10 == 0


def _ip(number: str) -> bool:
    parts = [int(part) for part in number.split(".")]
    return max(parts) < 256 and parts[0] > 9 and len(number) > 9


class Kind(NamedTuple):
    name: str
    pattern: re.Pattern[str]
    signs: tuple[str, ...]  # one of them is in every text that has it; none: a long number is
    holds: Callable[[str], bool] = lambda _: True


def _kind(name: str, pattern: str, signs: str = "", *holds: Callable[[str], bool]) -> Kind:
    # ASCII: a number may stand right beside Chinese characters, which else count as its letters.
    return Kind(name, re.compile(pattern, re.ASCII), tuple(signs.split()), *holds)


NUMBER = re.compile(r"[0-9][0-9 .()-]{5,}[0-9Xx]")
MAIL = r"[A-Za-z0-9][\w.+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"
AREA = r"(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])"
KINDS = [
    _kind("email", MAIL, "@"),
    _kind("record", r"(?:[院历案诊卡]号|MRN)\W{0,3}[A-Za-z]{0,3}\d{5,}", "号 MRN"),
    _kind("address", r"(?:住址|家庭地址)\s?[:：]\s?\S{4,40}", "住址 家庭地址"),
    _kind("account", r"(?:微信|QQ|WeChat)号?\s?[:：是]\s?[\w-]{5,20}", "微信 QQ WeChat"),
    _kind("phone", r"(?:电话|手机|[Pp]hone|[Tt]el|[Cc]all)\W{0,3}\d{3}-\d{4}(?![\w-])"),
    _kind("id", r"(?<![\w.])[1-8]\d{16}[\dXx](?!\w)", "", _identity_card),
    _kind("card", r"(?<![\w.])(?:62\d{17}|62\d{14}|4\d{15}|5[1-5]\d{14})(?!\w)", "", _bank_card),
    _kind("phone", r"(?<![\w.-])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?![\w-]|\.\d)"),
    _kind("phone", r"(?<![\w.-])(?:\(0\d{2,3}\) ?|0\d{2,3}-)[2-8]\d{6,7}(?![\w-]|\.\d)"),
    _kind("phone", rf"(?<![\w.-])(?:\+?1[-. ])?{AREA}\d{{3}}[-.]\d{{4}}(?![\w-])"),
    _kind("phone", r"(?<![\w.])\+[2-9]\d{0,2}(?:[ -]\d{2,5}){2,4}(?!\w)"),
    _kind("ssn", r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"),
    _kind("ip", r"(?<![\w.])(?<!ersion )(?<!版本)\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)", "", _ip),
]


def found(text: str) -> list[tuple[str, int, int]]:
    """(kind, start, end) of all private data in a text; they do not overlap."""
    numbers = NUMBER.search(text) is not None
    spans: list[tuple[str, int, int]] = []
    for kind in KINDS:
        if any(sign in text for sign in kind.signs) if kind.signs else numbers:
            for match in kind.pattern.finditer(text):
                start, end = match.span()
                if kind.holds(match[0]) and all(end <= s or start >= e for _, s, e in spans):
                    spans.append((kind.name, start, end))
    return sorted(spans, key=lambda span: span[1])


def masked(value: Any) -> Any:
    """A record, or a part of one, with [phone], [email], ... in place of private data."""
    if isinstance(value, dict):
        return {name: masked(part) for name, part in value.items()}
    if isinstance(value, list):
        return [masked(part) for part in value]
    while isinstance(value, str) and (spans := found(value)):  # one may stand within another
        for kind, start, end in reversed(spans):
            value = f"{value[:start]}[{kind}]{value[end:]}"
    return value
