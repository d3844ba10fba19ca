"""A page of HTML in one file, without a script and without a network: its frame, its tables, and
lines drawn as SVG. All reports are made of these."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 72em;
  margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .5em 0 1.5em; }
td, th { padding: .15em .7em; text-align: right; border-bottom: 1px solid #ddd;
  vertical-align: top; white-space: nowrap; }
td:first-child, th:first-child, .text { text-align: left; }
td.text { max-width: 40em; overflow-wrap: anywhere; white-space: pre-wrap; font-size: 13px; }
.paper { color: #777; } .note { color: #555; font-size: 90%; } .differs { background: #fff3d6; }
figure { display: inline-block; margin: 0 1.5em 1em 0; vertical-align: top; }
figcaption { font-size: 13px; max-width: 33em; }
.key { margin-right: .8em; white-space: nowrap; }
svg text { font-size: 12px; font-family: sans-serif; fill: #444; }
summary { cursor: pointer; }
"""
# Told apart by those who see no red or green, too (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222")
MOST_POINTS = 600  # of a line; of more, each group's lowest and highest are drawn
WIDTH, HEIGHT = 460, 230  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 22, 22  # its margins

Points = Sequence[tuple[float, float]]


class Raw(str):
    """HTML as it is."""


class Text(str):
    """A long text: it is wrapped, and stands at the left."""


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    head = f"<meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}{style}</style>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang=en>{head}<h1>{escape(title)}</h1>\n{body}\n</html>\n"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"


def details(summary: str, *parts: str) -> str:
    """Folded until somebody clicks on it."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def table(rows: Sequence[Sequence[Any]], n_paper: int = 0) -> str:
    """The first row is the head; the n_paper columns after the first one are drawn in grey."""
    head, *others = rows
    texts = {i for row in others for i, value in enumerate(row) if isinstance(value, Text)}
    head = [Text(name) if i in texts else name for i, name in enumerate(head)]
    lines = [_row("th", head, n_paper), *(_row("td", row, n_paper) for row in others)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, values: Sequence[Any], n_paper: int) -> str:
    cells = []
    for i, value in enumerate(values):
        kind = "text" if isinstance(value, Text) else "paper" if 1 <= i <= n_paper else ""
        cells.append(f"<{tag}{f' class={kind}' * bool(kind)}>{cell(value)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def cell(value: Any) -> str:
    if isinstance(value, Raw):
        return value
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_count else escape(str(value))


# ---------------------------------------------------------------- lines over steps


def chart(
    title: str,
    lines: Sequence[tuple[str, str, Points]],
    dotted: Sequence[tuple[str, str, Points]] = (),
    from_zero: bool = False,
) -> str:
    """A figure of (name, colour, points (x, y)), all finite. `dotted` lines are dashed and have a
    dot at every point. from_zero: where y begins, else at the lowest. "" if there is no point."""
    lines = [line for line in lines if len(line[2])]
    dotted = [line for line in dotted if len(line[2])]
    every = [point for _, _, points in (*lines, *dotted) for point in points]
    if not every:
        return ""
    x_ticks, to_x = _axis([x for x, _ in every], LEFT, WIDTH - RIGHT)
    y_ticks, to_y = _axis([0.0] * from_zero + [y for _, y in every], HEIGHT - BOTTOM, TOP)
    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>']
    for y in y_ticks:
        at = to_y(y)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="#e4e4e4"/>',
            f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_short(y)}</text>',
        ]
    for x in x_ticks:
        parts.append(
            f'<text x="{to_x(x):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{_short(x)}</text>'
        )
    for name, colour, points in lines:
        parts.append(_path(name, colour, _thinned(points), to_x, to_y, ""))
    for name, colour, points in dotted:
        parts.append(_path(name, colour, points, to_x, to_y, ' stroke-dasharray="4 3"'))
        for x, y in points:
            parts.append(
                f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3" fill="{colour}">'
                f"<title>{escape(name)}: {_short(y)} at {_short(x)}</title></circle>"
            )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    keys = "".join(_key(*line[:2], "—") for line in lines) + "".join(
        _key(*line[:2], "●") for line in dotted
    )
    return (
        f'<figure><svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"<figcaption>{keys}</figcaption></figure>"
    )


def _key(name: str, colour: str, sign: str) -> str:
    key = f'<span style="color:{colour}">{sign}</span> {escape(name)}'
    return f"<span class=key>{key}</span> "


def _path(name: str, colour: str, points: Points, to_x, to_y, dashes: str) -> str:
    places = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)
    return (
        f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}>'
        f"<title>{escape(name)}</title></polyline>"
    )


def _axis(values: Sequence[float], start: float, end: float):
    """(ticks at round numbers, value -> pixel). The axis spans the values, a little more if they
    are all the same."""
    low, high = min(values), max(values)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [k * step for k in range(first, last + 1)]
    return ticks, lambda value: start + (value - low) / (high - low) * (end - start)


def _thinned(points: Points) -> Points:
    """A picture has fewer columns than a long run has steps. No spike is lost."""
    size = -(-2 * len(points) // MOST_POINTS)
    if size < 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        ends = {min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _short(value: float) -> str:
    """As a person would write it: 1,200 and 0.25 and 2e-06."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.3g}"
