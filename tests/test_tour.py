"""docs/tour.md shows what docs/tour.py computes."""

import re

from docs import tour

NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def test_the_tour_shows_real_numbers():
    """Words and whole numbers to the letter, other numbers to 1%: CPUs round differently."""
    page, computed = tour.in_page(tour.PAGE.read_text(encoding="utf-8")), tour.blocks()
    assert list(page) == list(computed)
    for name, text in computed.items():
        assert NUMBER.sub("#", page[name]) == NUMBER.sub("#", text), name
        shown, real = (list(map(float, NUMBER.findall(t))) for t in (page[name], text))
        assert all(abs(a - b) <= 0.01 * abs(b) + 1e-6 for a, b in zip(shown, real, strict=True))
