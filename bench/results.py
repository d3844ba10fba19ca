"""Writes docs/results.md, and README's figures, from the measurements in bench/results/*.jsonl.

No figure is typed.

python -m bench.results            writes them
python -m bench.results --check    fails if they are not what the files give
"""

import argparse
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from bench.measure import ROOT, read, shown, table
from bench.step_scaling import ROWS

FOLDER, PAGE = ROOT / "bench/results", ROOT / "docs/results.md"
README = ROOT / "README.md"
FIGURES = r"(?s)(?<=<!-- figures -->\n).*?(?=\n *<!-- end of figures -->)"
RIVALS = {
    "SFT: TRL as shipped": "TRL as shipped",
    "SFT: TRL no checkpointing, by length": "TRL's batches by length without checkpointing",
    "SFT: TRL packing, no checkpointing": "TRL's packing without checkpointing",
    "DPO: TRL as shipped": "TRL as shipped",
    "CPT: transformers loop, full rows": "a plain transformers loop over full rows of text",
}

TOP = """# Results

Written by `python -m bench.results` from `bench/results/*.jsonl`; a test compares. The command
above a table is the one that measured it.

Versions take turns within a run (A B A B), on a GPU with its L2 cache emptied before every sample.
*IQR* is the distance between the quartiles of the samples. A ratio is the median over the turns,
with the smallest and the largest. *No difference*: it is nearer to 1 than the ratio of a version to
itself. Only lines of one table may be compared.
"""

WAITING = """## What waits for a GPU

[`bench/gpu.sh`](../bench/gpu.sh) measures all of it in less than ten minutes; one by one, each with
`--results bench/results/NAME.jsonl`:

"""
SEVERAL = (
    "- Several GPUs and nodes, beside what `--dry_run` says of memory and link: "
    "`torchrun --nproc_per_node 8 train_sft.py --config configs/sft.toml --init FOLDER "
    "--steps 20`, on two nodes with `--nodes_share replicate` and `shard`; and a rank stopped by "
    "`kill -STOP`, which the watchdog has to name under NCCL"
)


@dataclass(frozen=True)
class Kind:
    """One table: its heading, what it says, and the commands that fill it on a CPU and on a GPU."""

    title: str
    about: str
    cpu: str
    gpu: str = ""


KINDS = {
    "ceiling": Kind(
        "Ceilings",
        "What the machine does at most, on random data: copying, and matmuls of AquilaMed's "
        "shapes. The head comes with rows of the logits 151,851 elements apart, as the vocabulary "
        "has it, and 151,936.",
        "python -m bench.ceilings",
        "python -m bench.ceilings",
    ),
    "parity": Kind(
        "Correct first",
        "The largest error of an output or a gradient against float32 formulas (float64 on a CPU), "
        "norm-wise, and how often it is that of the version it is held against in the same dtype. "
        "More than 2 fails, and what fails is not timed.",
        "python -m bench.kernels --parity",
        "python -m bench.kernels --parity --ops rmsnorm rope swiglu attention linear_nll layer",
    ),
    "kernel": Kind(
        "Kernels",
        "Each op, and a whole layer, at AquilaMed's shapes. Rates count what must be done at least "
        "([kernels.md](kernels.md)), as shares of the copy's and the matmul's rate of the run. "
        "*backward* keeps the graph of one forward; linear_nll's logits serve a single backward, "
        "so it has none alone. *Its matmuls alone* computes no loss.",
        "python -m bench.kernels",
        "python -m bench.kernels --tokens 4096 8192 16384 32768\n"
        "python -m bench.kernels --ops layer",
    ),
    "step": Kind(
        "A training step",
        "From the rows of a step to the updated weights: AquilaMed on one GPU, and small models on "
        "a CPU beside transformers and TRL. All take turns in one process, so the others, too, "
        "have the setting of the allocator that nanomed makes on a CPU (keep_freed_memory).",
        "python -m bench.step",
        "python -m bench.step_gpu --only cpt sft --optimizer split\npython -m bench.step_gpu",
    ),
    "scaling": Kind(
        "How a step grows",
        "With the row at a fixed length of documents, with the documents, with the processes. "
        "*Of the rate* is tokens per second over those of the shortest row: 1 is linear.",
        "python -m bench.step --only scaling ranks",
        "python -m bench.step_gpu --only scaling fsdp",
    ),
    "data": Kind(
        "Data",
        "Reading, tokenising and packing documents, beside datasets with transformers.",
        "python -m bench.data",
    ),
    "corpus": Kind(
        "Rules and MinHash",
        "Two stages of build_corpus.py on one core, beside tools that do the same, each in an "
        "environment of its own: equal rules, equal tokens, 14 bands of 8 rows. Data-Juicer has "
        "rules of its own that are near to them. The texts are real and medical, most are short.",
        "python -m bench.corpus --real ../shared/data --python RIVAL=ENV/bin/python ...",
    ),
    "evals": Kind(
        "Multiple choice",
        "Items of real test files per second of the processor, on a real model of 135 million "
        "parameters in float32, beside lm-eval 0.4.13's hf backend with the batch size that is its "
        "best here. Both score the same requests; of two processes lm-eval's get every second item "
        "each, nanomed's share rows. Of medmcqa lm-eval draws the shots at random, so its two "
        "processes draw others than one: there the two sides' prompts, and numbers, differ.",
        "python -m bench.evals --model FOLDER --real ../shared/data --python ENV/bin/python",
    ),
}


