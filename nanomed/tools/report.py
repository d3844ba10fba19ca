"""One page of runs: their curves over each other, settings beside the paper's, data, samples.

    python -m nanomed.tools.report RUN... [--evals FOLDER...] [--out report.html]

A run that is still going can be looked at, too. --evals adds the tables of evaluate.py's folders.
The page is one file that loads nothing from anywhere.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from nanomed import page
from nanomed.arguments import command_line
from nanomed.build.files import read_lines
from nanomed.config import CPT, DPO, SFT, STAGES, UNPUBLISHED, InputError
from nanomed.distributed import launch
from nanomed.evals import page as evaluations
from nanomed.page import Raw, Text, chart, details, document, heading, note, table
from nanomed.tools.paper import COLUMNS

SETTINGS = {c.stage: c for c in (CPT, SFT, DPO)}
NAMES = {"cpt": "Continued pre-training", "sft": "Supervised fine-tuning", "dpo": "DPO"}
OF_PAPER = {"cpt": STAGES[:2], "sft": STAGES[2:3], "dpo": STAGES[3:]}
# What is drawn at once; every other number of metrics.jsonl is drawn in a part that is folded.
CHARTS = {
    "loss": "loss, nats",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens per second, all processes",
    "peak_memory_gb": "peak memory of a process, GiB",
    "mfu_causal": "share of the GPUs' bf16 peak (MFU)",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "chosen has the higher reward, share",
}
IN_FRONT = "bits_per_byte/"  # of each source of pre-training
FROM_ZERO = {"grad_norm", "tokens_per_s", "peak_memory_gb", "mfu_causal"}
PLANNED = {"examples", "hardware", "mfu", "dry_run"}  # only --dry_run reads them


@dataclass(frozen=True)
class Shown:
    """What a run folder holds."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl
    data: dict[str, Any]
    answers: dict[str, list[dict]]  # by who answered; only where texts may be shown
    results: dict[str, Any]

    def points(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of what is finite."""
        found = ((line["step"], line.get(key)) for line in self.lines)
        return [(step, value) for step, value in found if isinstance(value, int | float)]


def read(folder: Path, name: str) -> Shown:
    """Raises InputError if there is no run in the folder."""
    config = _json(folder / "config.json")
    if config.get("stage") not in SETTINGS:
        other = "an evaluation; give it after --evals" if "files" in config else "no run"
        raise InputError(f"{folder} holds {other}")
    parts = [_json(folder / f"{part}.json") for part in ("data_report", "answers", "results")]
    metrics = folder / "metrics.jsonl"
    return Shown(name, config, read_lines(metrics) if metrics.exists() else [], *parts)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def of_runs(folders: Sequence[Path], evals: Sequence[Path] = ()) -> str:
    """The page. Raises InputError."""
    short = [folder.resolve().name for folder in folders]
    unique = len(set(short)) == len(short)
    runs = [read(f, name if unique else str(f)) for f, name in zip(folders, short, strict=True)]
    colours = {run.name: page.COLOURS[i % len(page.COLOURS)] for i, run in enumerate(runs)}
    parts = [_summary(runs), *_results(runs)]
    for stage in dict.fromkeys(run.config["stage"] for run in runs):
        these = [run for run in runs if run.config["stage"] == stage]
        parts += [heading(NAMES[stage]), *_curves(these, colours), _settings(stage, these)]
        for run in these:
            parts += [*_data(run), *_samples(run)]
    return document("Runs", parts + (evaluations.parts(evals) if evals else []))


def _summary(runs: Sequence[Shown]) -> str:
    rows = [["run", "stage", "started from", "last step", "held-out loss", "best", "at step"]]
    for run in runs:
        val = run.points("val_loss")
        step, best = min(val, key=lambda point: point[1], default=("", math.nan))
        losses = [f"{val[0][1]:.4f} → {val[-1][1]:.4f}", f"{best:.4f}"] if val else ["", ""]
        last = max((line["step"] for line in run.lines), default=0)
        start = run.config["init"] or f"nothing ({run.config['model'] or 'tiny'})"
        rows.append([run.name, run.config["stage"], Text(start), last, *losses, step])
    return table(rows)


def _results(runs: Sequence[Shown]) -> Iterable[str]:
    """What results.json counts: {name: {right, of}}."""
    counted = {
        run.name: {k: v for k, v in run.results.items() if isinstance(v, dict) and "right" in v}
        for run in runs
    }
    counted = {name: counts for name, counts in counted.items() if counts}
    if not counted:
        return
    rows = [["right answers", *counted]]
    for key in dict.fromkeys(key for counts in counted.values() for key in counts):
        found = [counts.get(key) for counts in counted.values()]
        shares = [f"{c['right']} of {c['of']} ({_share(c)})" if c else "" for c in found]
        rows.append([COLUMNS[key][0] if key in COLUMNS else key, *shares])
    yield table(rows)
    yield note("docs/paper.md says what each line counts.")


def _share(count: dict[str, int]) -> str:
    return f"{count['right'] / count['of']:.0%}" if count["of"] else "none asked"


def _curves(runs: Sequence[Shown], colours: dict[str, str]) -> Iterable[str]:
    keys = dict.fromkeys(k.removeprefix("val_") for run in runs for line in run.lines for k in line)
    front = [*CHARTS, *(key for key in keys if key.startswith(IN_FRONT))]
    behind = [key for key in keys if key not in front and key != "step"]

    def draw(key: str) -> str:
        trained = [(run.name, colours[run.name], run.points(key)) for run in runs]
        held_out = [(f"{name}, held out", c, run.points(f"val_{key}"))
                    for run, (name, c, _) in zip(runs, trained, strict=True)]  # fmt: skip
        return chart(CHARTS.get(key, key), trained, held_out, key in FROM_ZERO)

    yield note("Curves run over steps; a dot is a measurement on held-out examples.")
    yield from map(draw, front)
    for run in runs:
        bad = [line["step"] for line in run.lines if any(isinstance(v, str) for v in line.values())]
        if bad:
            yield note(f"{run.name}: numbers that are not finite, not drawn, at steps {bad}")
    if further := [figure for figure in map(draw, behind) if figure]:
        yield details("Further metrics", *further)


def _settings(stage: str, runs: Sequence[Shown]) -> str:
    head = ["setting", "the paper", *(run.name for run in runs)]
    recipe, ours = [head], [["setting", "default", *(run.name for run in runs)]]
    for f in (f for f in fields(SETTINGS[stage]) if f.name not in PLANNED):
        values = [run.config.get(f.name, "") for run in runs]
        of_stage = zip(STAGES, f.metadata["paper"], strict=False)
        paper = [str(value) for name, value in of_stage if name in OF_PAPER[stage]]
        if any(value != UNPUBLISHED for value in paper):
            shown = " and ".join(paper)
            recipe.append([f.name, shown, *(_beside(value, paper) for value in values)])
        else:
            ours.append([f.name, Text(_said(f.default)), *(Text(_said(v)) for v in values)])
    words = "Bold: not the paper's. " + "Of two values, the second is stage 2's." * (stage == "cpt")
    return table(recipe, 1) + note(words) + details("All other settings", table(ours, 1))


def _beside(value: Any, paper: Sequence[str]) -> str:
    same = any(_same(value, published) for published in paper)
    return _said(value) if same else Raw(f"<b>{escape(_said(value))}</b>")


def _same(value: Any, published: str) -> bool:
    try:
        return float(published) == float(value)
    except ValueError:
        return published == str(value)


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _data(run: Shown) -> Iterable[str]:
    """Each file and source, what became of its records, and how long they are."""
    rows = [
        ["data", "examples", "kept", "dropped", "shortened", "tokens", "trained on", "median",
         "longest", "languages", "share of the draws", "seen", "documents held out"],
    ]  # fmt: skip
    for name, part in _parts_of(run.data):
        lengths, drawn = part["length_percentiles"], part.get("drawn", {})
        dropped = ", ".join(f"{n} {cause}" for cause, n in part["dropped"].items())
        languages = ", ".join(f"{k} {v:.0%}" for k, v in part["language_share"].items())
        share = [drawn.get("weight"), drawn.get("seen")]
        rows.append([
            name, *(part[k] for k in ("examples", "kept")), dropped or 0,
            *(part[k] for k in ("shortened", "tokens")), f"{part['trained_share']:.0%}",
            *(lengths.get(k, "") for k in ("p50", "p100")), languages,
            *("" if x is None else f"{x:.2f}" for x in share),
            drawn.get("held_out", {}).get("documents", ""),
        ])  # fmt: skip
    if len(rows) > 1:
        n = len(rows[0]) if any(row[-1] != "" for row in rows[1:]) else -3
        yield details(f"The data of {run.name}", table([row[:n] for row in rows]))


def _parts_of(report: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, counts): of chats and pairs all, each file and each source; of documents, each
    source with its share of the draws."""
    if "files" in report:
        yield "all", report
        for path, file in report["files"].items():
            yield path, file
            yield from ((f"{path}: {name}", part) for name, part in file["sources"].items())
    for name, source in report.get("sources", {}).items():
        yield name, source["read"] | {"drawn": source}


def _samples(run: Shown) -> Iterable[str]:
    for who, answers in run.answers.items():
        rows = [["question", "reference", "answer", ""]]
        for one in answers:
            asked = "\n".join(f"{role}: {text}" for role, text in one["history"])
            asked = f"{asked}\n{one['question']}".strip()
            rows.append([Text(asked), Text(one["reference"]), Text(one["answer"]), one["mark"]])
        yield details(f"Held-out questions, {run.name}: answered by {who}", table(rows))


def main() -> None:
    parser = command_line("python -m nanomed.tools.report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--evals", nargs="+", type=Path, default=[], help="folders of evaluate.py, for its tables"
    )
    parser.add_argument(
        "--out", type=Path, help="default: RUN/report.html; of several runs, report.html"
    )
    c = parser.parse_args()
    out = c.out or (c.runs[0] if len(c.runs) == 1 else Path()) / "report.html"
    text = of_runs(c.runs, c.evals)
    out.touch(mode=0o600)  # it may quote answers, and the run folder is its user's alone
    out.write_text(text, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    launch(main)
