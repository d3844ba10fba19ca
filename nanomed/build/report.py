"""What became of every document: OUT/report.json for programs, OUT/report.html for people."""

import json
from collections.abc import Iterable
from html import escape
from math import log2
from pathlib import Path
from typing import Any

from nanomed.build.files import whole
from nanomed.build.shards import BINS, SCALES, Tally
from nanomed.page import Raw, Text, details, document, heading, note, table

SIZES = ("documents", "bytes", "tokens")
STYLE = """
svg { background: #f6f6f4; margin: .2em 0; }
figure { width: 260px; }
.bar { background: #4a7a8c; height: .8em; margin-top: .35em; }
"""


def write(out: Path, stages: list[tuple[str, Tally]], more: dict[str, Any]) -> None:
    """`stages`: the name and tally of each; `more`: what else is known."""
    for name, text in (
        ("report.json", as_json(stages, more)),
        ("report.html", as_html(stages, more)),
    ):
        with whole(out / name) as file:
            file.write(text.encode())


def as_json(stages: list[tuple[str, Tally]], more: dict[str, Any]) -> str:
    """`stages` is a list of {name, read, kept, dropped: {reason: n}, ...}."""
    found = []
    for name, tally in stages:
        flow = [dict(zip(("source", "lang"), key.split("\t"), strict=True))
                | dict(zip(SIZES, sizes, strict=True))
                for key, sizes in sorted(tally.flow.items())]  # fmt: skip
        found.append({"name": name, "read": tally.read, "kept": tally.kept,
                      "dropped": tally.dropped, "not_run": tally.not_run,
                      "flow": flow, "limits": tally.limits, "histograms": tally.bins})  # fmt: skip
    return json.dumps({"stages": found, **more}, ensure_ascii=False, indent=1)


# ---------------------------------------------------------------- the page


def as_html(stages: list[tuple[str, Tally]], more: dict[str, Any]) -> str:
    ran = [(name, tally) for name, tally in stages if not tally.not_run]
    parts = [
        note(f"{name} did not run: {tally.not_run}") for name, tally in stages if tally.not_run
    ]
    parts += [heading("What each stage kept"), waterfall(ran)]
    parts += [heading("By source and language"), by_source(ran)]
    for title, rows in tables(more).items():
        parts += [heading(title), table(rows)]
    parts.append(note("Bars are as high as the logarithm of their documents; red: the limit."))
    for name, tally in ran[1:]:  # `read` has no value but whether there is a text
        if tally.bins:
            parts += [heading(f"{name}: values and limits"), *figures(tally)]
            parts += [
                examples(key, tally) for key in sorted({k.rpartition("\t")[0] for k in tally.near})
            ]
    return document("What became of every document", parts, STYLE)


def waterfall(ran: list[tuple[str, Tally]]) -> str:
    rows, first = [["stage", *SIZES, "", Text("dropped")]], None
    for name, tally in ran:
        sizes = total(tally)
        first = first or max(1, sizes[0] + sum(tally.dropped.values()))
        bar = Raw(f"<div class=bar style='width:{160 * sizes[0] / first:.0f}px'></div>")
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(tally.dropped.items()))
        rows.append([name, *sizes, bar, Text(why)])
    return table(rows)


def by_source(ran: list[tuple[str, Tally]]) -> str:
    keys = sorted({key for _, tally in ran for key in tally.flow})
    rows = [["source, language", *(name for name, _ in ran)]]
    for size, what in enumerate(SIZES):
        rows.append([Raw(f"<b>{what}</b>"), *[""] * len(ran)])
        for key in keys:
            counts = [tally.flow.get(key, [0] * 3)[size] for _, tally in ran]
            rows.append([key.replace("\t", ", "), *counts])
    return table(rows)


def total(tally: Tally) -> list[int]:
    return [sum(sizes[i] for sizes in tally.flow.values()) for i in range(3)]


def tables(more: dict[str, Any]) -> dict[str, list[list]]:
    found = {}
    if more.get("benchmarks"):
        rows = [["benchmark", "questions", "not protected", "documents with a run", "dropped"]]
        for path, facts in more["benchmarks"].items():
            rows.append([path, *(facts[k] for k in ("items", "unprotected", "touched", "dropped"))])
        found["Benchmarks"] = rows
    for name, groups in more.get("duplicates", {}).items():
        if groups:
            rows = [["kept document", "record", "dropped for it"], *groups]
            found[f"Largest groups, {name}"] = rows
    for name, facts in more.get("models", {}).items():
        title = f"The model of {name}: {facts['labels']:,} labels"
        found[title], found[f"{name}: each source"] = model_tables(facts)
    if more.get("proportions"):
        found["Languages, kinds and sources"] = more["proportions"]
    return found


def model_tables(facts: dict[str, Any]) -> tuple[list[list], list[list]]:
    """What a classifier is worth; what it says of each source after training without it."""
    limits = facts["limits"]
    rows = [["", *limits], ["limit", *(f"{limit:.4g}" for limit in limits.values())]]
    for part, where in (("unseen_sources", "sources not seen"), ("random_split", "a random split")):
        if (rank := facts[part].get("spearman")) is not None:
            rows.append([f"rank correlation (all), {where}", rank, *[""] * (len(limits) - 1)])
        else:
            rows.append([f"F1, {where}", *(facts[part].get(f"f1_{k}", "") for k in limits)])
    each = facts["unseen_sources"].get("each", {})
    sources = [[source, *said.values()] for source, said in each.items()]
    return rows, [["trained without it", "labels", "mean score"], *sources]


def figures(tally: Tally) -> Iterable[str]:
    """A histogram of each value and language, its limit drawn. Heights are logarithms: what passes
    a limit is rare, and would not be seen beside the others."""
    for key, bars in sorted(tally.bins.items()):
        name, lang = key.split("\t")
        high, grows = SCALES.get(name, (1.0, False))
        limit = tally.limits[key]
        at = log2(1 + limit) / log2(1 + high) if grows else limit / high
        heights = [75 * log2(1 + n) / log2(1 + max(bars)) for n in bars]
        rects = "".join(
            f"<rect x={6 * i} y={80 - height:.1f} width=5 height={height:.1f} "
            f"fill=#4a7a8c><title>{bars[i]:,}</title></rect>"
            for i, height in enumerate(heights)
            if height
        )
        x = min(1.0, max(0.0, at)) * 6 * BINS
        line = f"<line x1={x:.1f} x2={x:.1f} y1=0 y2=80 stroke=#c33 stroke-width=2 />"
        yield (
            f"<figure><svg width={6 * BINS} height=80 role=img>{rects}{line}</svg>"
            f"<figcaption>{escape(name)}, {lang}: 0 to {high:,.0f}{', logarithmic' * grows}; "
            f"limit {limit:.4g}</figcaption></figure>"
        )


def examples(key: str, tally: Tally) -> str:
    name, lang = key.split("\t")
    parts = []
    for side in ("kept", "dropped"):
        rows = [[round(value, 4), file, record, Text(text)] for *_, file, record, value, text in
                tally.near.get(f"{key}\t{side}", [])]  # fmt: skip
        if rows:
            parts.append(f"<h4>{side}</h4>" + table([["value", "file", "record", "text"], *rows]))
    return details(f"{name}, {lang}: nearest to the limit", *parts)
