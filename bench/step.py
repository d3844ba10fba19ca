"""A training step of nanomed beside what a user would pick: a transformers loop and TRL's trainers.

    python -m bench.step                    all tables, about twenty minutes
    python -m bench.step --only sft         one of them
    python -m bench.step --quick            all with 2 million parameters, in a minute

Same weights, documents and machine, in one process, turn by turn, on a CPU. nanomed computes in
float32, as a run on a CPU does. Its rivals do too, and once more in bfloat16 where the CPU is
faster in it. First, in float32, loss and gradients must agree: a version that computes something
else gets no time. Tokens are real ones; padding is not counted. bench/step_rivals.py is for a GPU.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch

from bench import startup, step_scaling
from bench.gate import plain_gate, trl_gate
from bench.measure import ROOT, Results, interleaved, ratio, show
from bench.ours import Ours, model_of, settings
from bench.setting import Setting, flags
from nanomed import store
from nanomed.config import CPT, DPO, SFT, ModelConfig, Run
from nanomed.distributed import World, pick_device, start
from nanomed.stages.stage import bf16_takes
from nanomed.text import template, tokenizer
from tests.data import Examples

VOCABULARY = 6144  # of samples/tokenizer.model
MID = ModelConfig(VOCABULARY, 4, 512, 8, 2, 1408, 4096, 1e6, 1e-5, True)
# Overhead is most of a step of it: its ratios say whether all runs, not how a model of use does.
QUICK = ModelConfig(VOCABULARY, 2, 128, 4, 2, 352, 4096, 1e6, 1e-5, True)
# TRL's batches by length come from the longest to the shortest, over and over: 12 are all of them.
ROUNDS = 12
CONVENTION = (
    "Ratios are of the time per real token over all turns, in brackets of single turns. TRL has "
    "its defaults but for what `setting` names, the batch, the length and AdamW's constants"
)


class Bench(Setting):
    """What the comparisons share. `tokens` is about what a step has, and a packed row of TRL."""

    def __init__(self, given: argparse.Namespace, world: World, folder: Path):
        config, self.tokens, rounds = (QUICK, 512, 3) if given.quick else (MID, 2048, ROUNDS)
        results = Results(given.results, world.device)
        how = world.device, config, torch.float32, given.rounds or rounds, results, world
        super().__init__(*how)
        self.given, self.folder = given, folder
        names = given.dtypes or ["fp32", "bf16"][: 1 + (bf16_takes() < 1)]
        known = {"fp32": ("", torch.float32), "bf16": (", bf16", torch.bfloat16)}
        self.dtypes = dict(known[name] for name in names)
        model = tokenizer.load(ROOT / "samples/tokenizer.model")
        self.encoder = template.Encoder(template.CHATML, model)
        self.plain = model_of(world, self.config, torch.float32, sharded=False)


def chats(b: Bench) -> Examples:
    files = [real("medical_sft_sharegpt.jsonl", "samples/sft.jsonl")]
    return Examples([*islice(store.chats(files, b.encoder, b.tokens, allow_drop=1.0), 400)])


def pairs(b: Bench) -> Examples:
    files = [real("preference_sharegpt.jsonl", "samples/dpo.jsonl")]
    found = store.pairs(files, b.encoder, b.tokens // 2, allow_drop=1.0)
    return Examples([*islice(found, 8 if b.given.quick else 40)])  # TRL scores them all before


def documents(b: Bench) -> Examples:
    """Plain text: the chats' tokens without their template's structure, every token trained on."""
    return Examples([[(s.ids, s.ids == s.ids)] for [s] in chats(b)])


def real(name: str, otherwise: str) -> str:
    """Data beside the checkout, if they are there."""
    path = ROOT.parent / "shared/data" / name
    return str(path) if path.exists() else otherwise


# ---------------------------------------------------------------- the comparison


def compare(b: Setting, stage: str, sides: dict[str, Callable]) -> None:
    """Times the sides in turns: nanomed first, then nanomed again, which tells the noise. A turn's
    step has other documents on every side; over all turns, nanomed's of both, they are alike."""
    seconds = interleaved(sides, b.rounds, 1, b.device, flush=False)
    tokens = {name: [*map(int, side.tokens[-b.rounds :])] for name, side in sides.items()}
    each = {n: [s / t for s, t in zip(seconds[n], tokens[n], strict=True)] for n in sides}
    first, again, *others = sides
    ours = sum(seconds[first] + seconds[again]) / sum(tokens[first] + tokens[again])
    faster = ["", ""]
    for n in others:
        found, theirs = ratio(each[n], each[first], each[again]), sum(seconds[n]) / sum(tokens[n])
        faster.append(str(dataclasses.replace(found, median=theirs / ours)))
    lines = []
    for (name, side), times in zip(sides.items(), faster, strict=True):
        facts = {
            "real_tokens_per_s": round(sum(tokens[name]) / sum(seconds[name])),
            "tokens_a_step": round(sum(tokens[name]) / b.rounds),
        } | ({"nanomed_is_faster_by": times} if times else {})
        line = b.results.add(
            "step", f"{stage}: {name}", seconds[name], dtype=side.dtype, convention=CONVENTION,
            shapes={"parameters": b.config.n_params()}, **facts, setting=side.setting,
        )  # fmt: skip
        lines.append(line)
        getattr(side, "close", lambda: None)()
    show(lines)


