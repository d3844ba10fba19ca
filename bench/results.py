"""Fills docs/results.md, and README's figures, from the measurements in bench/results/*.jsonl.

No figure is typed: what stands between <!-- NAME --> and <!-- end of NAME --> is written here. NAME
is a kind of measurement, or one of README's, `figures`, `gpu` and `rivals`.

python -m bench.results            writes them
python -m bench.results --check    fails if they are not what the files give
"""

import argparse
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

from bench.measure import ROOT, read, shown, table
from bench.step_scaling import ROWS

FOLDER, PAGE = ROOT / "bench/results", ROOT / "docs/results.md"
README = ROOT / "README.md"
BLOCK = r"(?s)(<!-- (\w+) -->\n)(.*?)( *<!-- end of \2 -->)"
RIVALS = {
    "SFT: TRL as shipped": "TRL as shipped",
    "SFT: TRL no checkpointing, by length": "TRL's batches by length without checkpointing",
    "SFT: TRL packing, no checkpointing": "TRL's packing without checkpointing",
    "DPO: TRL as shipped": "TRL as shipped",
    "CPT: transformers loop, full rows": "a plain transformers loop over full rows of text",
}
WHOLE = "AquilaMed "  # begins the name of a step of all its 8.2 billion parameters

Lines, Runs = list[dict], dict[str, dict]  # measurements; where each was taken


def filled(text: str, paths: list[Path]) -> str:
    """The text with every block written anew."""
    lines, runs = read(paths)

    def block(found: re.Match) -> str:
        of_readme = {"figures": figures, "gpu": whole_steps, "rivals": rivals}
        write = of_readme.get(found[2], partial(tables, found[2]))
        return found[1] + write(lines, runs) + found[4]

    return re.sub(BLOCK, block, text)


def tables(kind: str, lines: Lines, runs: Runs) -> str:
    parts = []
    for run in dict.fromkeys(line["run"] for line in lines if line["kind"] == kind):
        its = [line for line in lines if (line["kind"], line["run"]) == (kind, run)]
        parts.append(f"{machine(runs[run])}:\n")
        for sizes in dict.fromkeys(tuple(line["shapes"]) for line in its):
            alike = [shown(line) for line in its if tuple(line["shapes"]) == sizes]
            parts.append(f"{table(alike)}\n")
        parts += fastest(its)
        parts += [f"{note}.\n" for note in dict.fromkeys(x["convention"] for x in its) if note]
    return "\n".join(parts)


def fastest(lines: list[dict]) -> list[str]:
    """Which setting of TRL did most real tokens per second, a sentence for each stage."""
    tried: dict[str, dict[str, dict]] = {}
    for line in lines:
        stage, _, name = line["name"].partition(": TRL ")
        if name and "real_tokens_per_s" in line["facts"]:  # else it could not run
            tried.setdefault(stage, {})[name] = line["facts"]
    found = []
    for stage, settings in tried.items():
        best = max(settings, key=lambda name: settings[name]["real_tokens_per_s"])
        text = f"{stage}: of the {len(settings)} settings of TRL, *{best}* is the fastest by real "
        text += f"tokens per second; nanomed is {_times(settings[best]['nanomed_is_faster_by'])} it"
        found.append(f"{text}.\n")
    return found


def machine(run: dict) -> str:
    """Where, with what and in which state a run was taken, in one line."""
    cpu = f"{run['cpu']}, {run['cores']} cores, {run['threads']} threads"
    cpu += f", {run['capability']}" if "capability" in run else ""
    where = cpu
    if "gpu" in run:
        where = f"{run['gpu']} ({run['memory_gib']} GiB, {run.get('power.limit', 'power unknown')})"
        where += f", driver {run.get('driver_version', 'unknown')}, CUDA {run['cuda']}"
    code = run["commit"] or f"source {run['source']}"
    if run["dirty"]:
        code += f" with changes (source {run['source']})"
    state = "" if run["clean"] else f"; **the machine was busy: load {run['load']}**"
    versions = f"torch {run['torch']}, triton {run['triton']}, Python {run['python']}"
    return f"{where}, {versions}; code {code}, {run['date'][:10]}{state}"


