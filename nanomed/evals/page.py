"""One page of HTML: the paper's tables and figures beside ours. It needs no network, no script."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.evals import figures, report
from nanomed.evals.benchmarks import read_items
from nanomed.evals.compare import compare
from nanomed.evals.folder import finished, settings_of
from nanomed.evals.judge import ASPECTS
from nanomed.evals.requests import requests_of
from nanomed.evals.stats import macro_stderr
from nanomed.evals.tasks import tasks
from nanomed.page import COLOURS, Text, chart, details, document, heading, note, table
from nanomed.records.exams import LETTERS


def page(folders: Sequence[Path], data: Path | None = None) -> str:
    """Of the --out folders of finished evaluations, of whatever kind (answers that wait for a
    judge have no numbers yet); with the benchmarks' folder the texts of items that changed are
    shown. Raises InputError."""
    return document("Evaluation", parts(folders, data))


def parts(folders: Sequence[Path], data: Path | None = None) -> list[str]:
    """Of that page, for another one to take in."""
    paper = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))
    ours = {
        str(folder): json.loads((finished(folder) / "results.json").read_text(encoding="utf-8"))
        for folder in folders
        if "set" not in settings_of(folder)
    }
    scored = {name: r for name, r in ours.items() if not {"pairs", "turns"} & set(r)}
    found = [_protocols(folders)]
    for name in ("table1", "table2"):
        found += _beside(paper[name], scored)
    found += [*_all_tasks(scored), *_pairs(paper["pairs"], ours), *_turns(paper["turns"], ours)]
    likelihood = [folder for folder in folders if (folder / "items.jsonl").exists()]
    for a, b in pairwise(likelihood):
        found += _changed(a, b, data)
    return found


def _protocols(folders: Sequence[Path]) -> str:
    names = ("protocol", "shots", "bos", "dtype", "history", "max_new", "judge_model", "weights")
    rows = []
    for folder in folders:
        config = settings_of(folder)
        values = ["" if (v := config.get(name)) in (None, []) else str(v) for name in names]
        rows.append([str(folder), *(value.removeprefix("torch.") for value in values)])
    return table([["what was run", *names], *rows])


def _beside(paper: dict[str, Any], ours: dict[str, dict]) -> list[str]:
    paper = dict(paper)
    title, columns, differs = (paper.pop(name) for name in ("title", "columns", "differs"))
    macro = title.startswith("Table 1")
    rows = []
    for task, published in paper.items():
        cells = [_accuracy(task, results, macro) for results in ours.values()]
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


def _accuracy(task: str, results: dict[str, dict[str, Any]], macro: bool) -> str:
    if not (result := results.get(task)):
        return "not run"
    side = result["official"] if task == "cmb" else result
    value, error = side["acc"], side["stderr"]
    # Only groups of subjects have two averages; a single task's is micro in the paper too.
    if macro and "tasks" in result:
        value = result["macro"]
        error = macro_stderr([results[name]["stderr"] for name in result["tasks"]])
    return f"{100 * value:.2f} ± {100 * error:.2f} (n {result['n']:,})"


def _all_tasks(ours: dict[str, dict]) -> Iterable[str]:
    for folder, results in ours.items():
        scored = {name: r for name, r in results.items() if "letters" in r}
        if not scored:
            continue
        yield heading(folder)
        yield table(report.accuracies(scored))
        yield figures.dots({name: (r["acc"], r["n"], r["chance"]) for name, r in scored.items()})
        yield note("Dots: accuracy with Wilson's 95% interval; the grey line is chance.")
        for name, r in scored.items():
            if len(subjects := r.get("subjects", {})) > 1:
                values = {k: (part["acc"], part["n"], r["chance"]) for k, part in subjects.items()}
                yield details(f"{name} by subject", figures.dots(values))


def _pairs(paper: dict[str, list[int]], ours: dict[str, dict]) -> Iterable[str]:
    judged = {name: r["pairs"] for name, r in ours.items() if r.get("pairs", {}).get("n")}
    counts = {f"{name} (paper)": (triple, None) for name, triple in paper.items()}
    for name, r in judged.items():
        counts[name] = [r[side] for side in ("win", "tie", "loss")], r["win_interval"]
    rows = []
    for name, (triple, _) in counts.items():
        shares = [f"{100 * count / sum(triple):.1f}" for count in triple]
        worth, unread = [""] * 3, ""
        if r := judged.get(name):
            worth = [r[k] for k in ("orders_disagree", "first_seat_wins", "longer_wins")]
            worth = ["" if x is None else f"{100 * x:.1f}" for x in worth]
            unread = r["unread"]
        rows.append([name, str(sum(triple)), *shares, *worth, str(unread)])
    head = ["", "n", "win", "tie", "loss", "orders disagree", "first seat wins", "longer wins"]
    yield heading("Figures 4 and 5: pairs of answers")
    yield figures.shares(counts)
    yield table([[*head, "unread"], *rows])
    yield note(
        "Percent; the line on a bar of ours is Wilson's 95% interval of the wins. Win rates of "
        "different judges or under different rules do not compare."
    )


def _turns(paper: dict[str, dict], ours: dict[str, dict]) -> Iterable[str]:
    """A chart for each aspect of each set: the paper's rounds dashed, ours with a full line."""
    judged = {name: r["turns"] for name, r in ours.items() if r.get("turns", {}).get("aspects")}
    rows, charts = [], []
    for name, models in paper.items():
        mine = {k: r["aspects"] for k, r in judged.items() if r.get("set") in (models["set"], "")}
        charts.append(heading(f"Figures 6 and 7: turns of {name} by four aspects"))
        for aspect in ASPECTS:
            bars = {k: enumerate(models[k][aspect][:-1], 1) for k in ("chat", "chat-dpo")}
            points = {f"{k} (paper)": [*numbered] for k, numbered in bars.items()}
            points |= {
                k: [(int(i), mean) for i, mean in r[aspect]["rounds"].items()]
                for k, r in mine.items()
            }
            lines = [
                (name, COLOURS[i % len(COLOURS)], line)
                for i, (name, line) in enumerate(points.items())
            ]
            charts.append(chart(aspect, lines[2:], dotted=lines[:2]))
            for model, bars in ((k, models[k][aspect]) for k in ("chat", "chat-dpo")):
                cells = [f"{bar:.3f}" for bar in (bars[-1], *bars[:-1])]
                rows.append(
                    [f"{models['set']}, {model}, {aspect} (paper)", cells[0], "", *cells[1:]]
                )
    for name, result in judged.items():
        for aspect, r in result["aspects"].items():
            low, high = r["interval"]
            rounds = {int(i): mean for i, mean in r["rounds"].items()}  # one may be unread
            bars = [
                f"{rounds[i]:.3f} (n {result['rounds'][str(i)]})" if i in rounds else ""
                for i in range(1, max(rounds) + 1)
            ]
            interval = f"{low:.3f} to {high:.3f}"
            rows.append([f"{name}, {aspect}", f"{r['micro']:.3f}", interval, *bars])
    most = max(map(len, rows))
    head = ["", "average", "95% interval", *(f"round {i}" for i in range(1, most - 2))]
    yield from charts
    yield table([head, *(row + [""] * (most - len(row)) for row in rows)])
    yield note("Charts run over rounds. Averages are over turns, the interval is over dialogues.")


