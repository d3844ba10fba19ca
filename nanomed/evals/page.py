"""One page of HTML: the paper's tables and figures beside ours. It needs no network, no script."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.evals.compare import compare
from nanomed.evals.stats import wilson
from nanomed.page import details, document, heading, note, table


def page(folders: Sequence[Path]) -> str:
    """Of the --out folders of finished evaluations, of whatever kind. Raises InputError."""
    return document("Evaluation", parts(folders))


def parts(folders: Sequence[Path]) -> list[str]:
    """Of that page, for another one to take in."""
    paper = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))
    ours = {str(folder): _results(folder) for folder in folders}
    scored = {name: r for name, r in ours.items() if not {"pairs", "turns"} & set(r)}
    found = [_protocols(folders)]
    for name in ("table1", "table2"):
        found += _beside(paper[name], scored)
    found += [*_all_tasks(scored), *_pairs(paper["pairs"], ours), *_turns(paper["turns"], ours)]
    likelihood = [folder for folder in folders if (folder / "items.jsonl").exists()]
    for a, b in pairwise(likelihood):
        found += _changed(a, b)
    return found


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    if not path.exists():
        raise InputError(f"{folder} holds no finished evaluation: it has no results.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _protocols(folders: Sequence[Path]) -> str:
    names = ("protocol", "shots", "bos", "dtype", "history", "max_new", "judge_model", "weights")
    rows = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows.append([str(folder), *(str(config.get(name, "")) for name in names)])
    return table([["what was run", *names], *rows])


def _beside(paper: dict[str, Any], ours: dict[str, dict]) -> list[str]:
    paper = dict(paper)
    title, columns, differs = (paper.pop(name) for name in ("title", "columns", "differs"))
    macro = title.startswith("Table 1")
    rows = []
    for task, published in paper.items():
        cells = [_accuracy(task, results.get(task), macro) for results in ours.values()]
        rows.append([task, *(f"{value:.2f}" for value in published), *cells])
    head = ["", *(f"{name} (paper)" for name in columns), *ours]
    average = "mean of subjects" if macro else "micro"
    shots = {
        r["shots"]
        for results in ours.values()
        for n, r in results.items()
        if n in paper and "shots" in r
    }
    if macro and shots - {3}:
        differs = f"ours were run with {', '.join(map(str, sorted(shots)))} shots, not 3; {differs}"
    remark = f"Ours: {average}, ± standard error, n. Differs from the paper: {differs}."
    return [heading(title), table([head, *rows], len(columns)), note(remark)]


def _accuracy(task: str, result: dict[str, Any] | None, macro: bool) -> str:
    if result is None:
        return "not run"
    if task == "cmb":
        side = result["official"]
        return f"{100 * side['class_macro']:.2f} ± {100 * side['stderr']:.2f} (n {result['n']:,})"
    # Only groups of subjects have two averages; a single task's is micro in the paper too.
    value = result["macro" if macro and "tasks" in result else "acc"]
    return f"{100 * value:.2f} ± {100 * result['stderr']:.2f} (n {result['n']:,})"


def _all_tasks(ours: dict[str, dict]) -> Iterable[str]:
    for folder, results in ours.items():
        tasks = {name: r for name, r in results.items() if "letters" in r}
        if not tasks:
            continue
        rows = [
            [
                name,
                f"{r['n']:,}",
                f"{100 * r['acc']:.2f} ± {100 * r['stderr']:.2f}",
                f"{100 * r['macro']:.2f}",
                f"{100 * r['chance']:.1f}",
                f"{r['majority']['choice']}: {100 * r['majority']['acc']:.1f}",
                ", ".join(f"{k} {chosen} ({right})" for k, (chosen, right) in r["letters"].items()),
            ]
            for name, r in tasks.items()
        ]
        head = ["", "n", "accuracy", "macro", "chance", "commonest", "chosen (right)"]
        yield heading(folder)
        yield table([head, *rows])
        yield _dots({name: (r["acc"], r["n"], r["chance"]) for name, r in tasks.items()})
        yield note("Dots: accuracy with Wilson's 95% interval; the grey line is chance.")


def _dots(values: dict[str, tuple[float, int, float]]) -> str:
    width, left, step = 420, 260, 20
    lines = []
    for i, (name, (share, n, chance)) in enumerate(values.items()):
        y = 14 + i * step
        low, high, middle, base = (left + width * x for x in (*wilson(share * n, n), share, chance))
        lines += [
            f'<text x="0" y="{y + 4}">{escape(name)} ({n:,})</text>',
            f'<line x1="{base:.1f}" x2="{base:.1f}" y1="{y - 9}" y2="{y + 9}" stroke="#bbb"/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#36c"/>',
            f'<circle cx="{middle:.1f}" cy="{y}" r="4" fill="#36c"/>',
        ]
    bottom = 14 + len(values) * step
    for percent in range(0, 101, 25):
        x = left + width * percent / 100
        lines.append(f'<text x="{x}" y="{bottom + 12}" text-anchor="middle">{percent}%</text>')
    return f'<svg width="{left + width + 40}" height="{bottom + 20}">{"".join(lines)}</svg>'


def _pairs(paper: dict[str, list[int]], ours: dict[str, dict]) -> Iterable[str]:
    rows = []
    for name, counts in paper.items():
        shares = [f"{100 * count / sum(counts):.1f}" for count in counts]
        rows.append([f"{name} (paper)", str(sum(counts)), *shares, *[""] * 4])
    for name, results in ours.items():
        if (r := results.get("pairs")) and r["n"]:
            shares = [f"{100 * r[side] / r['n']:.1f}" for side in ("win", "tie", "loss")]
            worth = [r[k] for k in ("orders_disagree", "first_seat_wins", "longer_wins")]
            known = ["" if x is None else f"{100 * x:.1f}" for x in worth]
            rows.append([name, str(r["n"]), *shares, *known, str(r["unread"])])
    head = ["", "n", "win", "tie", "loss", "orders disagree", "first seat wins", "longer wins"]
    yield heading("Figures 4 and 5: pairs of answers")
    yield table([[*head, "unread"], *rows])
    yield note("Percent. Win rates of different judges or under different rules do not compare.")


def _turns(paper: dict[str, dict], ours: dict[str, dict]) -> Iterable[str]:
    rows = [
        [f"{name}, {aspect} (paper)", f"{average:.3f}", "", *(f"{bar:.3f}" for bar in bars)]
        for name, aspects in paper.items()
        for aspect, (*bars, average) in aspects.items()
    ]
    for name, results in ours.items():
        for aspect, r in results.get("turns", {}).get("aspects", {}).items():
            low, high = r["interval"]
            counts = results["turns"]["rounds"]
            bars = [f"{value:.3f} (n {counts[i]})" for i, value in r["rounds"].items()]
            rows.append(
                [f"{name}, {aspect}", f"{r['micro']:.3f}", f"{low:.3f} to {high:.3f}", *bars]
            )
    most = max(map(len, rows))
    head = ["", "average", "95% interval", *(f"round {i}" for i in range(1, most - 2))]
    yield heading("Figures 6 and 7: turns by four aspects")
    yield table([head, *(row + [""] * (most - len(row)) for row in rows)])


def _changed(a: Path, b: Path) -> Iterable[str]:
    """Which items went from right to wrong, and the other way round."""
    yield heading(f"From {a} to {b}")
    try:
        found = compare(a, b)
    except InputError as error:
        yield note(str(error))
        return
    rows = []
    for name, r in found.items():
        change = f"{100 * r['difference']:+.2f}"
        interval = f"{100 * r['interval'][0]:+.2f} to {100 * r['interval'][1]:+.2f}"
        only = [str(len(r[side])) for side in ("only_a", "only_b")]
        rows.append([name, str(r["n"]), change, interval, *only, f"{r['p']:.3g}"])
    head = ["", "n", "difference", "95% interval", "now wrong", "now right", "p"]
    yield table([head, *rows])
    for name, r in found.items():
        if r["only_a"] and name == r["only_a"][0].rpartition("/")[0]:
            ids = escape(", ".join(i.rpartition("/")[2] for i in r["only_a"]))
            yield details(f"{name}: right before, now wrong", ids)
