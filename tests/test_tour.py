"""docs/tour.md shows what docs/tour.py computes."""

import re

import pytest

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


def test_the_demonstrations_first_step_is_the_tours():
    """README and the tour's section 8 show lines of a whole run of the demonstration. If its first
    step is another one by now, run it and take them anew."""
    page, readme = (path.read_text("utf-8") for path in (tour.PAGE, tour.ROOT / "README.md"))
    shown = tour.in_page(page)
    loss = re.search(r"= ([\d.]+) nats", shown["loss"])[1]
    step = r"run +(\d+)\n.*norm +([\d.]+),.*\n.*rate +([\de.-]+),"
    n, norm, lr = re.search(step, shown["step"]).groups()
    for text in (page, readme):
        line = re.search(rf"step 1/{n}  loss ([\d.]+)  lr ([\de.-]+)  grad ([\d.]+)", text)
        assert [*map(float, line.groups())] == pytest.approx([*map(float, (loss, lr, norm))], 0.01)
