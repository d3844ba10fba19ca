"""What an evaluation shows: a table on the screen, and one page of HTML."""

from typing import Any


def table(results: dict[str, dict[str, Any]]) -> str:
    """By task and group, in percent: the accuracy with its standard error, what it must be held
    against (chance, always the commonest letter), and how often each letter was chosen."""
    rows = [("", "n", "acc", "+-", "acc_norm", "macro", "chance", "commonest", "chosen (right)")]
    for name, r in results.items():
        common = f"{r['majority']['acc']:.1%}" if "majority" in r else ""
        letters = [f"{k} {p} ({g})" for k, (p, g) in r.get("letters", {}).items()]
        shares = [f"{r[key]:.2%}" for key in ("acc", "stderr", "acc_norm", "macro", "chance")]
        rows.append((name, f"{r['n']:,}", *shares, common, "  ".join(letters)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 8) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
