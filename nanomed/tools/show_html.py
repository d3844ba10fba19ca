"""The X-ray as one static page: no script, nothing loaded from elsewhere."""

import html

from nanomed.page import document
from nanomed.tools.show_text import has_loss, visible

STYLE = """
body { line-height: 2.3; overflow-wrap: anywhere }
h1 { font-size: 1.4em; line-height: 1.3 } h2 { font-size: 1.1em; line-height: 1.3 }
p, h3 { line-height: 1.5 } h3 { font-size: .9em; color: #555; font-weight: 600; margin: 0 0 .3em }
.row { border: 3px solid #444; border-radius: 6px; padding: .5em 1em; margin: 1.5em 0 }
.segment { border-top: 2px dashed #888; padding: .7em 0 } .bar + .segment { border: 0 }
.bar { display: flex; height: 16px; gap: 2px; margin: .5em 0 }
.bar div { background: #e4e4e4; min-width: 2px } .bar i { display: block; height: 100%;
       background: #7ac78a }
.turn { display: grid; grid-template-columns: 9em 1fr; border-left: 4px solid #ccc;
       padding-left: .7em; margin: .4em 0 } .turn.assistant, .turn.continuation {
       border-color: #3a9d55 }
.turn b { font-weight: 600; line-height: 1.3; padding-top: .5em } .turn small { display: block;
       color: #777; font-weight: 400 }
.t { border-radius: 3px; padding: 1px 0; margin-right: 1px; background: #f1f1f1; color: #666;
     white-space: pre-wrap } .t.on { background: #bfe8c8; color: #000 }
ruby { ruby-position: under } rt { font-size: 9px; color: #555 }
"""


def page(views: list) -> str:
    """The page; every token's id, position and loss are in its tooltip, the loss below it too."""
    legend = (
        f"{_span('learned', 'on')} tokens are labels, {_span('grey', '')} ones only context. "
        + "Numbers below are losses in nats (a dot: below 0.05), redder is higher. "
        * any(map(has_loss, views))
        + "A solid frame is a packed row, a dashed line the border of a segment, where positions "
        "restart; a bar shows the row's segments to scale, the learned share in green."
    )
    return document("What is trained", [f"<p>{legend}</p>", *map(_row, views)], STYLE)


def _row(view) -> str:
    segments = "\n".join(_segment(segment) for segment in view.segments)
    return (
        f"<div class='row'><h2>{html.escape(view.title)}</h2>\n{_bar(view.segments)}\n"
        f"{segments}</div>"
    )


def _bar(segments: list) -> str:
    parts = []
    for segment in segments:
        tokens = [token for _, turn in segment.turns for token in turn]
        share = sum(token.trained for token in tokens) / len(tokens)
        parts.append(
            f"<div style='flex:{len(tokens)}'><i style='width:{100 * share:.1f}%'></i></div>"
        )
    return f"<div class='bar'>{''.join(parts)}</div>"


def _segment(segment) -> str:
    turns = "\n".join(
        f"<div class='turn {role}'><b>{role}<small>position {tokens[0].position} to "
        f"{tokens[-1].position}</small>{_cr(segment.relevance.get(i))}</b>"
        f"<div>{''.join(map(_token, tokens))}</div></div>"
        for i, (role, tokens) in enumerate(segment.turns)
    )
    return f"<div class='segment'><h3>{html.escape(segment.title)}</h3>\n{turns}</div>"


def _cr(value: float | None) -> str:
    """Blue near 0, where a turn repeats what was said; green; red from 1 on, where that hurts."""
    if value is None:
        return ""
    hue = 220 if value <= 0.1 else max(0, 120 - 120 * max(0, value - 0.5) / 0.6)
    return f"<small style='background:hsl({hue:.0f} 75% 80%)'>CR {value:.2f}</small>"


def _token(token) -> str:
    hint = f"id {token.id}, position {token.position}"
    if token.loss is None:
        return _span(token.text, "on" * token.trained, hint) + "<br>" * token.text.endswith("\n")
    # From green (0) through yellow (1.5 nats) to red (5 nats and more).
    hue = max(0, 120 - 40 * min(token.loss, 1.5) - 17 * max(0, min(token.loss, 5) - 1.5))
    span = _span(token.text, "on", f"{hint}, loss {token.loss:.4f}", f"hsl({hue:.0f} 75% 80%)")
    number = f"{token.loss:.1f}" if token.loss >= 0.05 else "·"  # else a well learned line is 0.0s
    return f"<ruby>{span}<rt>{number}</rt></ruby>"


def _span(text: str, css: str, hint: str = "", background: str = "") -> str:
    style = f" style='background:{background}'" if background else ""
    title = f" title='{hint}'" if hint else ""
    return f"<span class='t {css}'{title}{style}>{html.escape(visible(text))}</span>"
