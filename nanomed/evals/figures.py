"""What a report of evaluations draws, as SVG."""

from collections.abc import Sequence
from html import escape

from nanomed.evals.stats import wilson
from nanomed.page import COLOURS

LEFT, WIDTH, STEP = 300, 420, 22  # of a row: its name's width, that of 0 to 100%, its height
WIN, TIE, LOSS = "#0072b2", "#dddddd", "#e69f00"


def dots(values: dict[str, tuple[float, int, float]]) -> str:
    """Rows of (share, n, chance): a dot with Wilson's 95% interval, and a line at chance."""
    rows = []
    for i, (name, (share, n, chance)) in enumerate(values.items()):
        y = STEP * i + 14
        rows += [
            _name(f"{name} ({n:,})", y),
            _line(chance, chance, y, "#bbb", height=9),
            _line(*wilson(share * n, n), y, COLOURS[0]),
            f'<circle cx="{_x(share):.1f}" cy="{y}" r="4" fill="{COLOURS[0]}"/>',
        ]
    return _svg(rows, len(values))


def shares(counts: dict[str, tuple[Sequence[int], tuple[float, float] | None]]) -> str:
    """Rows of wins, ties and losses as one bar, with the interval of the wins if there is one."""
    rows = []
    for i, (name, (triple, interval)) in enumerate(counts.items()):
        y, start = STEP * i + 14, 0.0
        rows.append(_name(f"{name} ({sum(triple):,})", y))
        for count, colour in zip(triple, (WIN, TIE, LOSS), strict=True):
            share = count / sum(triple)
            rows.append(
                f'<rect x="{_x(start):.1f}" y="{y - 8}" width="{WIDTH * share:.1f}" height="16" '
                f'fill="{colour}"><title>{100 * share:.1f}%</title></rect>'
            )
            if share >= 0.06:  # else there is no room for it
                at, ink = _x(start + share / 2), "#fff" if colour == WIN else "#222"
                style = f'text-anchor="middle" style="fill:{ink}"'
                rows.append(f'<text x="{at:.1f}" y="{y + 4}" {style}>{100 * share:.0f}</text>')
            start += share
        if interval:
            rows.append(_line(*interval, y, "#000"))
    keys = zip(("win", "tie", "loss"), (WIN, TIE, LOSS), strict=True)
    legend = " ".join(f'<span style="color:{c}">■</span> {word}&ensp;' for word, c in keys)
    return f"<figure>{_svg(rows, len(counts))}<figcaption>{legend}</figcaption></figure>"


def _x(share: float) -> float:
    return LEFT + WIDTH * share


def _name(text: str, y: int) -> str:
    return f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(text)}</text>'


def _line(low: float, high: float, y: int, colour: str, height: int = 0) -> str:
    ends = f'x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{y - height}" y2="{y + height}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5"/>'


def _svg(rows: list[str], n: int) -> str:
    bottom = STEP * n + 6
    for percent in range(0, 101, 25):
        at = f'x="{_x(percent / 100):.0f}" y="{bottom + 10}"'
        rows.append(f'<text {at} text-anchor="middle">{percent}%</text>')
    return f'<svg width="{LEFT + WIDTH + 30}" height="{bottom + 16}">{"".join(rows)}</svg>'
