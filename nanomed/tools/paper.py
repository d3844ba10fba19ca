"""What each stage of paper.sh has done: one model measured, then all of them in one table.

    python -m nanomed.tools.paper measure RUN
    python -m nanomed.tools.paper table FOLDER < EXPECTED

`measure` asks the sample world: bits per byte of held-out documents, questions and exam in words of
their own, and the preference pairs that train_dpo.py holds out; it writes RUN/results.json.
`table` puts those of FOLDER/*/ into FOLDER/results.json and says which numbers are not as expected.
A line of EXPECTED is STAGE NUMBER VALUE TOLERANCE, or STAGE NUMBER above (below) OTHER_STAGE.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from nanomed.arguments import command_line
from nanomed.batches.packing import Row, row_from
from nanomed.build.files import write_json
from nanomed.config import ROOT, InputError
from nanomed.distributed import launch
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.model.scoring import in_order
from nanomed.records import pair_of, read_json
from nanomed.stages import world
from nanomed.store import group_key
from nanomed.text.template import Encoder
from nanomed.training.losses import segment_logps

SAMPLES = ROOT / "samples"
PAIRS = {"pairs": SAMPLES / "dpo.jsonl", "careful": SAMPLES / "dpo_careful.jsonl"}
HELD_OUT = 0.1  # --val_fraction of paper.sh
ROW = 4096  # tokens at once
LONGEST = 512  # tokens of a document or of a pair's side; the longest are half of it
# The table's columns: name, what stands above it, how it is written.
COLUMNS = {
    "medical": ("bits/byte medical", "{:.3f}"),
    "general": ("bits/byte general", "{:.3f}"),
    "held_out_answers": ("answers", "{:.0%}"),
    "documents_answers": ("from documents", "{:.0%}"),
    "never_stated_answers": ("never stated", "{:.0%}"),
    "option_texts": ("exam, texts", "{:.0%}"),
    "documents_texts": ("documents, texts", "{:.0%}"),
    "never_stated_texts": ("never, texts", "{:.0%}"),
    "option_letters": ("exam, letters", "{:.0%}"),
    "documents_letters": ("documents, letters", "{:.0%}"),
    "never_stated_letters": ("never, letters", "{:.0%}"),
    "pairs": ("pairs, facts", "{:.0%}"),
    "careful": ("pairs, careful", "{:.0%}"),
}


# ---------------------------------------------------------------- one model


def measure(model: Aquila, encoder: Encoder) -> dict[str, dict]:
    """Every number of COLUMNS: {"right", "of"} of what is counted, else {"value", "of"} with `of`
    the documents."""
    model.eval()
    bits = {name: bits_per_byte(model, encoder, name) for name in ("medical", "general")}
    pairs = {name: preferred(model, encoder, path) for name, path in PAIRS.items()}
    return bits | world.counted(model, encoder) | pairs


def bits_per_byte(model: Aquila, encoder: Encoder, source: str) -> dict:
    """Of the good documents in samples/cpt_SOURCE.jsonl, over all their bytes."""
    n_bytes = torch.tensor(encoder.tokenizer.n_bytes())
    documents = [r["text"] for _, r, _ in read_json(str(SAMPLES / f"cpt_{source}.jsonl"))
                 if r["quality"] == "good"]  # fmt: skip
    ids = [[*encoder.tokenizer.encode(text), encoder.document_end] for text in documents]
    bits, total = 0.0, 0
    for row in rows(ids, [[True] * len(x) for x in ids]):
        bits += nll(model, row).sum().item() / math.log(2)
        total += int(n_bytes[row.labels[row.labels >= 0]].sum())
    return {"value": bits / total, "of": len(documents)}


def preferred(model: Aquila, encoder: Encoder, path: Path) -> dict[str, int]:
    """Of how many held-out pairs the chosen answer is the likelier one: of the subjective ones,
    since build_dpo.py's objective ones may ask what the samples hold out."""
    records = [
        r
        for _, r, _ in read_json(str(path))
        if r["kind"] == "subjective" and group_key(r["group"]) < HELD_OUT * 2**64
    ]
    sides = [encoder.pair(pair_of(record), LONGEST)[0] for record in records]
    flat = [side for pair in sides for side in pair]
    logps = []
    for row in rows([ids for ids, _ in flat], [trained for _, trained in flat]):
        logps += segment_logps(nll(model, row), row).tolist()
    right = sum(a > b for a, b in zip(logps[::2], logps[1::2], strict=True))
    return {"right": right, "of": len(records)}


@torch.no_grad()
def nll(model: Aquila, row: Row) -> Tensor:
    return model(row.to(next(model.parameters()).device)).nll.cpu()


def rows(ids: list[list[int]], trained: list[list[bool]]) -> Iterable[Row]:
    """Segments in their order, as many in a row as ROW tokens take."""
    for part in in_order([len(segment) for segment in ids], ROW):
        yield row_from([ids[i] for i in part], [trained[i] for i in part])


# ---------------------------------------------------------------- all of them


def read_stages(folder: Path) -> dict[str, dict]:
    """Stage -> its numbers, in the order in which they were measured."""
    files = sorted(folder.glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
    found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in files}
    if not (stages := {name: numbers for name, numbers in found.items() if "pairs" in numbers}):
        raise InputError(f"{folder} holds no measured run: paper.sh makes them")
    return stages


def value_of(number: dict) -> float:
    return number["value"] if "value" in number else number["right"] / number["of"]


def lines(stages: dict[str, dict]) -> list[str]:
    """The table, in Markdown."""
    found = ["| stage | " + " | ".join(head for head, _ in COLUMNS.values()) + " |"]
    found.append("|---" * (1 + len(COLUMNS)) + "|")
    for stage, numbers in stages.items():
        cells = [form.format(value_of(numbers[name])) for name, (_, form) in COLUMNS.items()]
        found.append(f"| {stage} | " + " | ".join(cells) + " |")
    return found


def deviations(stages: dict[str, dict], expected: str) -> tuple[list[str], int]:
    """(what is not as expected, how many lines were checked)."""
    found, checked = [], 0
    for line in filter(None, (line.split("#")[0].strip() for line in expected.splitlines())):
        stage, name, value, other = line.split()
        got, checked = value_of(stages[stage][name]), checked + 1
        if value in ("above", "below"):
            than = value_of(stages[other][name])
            if not (got > than if value == "above" else got < than):
                found.append(f"{stage}: {name} is {got:.3f}, not {value} {other}'s {than:.3f}")
        elif abs(got - float(value)) > float(other):
            found.append(f"{stage}: {name} is {got:.3f}, expected {value} give or take {other}")
    return found, checked


def main() -> None:
    parser = command_line("python -m nanomed.tools.paper", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure", help="measure one model")
    one.add_argument("folder", type=Path, help="its run")
    all_of_them = commands.add_parser("table", help="all measured models; reads EXPECTED")
    all_of_them.add_argument("folder", type=Path, help="paper.sh's --out")
    c = parser.parse_args()
    if c.command == "measure":
        _, encoder = pretrained.describe(c.folder)
        model = pretrained.load(c.folder)
        return write_json(c.folder / "results.json", measure(model, encoder))
    stages = read_stages(c.folder)
    found, checked = deviations(stages, sys.stdin.read())
    write_json(c.folder / "results.json", {"stages": stages, "not_as_expected": found})
    print(*lines(stages), "", sep="\n")
    print(*(f"NOT AS EXPECTED  {line}" for line in found), sep="\n", end="\n" if found else "")
    print(f"{checked - len(found)} of {checked} numbers are as expected")


if __name__ == "__main__":
    launch(main)
