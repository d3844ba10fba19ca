"""What an evaluation shows, as rows of texts: for the screen (aligned) and for the page."""

from collections.abc import Sequence
from typing import Any

Rows = list[tuple[str, ...]]


def accuracies(results: dict[str, dict[str, Any]]) -> Rows:
    """By task and group, in percent: the accuracy with its standard error, what it must be held
    against (chance, always the commonest letter), and how often each letter was chosen."""
    rows = [("", "n", "acc", "+-", "acc_norm", "macro", "chance", "commonest", "chosen (right)")]
    for name, r in results.items():
        if "letters" not in r:
            continue
        letters = [
            f"{choice} {chosen} ({right})" for choice, (chosen, right) in r["letters"].items()
        ]
        shares = [f"{r[key]:.2%}" for key in ("acc", "stderr", "acc_norm", "macro", "chance")]
        common = f"{r['majority']['acc']:.1%}"
        rows.append((name, f"{r['n']:,}", *shares, common, "  ".join(letters)))
    return rows


def losses(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of each task whose answers are texts."""
    return [
        f"{name}: {r['loss']:.4f} +- {r['stderr']:.4f} nats for each of {r['tokens']:,} tokens of "
        f"{r['n']:,} answers (perplexity {r['perplexity']:.2f})"
        for name, r in results.items()
        if "loss" in r
    ]


def differences(found: dict[str, dict[str, Any]]) -> Rows:
    rows = [("", "n", "first", "second", "difference", "95% interval", "only 1st", "only 2nd", "p")]
    for name, r in found.items():
        low, high = r["interval"]
        shares = [f"{acc:.2%}" for acc in r["acc"]]
        only = [str(len(r[side])) for side in ("only_a", "only_b")]
        interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
        change = f"{100 * r['difference']:+.2f}"
        rows.append((name, f"{r['n']:,}", *shares, change, interval, *only, f"{r['p']:.3g}"))
    return rows


def readings(found: dict[str, Any]) -> Rows:
    """CMB's score by the benchmark's own reading of the answers and by the strict one."""
    sides = [found["official"], found["strict"]]
    unread = [side["rules"].get("none", 0) for side in sides]
    several = [side["several_answers"]["acc"] for side in sides]
    return [
        (f"of {found['n']:,} questions", "official", "strict"),
        *((name, *(f"{side[key]:.2%}" for side in sides)) for name, key in _CMB.items()),
        *((t, *(f"{side['types'][t]:.2%}" for side in sides)) for t in sides[0]["types"]),
        ("several answers", *("" if share is None else f"{share:.2%}" for share in several)),
        ("no letter found", *map(str, unread)),
    ]


_CMB = {"micro": "acc", "+-": "stderr", "mean of classes": "class_macro"}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; the first one and a last one of words begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    wordy = {0} | ({len(widths) - 1} if " " in rows[0][-1] else set())
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in wordy else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