def nanomed(b: Bench, data: Examples, c: Run) -> dict[str, Ours]:
    """Two of them, which see the same documents, and one in the CPU's other dtype."""
    names = {"nanomed": torch.float32, "nanomed, again": torch.float32}
    names |= {f"nanomed{name}": dtype for name, dtype in b.dtypes.items()}
    return {name: Ours(b.world, b.config, data, c, dtype) for name, dtype in names.items()}


def trl_sides(
    b: Bench, data: Examples, c: Run, tried: dict[str, dict]
) -> Iterator[tuple[str, Callable]]:
    """A trainer for each setting and dtype, past the gate; --quick tries the first and last."""
    from bench import theirs

    tok = theirs.tokenizer_of(b.encoder, b.folder / "tokenizer")

    def trainer(**given):
        model = theirs.qwen2(b.config, b.plain, b.device)
        return theirs.trl_trainer(model, data, c, tok, b.folder, b.device.type, **given)

    names = list(tried)
    for name in names[:: len(names) - 1] if b.given.quick else names:
        # In float32: in bf16 the reference of DPO is rounded otherwise than the policy.
        trl_gate(b.plain, f"TRL {name}", trainer(**tried[name], bf16=False), c)
        for suffix, dtype in b.dtypes.items():
            asked = tried[name] | {"bf16": dtype == torch.bfloat16}
            words = ", ".join(f"{key}={value}" for key, value in asked.items())
            side = theirs.Stepped(trainer(**asked), dtype, f"TRL {theirs.trl.__version__}: {words}")
            yield f"TRL {name}{suffix}", side


def loops(
    b: Bench, name: str, data: Examples, c: Run, order: Callable, block: int = 0
) -> Iterator[tuple[str, Callable]]:
    """A transformers loop in each dtype, past the gate; each full row is one document there."""
    from bench.theirs import Plain, qwen2

    for suffix, dtype in b.dtypes.items():
        model = qwen2(b.config, b.plain, b.device)
        loop = Plain(model, data, c, dtype, order, block)
        plain_gate(b.plain, name, model, loop.batch(0))
        yield f"{name}{suffix}", loop


OFF = dict(gradient_checkpointing=False)


def packing(b: Bench) -> dict[str, dict]:
    row = dict(packing=True, max_length=b.tokens, per_device_train_batch_size=1)
    return {"packing": row, "packing, no checkpointing": row | OFF}


def sft(b: Bench) -> None:
    data, c = chats(b), settings(SFT, 4 if b.given.quick else 8, 2 * b.tokens)
    trl = {
        "as shipped": {},
        "no checkpointing": OFF,
        "no checkpointing, by length": OFF | dict(train_sampling_strategy="group_by_length"),
        **packing(b),
    }
    print(f"\nSFT, {c.batch_size} chats a step; the gate:")
    sides = nanomed(b, data, c)
    sides |= loops(b, "transformers loop", data, c, sides["nanomed"].loader.examples)
    compare(b, "SFT", sides | dict(trl_sides(b, data, c, trl)))


def dpo(b: Bench) -> None:
    data, c = pairs(b), settings(DPO, 2, 4 * b.tokens)
    trl = {
        "as shipped": {},
        "no checkpointing": OFF,
        "no checkpointing, reference before": OFF | dict(precompute_ref_log_probs=True),
    }
    print(f"\nDPO, {c.batch_size} pairs a step, nanomed's reference computed before; the gate:")
    more = dict(trl_sides(b, data, c, trl))
    compare(b, "DPO", nanomed(b, data, c) | more)


def cpt(b: Bench) -> None:
    data = documents(b)
    n = max(1, round(b.tokens / data.lengths.mean()))
    c = settings(CPT, n, 2 * b.tokens)
    print(f"\nCPT, {n} documents a step; the gate:")
    sides = nanomed(b, data, c)
    order = sides["nanomed"].loader.examples
    sides |= trl_sides(b, data, c, packing(b))
    sides |= loops(b, "transformers loop, full rows", data, c, order, block=b.tokens // 4)
    compare(b, "CPT", sides)


PARTS = {
    "sft": sft, "dpo": dpo, "cpt": cpt,
    "scaling": step_scaling.rows, "ranks": step_scaling.ranks, "startup": startup.measure,
}  # fmt: skip


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some tables")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), help="of the rivals")
    parser.add_argument("--rounds", type=int, default=0, help="samples of each; default: by table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start(pick_device("cpu")) as world:
        b = Bench(given, world, Path(folder))
        print(f"{b.config.n_params():,} parameters, {torch.get_num_threads()} threads")
        for name in given.only:
            PARTS[name](b)


if __name__ == "__main__":
    main()
