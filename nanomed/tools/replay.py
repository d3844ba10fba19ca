"""Runs the examples of a skipped step again, one by one, and says which of them breaks.

    python -m nanomed.tools.replay runs/sft-001/bad_batches/step-000123.json

Each example goes alone through the weights of the last checkpoint before that step, forward and
backward, without dropout: its next-token loss and the norm of its gradient. Its text is printed for
samples/, else with --show_text only.
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

from nanomed.arguments import command_line
from nanomed.batches import slices
from nanomed.batches.packing import row_from
from nanomed.config import InputError, Run
from nanomed.distributed import World, full, launch, pick_device, start
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.run import checkpoint
from nanomed.stages import stage
from nanomed.store import Store
from nanomed.text.template import Encoder
from nanomed.text.tokenizer_files import read_object


def main(argv: list[str] | None = None) -> None:
    parser = command_line("python -m nanomed.tools.replay", __doc__)
    parser.add_argument("file", type=Path, help="step-N.json of a run's bad_batches/")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if any"
    )
    parser.add_argument(
        "--show_text", action="store_true", help="print texts, also of other data than samples/"
    )
    given = parser.parse_args(argv)
    with start(pick_device(given.device)) as world:
        replay(given.file, world, given.show_text)


def replay(path: Path, world: World, show_text: bool = False) -> list[int]:
    """Prints a line for each example of the step; returns those that are not finite."""
    facts, folder = read_object(path), path.parent.parent
    c = _settings(read_object(folder / "config.json"))
    _, encoder = pretrained.describe(folder)
    data = _slices(c, encoder, folder) if c.stage == "cpt" else _store(facts)
    model = _model(c, folder, facts, world)
    print(f"step {facts['step']}: loss {facts['loss']}, gradient norm {facts['grad_norm']}")
    broken = [name for name, norm in facts["grad_norms"].items() if isinstance(norm, str)]
    print(f"layers whose gradient was not finite: {', '.join(broken) or 'none'}")
    found = []
    for row in facts["rows"]:
        print(f"rank {row['rank']}, a row with loss {row['loss']}:")
        for i, record in zip(row["examples"], row["records"], strict=True):
            loss, norm = run_alone(model, data[i], world.device)
            mark = "" if math.isfinite(loss + norm) else "   <- NOT FINITE"
            place = _where(data, i, record)
            print(f"  {place}: loss {loss:.4f} per trained token, gradient norm {norm:.4f}{mark}")
            if mark:
                found.append(i)
            if show_text or stage.may_show_text(c):
                print("    " + " | ".join(encoder.tokenizer.decode(list(s.ids)) for s in data[i]))
    if not found:
        print(
            "each of them alone is finite with these weights: they are of a checkpoint before the "
            "step, and dropout is off; compare the losses and the gradient norms"
        )
    return found


def run_alone(model: nn.Module, segments: list, device: torch.device) -> tuple[float, float]:
    """(next-token loss per trained token, gradient norm) of one example."""
    row = row_from(*zip(*segments, strict=True)).to(device)
    loss = model(row).nll.sum() / (row.labels >= 0).sum()
    loss.backward()
    squares = sum(full(param.grad.norm() ** 2).item() for param in model.parameters())
    model.zero_grad()
    return loss.item(), math.sqrt(squares)


def _model(c: Run, folder: Path, facts: dict, world: World) -> Aquila:
    config = pretrained.config_of(folder)
    c = dataclasses.replace(c, dropout=0.0, optimizer="fsdp")
    if world.device.type == "cpu":
        c = dataclasses.replace(c, kernels="auto")  # the run's own may need its GPU
    saved = facts["checkpoint"] and folder / "checkpoints" / Path(facts["checkpoint"]).name
    if saved and not saved.exists():
        gone, saved = saved.name, checkpoint.newest(folder / "checkpoints")
        print(f"{gone} is no longer kept; the weights are those of {saved and saved.name}")
    if saved:
        c = dataclasses.replace(c, init=str(saved))
    else:
        print("there is no checkpoint from before the step: the weights are the run's first ones")
    return stage.build_model(c, config, world)


def _settings(saved: dict) -> Run:
    stages = {cls.stage: cls for cls in Run.__subclasses__()}
    return stages[saved.pop("stage")](**saved)


def _store(facts: dict) -> Store:
    folder = Path(facts["store"] or "none")
    if not folder.exists():
        raise InputError(f"the token store {folder} is gone; the run's own command makes it again")
    return Store(folder)


def _slices(c: Run, encoder: Encoder, folder: Path) -> slices.Slices:
    data = slices.read(c, encoder)
    if data.meta["sha256"] != read_object(folder / "data_report.json")["sha256"]:
        raise InputError(f"{' '.join(c.data)} is not what {folder} read; it was changed since")
    return data


def _where(data: Store | slices.Slices, i: int, record: dict) -> str:
    """The record of an example; of a slice its number and all of its documents."""
    if isinstance(data, Store):
        return f"{record['file']}, record {record['record']}"
    numbers: dict[str, list[str]] = {}
    for file, number in data.documents_in(i):
        numbers.setdefault(file, []).append(str(number))
    documents = "; ".join(f"{file}, records {' '.join(n)}" for file, n in numbers.items())
    return f"slice {i} ({documents})"


if __name__ == "__main__":
    launch(main)