def _changed(a: Path, b: Path, data: Path | None) -> Iterable[str]:
    """Which items went from right to wrong, and the other way round."""
    yield heading(f"From {a} to {b}")
    try:
        found = compare(a, b)
    except InputError as error:
        yield note(str(error))
        return
    yield table(report.differences(found))
    sides = [{item["id"]: item for item in read_items(folder)} for folder in (a, b)]
    for name, r in found.items():
        if r["only_a"] and name == r["only_a"][0].rpartition("/")[0]:
            texts = _questions(name, data)
            head = ["item", "right", "chose", "by", "now chooses", "by", *(["asked"] * bool(texts))]
            lost = [
                [i, *_chosen(*(side[i] for side in sides)), *texts.get(i, [])] for i in r["only_a"]
            ]
            yield details(f"{name}: {len(lost)} right before, now wrong", table([head, *lost]))


def _chosen(before: dict, now: dict) -> list[str]:
    """The right choice; what each chose, and by how much: its log-probability less the next's."""
    cells = [LETTERS[before["gold"]]]
    for item in (before, now):
        first, second = sorted(item["logprobs"], reverse=True)[:2]
        cells += [LETTERS[item["pred"]], f"{first - second:.2f}"]
    return cells


def _questions(name: str, data: Path | None) -> dict[str, list[str]]:
    """By item, what was asked, without its shots; nothing unless --data has the task's items."""
    if not data or name not in tasks():
        return {}
    requests, _ = requests_of(tasks()[name], data, 0)
    return {request.id: [Text(request.context)] for request in requests}