def page(paths: list[Path]) -> str:
    """A table for what was measured, and one list of what waits for a GPU."""
    lines, runs = read(paths)
    parts, waiting = [TOP], []
    for kind in dict.fromkeys([*KINDS, *(line["kind"] for line in lines)]):
        known = KINDS.get(kind, Kind(kind.capitalize(), "", f"python -m bench.{kind}"))
        mine = [line for line in lines if line["kind"] == kind]
        on_gpu = {"gpu" in runs[line["run"]] for line in mine}
        if known.gpu and True not in on_gpu:
            waiting.append(f"- {known.title}: `" + "` and `".join(known.gpu.splitlines()) + "`")
        if not mine:
            continue
        commands = [known.gpu] * (True in on_gpu) + [known.cpu] * (False in on_gpu)
        commands = "\n".join(f"{x} --results bench/results/NAME.jsonl" for x in commands)
        parts.append(f"## {known.title}\n\n{known.about}\n\n```\n{commands}\n```\n")
        for run in dict.fromkeys(line["run"] for line in mine):
            its = [line for line in mine if line["run"] == run]
            parts.append(f"{machine(runs[run])}:\n")
            for sizes in dict.fromkeys(tuple(line["shapes"]) for line in its):
                alike = [shown(line) for line in its if tuple(line["shapes"]) == sizes]
                parts.append(f"{table(alike)}\n")
            parts += fastest(its)
            parts += [f"{note}.\n" for note in dict.fromkeys(x["convention"] for x in its) if note]
    if waiting:
        parts.append(WAITING + "\n".join([*waiting, SEVERAL]) + "\n")
    return "\n".join(parts)


def fastest(lines: list[dict]) -> list[str]:
    """Which of the settings of TRL that a run tried did most real tokens per second, a sentence for
    each stage; and the one that nanomed's ratio is smallest beside, if that is another."""
    tried: dict[str, dict[str, dict]] = {}
    for line in lines:
        stage, _, name = line["name"].partition(": TRL ")
        if name:
            tried.setdefault(stage, {})[name] = line["facts"]
    found = []
    for stage, settings in tried.items():
        faster = {name: facts["nanomed_is_faster_by"] for name, facts in settings.items()}
        best = max(settings, key=lambda name: settings[name]["real_tokens_per_s"])
        least = min(faster, key=lambda name: _median(faster[name]))
        text = f"{stage}: of the {len(settings)} settings of TRL, *{best}* is the fastest by real "
        text += f"tokens per second; nanomed is {_times(faster[best])} it"
        if least != best:
            text += f". Turn by turn the ratio is smallest beside *{least}*: {faster[least]}"
        found.append(f"{text}.\n")
    return found


def _median(ratio: str) -> float:
    return 1.0 if ratio.startswith("no difference") else float(ratio.split(" (")[0])


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


def figures(paths: list[Path]) -> str:
    """What README says of speed: nanomed in its own default, float32 on a CPU, beside each rival in
    the same and in its faster dtype, in the newest run of the largest model; and how the rate
    changes from the shortest rows to the longest."""
    lines, runs = read(paths)
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
        other = found.get(f"{name}, bf16")
        if other:
            text += f", and {_times(other['facts']['nanomed_is_faster_by'])} it in bfloat16"
        parts.append(text)
    longest = f"rows of {ROWS[-1]:,}, documents of 512"
    if longest in found:
        rate = found[longest]["facts"][f"of_the_rate_at_{ROWS[0]:,}"]
        dtype = f" in {found[longest]['dtype']}" * (found[longest]["dtype"] != "float32")
        parts.append(
            f"- over rows of {ROWS[-1]:,} tokens {_times(rate)} over rows of {ROWS[0]:,}{dtype}"
        )
    wrap = dict(width=100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(textwrap.fill(part, **wrap) for part in parts)


def _times(ratio: str) -> str:
    """A measured ratio in words: `2.01 (1.87 to 2.22)` or `no difference (0.97 to 1.02)`."""
    median, spread = ratio.split(" (")
    if median == "no difference":
        return f"as fast (no difference, {spread} as"
    return f"{median} times ({spread} as fast as"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    files, readme = sorted(FOLDER.glob("*.jsonl")), README.read_text("utf-8")
    written = {
        PAGE: page(files),
        README: re.sub(FIGURES, lambda _: figures(files), readme),
    }
    for path, text in written.items():
        if not given.check:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale; write it with `python -m bench.results`")


if __name__ == "__main__":
    main()