def figures(lines: Lines, runs: Runs) -> str:
    """What README says of speed: nanomed in its own default, float32 on a CPU, beside each rival in
    the same and in its faster dtype, in the newest run of the largest model; and how the rate
    changes from the shortest rows to the longest."""
    found = {}
    for line in sorted(lines, key=lambda line: runs[line["run"]]["date"]):
        size = line["shapes"].get("parameters", 0)
        known = found.get(line["name"], line)["shapes"].get("parameters", 0)
        if "gpu" not in runs[line["run"]] and size >= known:
            found[line["name"]] = line
    parts = []
    for name, rival in RIVALS.items():
        line = found[name]
        if not name.startswith("CPT"):  # the setting begins with TRL and its version
            rival = rival.replace("TRL", line["facts"]["setting"].partition(":")[0])
        text = f"- {name[:3]}: {_times(line['facts']['nanomed_is_faster_by'])} {rival}"
        if other := found.get(f"{name}, bf16"):
            text += f", and {_times(other['facts']['nanomed_is_faster_by'])} it in bfloat16"
        parts.append(text)
    if line := found.get(f"rows of {ROWS[-1]:,}, documents of 512"):
        rate = _times(line["facts"][f"of_the_rate_at_{ROWS[0]:,}"])
        parts.append(f"- over rows of {ROWS[-1]:,} tokens {rate} over rows of {ROWS[0]:,}")
    if own := found.get("SFT: nanomed, bf16"):
        its = _times(own["facts"]["nanomed_is_faster_by"])
        parts.append(
            f"- SFT: {its} its own with `--dtype bf16`, in which this CPU computes natively"
        )
    wrap = dict(width=100, initial_indent="  ", subsequent_indent="    ")
    return "".join(textwrap.fill(part, **wrap) + "\n" for part in parts)


def whole_steps(lines: Lines, runs: Runs) -> str:
    """README's table: AquilaMed's step on a GPU, of rows of chats, pairs, or one document each."""
    rows = [
        {
            "GPU": runs[line["run"]]["gpu"],
            "stage": line["name"].removeprefix(WHOLE),
            "tokens a row": line["shapes"]["row"],
            **{f"`--{flag}`": line["facts"][flag] for flag in ("optimizer", "recompute")},
            "tokens/s": line["facts"]["real_tokens_per_s"],
            "MFU": line["facts"]["MFU"],
            "peak GiB": round(line["facts"]["peak_GiB"], 1),
            "predicted": round(line["facts"]["predicted_GiB"], 1),
        }
        for line in lines
        if line["name"].startswith(WHOLE)
        and (line["shapes"]["documents"] <= 16 or "CPT" not in line["name"])
    ]
    ways = ["split", "split_bf16", "split_host", "fsdp"]
    return table(sorted(rows, key=lambda row: ways.index(row["`--optimizer`"]))) + "\n"


def rivals(lines: Lines, runs: Runs) -> str:
    """README's table: TRL's step on a GPU, of the newest run, beside nanomed's."""
    beside = [x for x in lines if ": TRL " in x["name"] and "gpu" in runs[x["run"]]]
    newest = max(beside, key=lambda line: runs[line["run"]]["date"])["run"]
    rows = [
        {
            "TRL's setting": line["name"].partition(": TRL ")[2],
            "tokens/s": line["facts"]["real_tokens_per_s"],
            "nanomed is faster by": line["facts"]["nanomed_is_faster_by"],
        }
        for line in beside
        if line["run"] == newest and "real_tokens_per_s" in line["facts"]  # else it could not run
    ]
    return table(rows) + "\n"


def _times(ratio: str) -> str:
    """A measured ratio in words: `2.01 (1.87 to 2.22)` or `no difference (0.97 to 1.02)`."""
    median, spread = ratio.split(" (")
    if median == "no difference":
        return f"as fast (no difference, {spread} as"
    return f"{median} times ({spread} as fast as"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check, files = parser.parse_args().check, sorted(FOLDER.glob("*.jsonl"))
    for kind in {line["kind"] for line in read(files)[0]}:
        if f"<!-- {kind} -->" not in PAGE.read_text("utf-8"):
            sys.exit(f"{PAGE.name} has no <!-- {kind} --> <!-- end of {kind} --> for its tables")
    for path in (PAGE, README):
        text = path.read_text("utf-8")
        if (new := filled(text, files)) != text and check:
            sys.exit(f"{path.relative_to(ROOT)} is stale; write it with `python -m bench.results`")
        path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
