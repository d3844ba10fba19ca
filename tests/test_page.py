"""The pieces of every report: what stands in a chart is what was measured, and nothing is lost."""

import math
import re
import xml.etree.ElementTree as xml

import pytest

from nanomed import page


def drawn(figure: str) -> tuple[list, dict, list]:
    """(points of each line, {the number at a tick: its height}, dots) of a chart."""
    svg = xml.fromstring(re.search("<svg.*?</svg>", figure, re.DOTALL)[0])
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
             for line in svg.iter("polyline")]  # fmt: skip
    ticks = [text for text in svg.iter("text") if text.get("text-anchor") == "end"]
    heights = {float(text.text.replace(",", "")): float(text.get("y")) - 4 for text in ticks}
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    return lines, heights, dots


@pytest.mark.parametrize("scale", [1.0, 2e-6, 3e5])
def test_a_line_stands_where_the_axis_says(scale):
    values = [(1, 4.0 * scale), (2, 2.0 * scale), (4, 3.0 * scale)]
    (line, held_out), heights, dots = drawn(
        page.chart("loss", [("a", "#000", values)], [("b", "#111", values[:2])])
    )
    assert held_out == line[:2] == dots
    assert line[1][0] - line[0][0] == pytest.approx((line[2][0] - line[0][0]) / 3, abs=0.1)
    (low, at_low), (high, at_high) = sorted(heights.items())[:: len(heights) - 1]
    for (_, value), (_, y) in zip(values, line, strict=True):
        share = (value - low) / (high - low)
        assert y == pytest.approx(at_low + share * (at_high - at_low), abs=0.2)
    assert 3 <= len(heights) <= 7


def test_an_axis_from_zero_and_a_line_of_one_value():
    (line,), heights, _ = drawn(page.chart("speed", [("a", "#000", [(1, 80.0), (9, 90.0)])], (), 1))
    assert heights[0.0] == page.HEIGHT - page.BOTTOM and line[1][1] == page.TOP
    for value in (5.0, 0.0, -1e-9):
        (line,), heights, _ = drawn(page.chart("flat", [("a", "#000", [(1, value), (2, value)])]))
        assert line[0][1] == line[1][1] and page.TOP <= line[0][1] <= page.HEIGHT - page.BOTTOM
    assert page.chart("nothing", [("a", "#000", [])]) == ""


def test_a_long_line_keeps_its_spikes():
    points = [(k, 1.0 + 0.01 * math.sin(k)) for k in range(20_000)]
    points[12_345] = (12_345, 9.0)
    points[777] = (777, -9.0)
    thinned = page._thinned(points)
    assert len(thinned) <= page.MOST_POINTS and thinned == sorted(thinned)
    assert {points[12_345], points[777]} <= set(thinned)
    assert page._thinned(points[:200]) == points[:200]


def test_a_table_escapes_what_it_shows():
    text = page.table([["<a>", "b"], [page.Raw("<b>x</b>"), 12_345], [page.Text("a & b"), True]], 1)
    assert "&lt;a&gt;" in text and "<b>x</b>" in text and "12,345" in text
    assert "<td class=text>a &amp; b</td>" in text and ">True<" in text
    assert text.count("class=paper") == 3
