"""SFT on one GPU, nanomed beside TRL: the same weights, chats and AdamW, turn by turn.

    python -m bench.step_rivals
    python -m bench.step_rivals --device cpu --quick          the same code with a tiny model

AquilaMed with as few layers as both sides need to fit into the GPU. All settings of TRL share
their weights and AdamW's state; nanomed trains as a run on one GPU does. The chats are random
tokens of the lengths of real medical ones (bench/cases.py), whose answers are three quarters.

A setting's first step is its gate: loss and gradients of its first rows must be nanomed's but for
the rounding of bfloat16. What cannot run, or computes something else, is a line that says so.
"""

import copy
import dataclasses
import tempfile
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

import kernels
from bench import theirs
from bench.cases import CHATS
from bench.gate import NOISE_BF16, agree, segments_of
from bench.measure import ROOT, show
from bench.ours import Ours, model_of, settings
from bench.setting import Setting, arguments, flags
from bench.step import OFF, QUICK, compare
from bench.step_gpu import GIB, emptied
from nanomed.batches.packing import row_from
from nanomed.config import SFT, Run
from nanomed.distributed import start
from nanomed.hf.reading import hf_name
from nanomed.text import template, tokenizer
from nanomed.training.alone import master, split_weights
from nanomed.training.optim import adamw
from tests.data import Examples

LAYER_GIB = 17  # of the GPU for each layer: 8 layers on an H200, 4 on a GPU of 80 GB
PADDED = 8  # chats in a padded batch, TRL's default; the others of a step are accumulated


def plans(batch: int, row: int, tokens: float, on_gpu: bool) -> list[dict[str, dict]]:
    """Settings of TRL that take turns with each other. Liger's RoPE takes the place of
    transformers' in all models of the process, so it comes last. From transformers' own, flex
    attention gets queries in float32 beside values in bfloat16, which not every torch may take."""
    padded = dict(per_device_train_batch_size=PADDED, gradient_accumulation_steps=batch // PADDED)
    rows = max(1, round(tokens / row))
    packed = dict(packing=True, max_length=row, per_device_train_batch_size=1)
    packed |= dict(gradient_accumulation_steps=rows)
    plain = "packing, no checkpointing"
    found = [{"as shipped": padded, "packing": packed, plain: packed | OFF}]
    if on_gpu:  # neither trains on a CPU
        flex = dict(attn_implementation="flex_attention")
        liger = packed | OFF | dict(use_liger_kernel=True)
        found += [{f"{plain}, flex": packed | OFF | flex}]
        found += [{f"{plain}, Liger": liger, f"{plain}, Liger, flex": liger | flex}]
    return found


class Sides:
    """Both models on the device, each once, with the same float32 weights."""

    def __init__(self, s: Setting, c: Run, data: Examples, folder: Path):
        self.s, self.c, self.data, self.folder = s, c, data, folder
        self.model = model_of(s.world, s.config, torch.float32, sharded=False)
        self.theirs = theirs.qwen2(s.config, self.model, s.device)
        split_weights(self.model, "split")
        self.adamw, self.their_adamw = adamw(self.model, c.weight_decay), None
        model = tokenizer.load(ROOT / "samples/tokenizer.model")
        encoder = template.Encoder(template.CHATML, model)
        self.tokenizer = theirs.tokenizer_of(encoder, folder / "tokenizer")

    def nanomed(self) -> Ours:
        s = self.s
        return Ours(s.world, s.config, self.data, self.c, s.dtype, self.model, self.adamw)

    def trl(self, name: str, given: dict) -> theirs.Stepped:
        """A trainer of its own over the shared weights, past its first step and the gate."""
        self.copy_weights()
        options = dict(given)
        attention = options.pop("attn_implementation", "sdpa")
        model = copy.deepcopy(self.theirs, {id(p): p for p in self.theirs.parameters()})
        model.set_attn_implementation(attention)
        trainer = theirs.trl_trainer(
            model, self.data, self.c, self.tokenizer, self.folder, self.s.device.type,
            optimizers=(self.their_adamw, None), **options,
        )  # fmt: skip
        self.their_adamw = trainer.create_optimizer()  # of the first, which the others are given
        versions = f"TRL {theirs.trl.__version__}, transformers {theirs.transformers.__version__}"
        words = f"{versions}: " + ", ".join(f"{key}={value}" for key, value in given.items())

        def gate(inputs: dict, loss: torch.Tensor, n_trained: torch.Tensor) -> None:
            """Ours divides by what TRL does, the trained tokens of the whole step."""
            batch = {key: x.cpu() for key, x in inputs.items() if torch.is_tensor(x)}
            row = row_from(*zip(*segments_of(batch), strict=True)).to(self.s.device)
            ours = self.model(row).nll.sum() / n_trained
            agree(self.model, f"TRL {name}", trainer.model, loss, ours, NOISE_BF16)

        side = theirs.Stepped(trainer, self.s.dtype, words, gate)
        side()
        return side

    @torch.no_grad()
    def copy_weights(self) -> None:
        mine = {hf_name(name): p for name, p in self.model.named_parameters()}
        for name, p in self.theirs.named_parameters():
            p.copy_(master(mine[name]))


def measure(sides: Sides, plan: dict[str, dict]) -> list[str]:
    """Names of the settings that compute something else than nanomed. Those that cannot run are
    lines that say so, and no more."""
    s, ours, trl, failed = sides.s, [sides.nanomed(), sides.nanomed()], {}, []

    def fail(name: str, error: BaseException) -> None:
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        shapes = {"parameters": s.config.n_params()}
        show([s.results.add("step", f"SFT: TRL {name}", [], shapes=shapes, note=note)])
        failed.extend([name] * isinstance(error, SystemExit))
        sides.theirs.zero_grad()
        sides.model.zero_grad()

    ours[0]()  # before the gate, so that what it compiles is not in anything's time
    for name, given in plan.items():
        try:
            trl[name] = sides.trl(name, given)
        except (Exception, SystemExit) as error:  # no memory, no such package, or the gate
            fail(name, error)
        emptied(s)
    names = {f"TRL {name}": side for name, side in trl.items()}
    try:
        if trl:
            compare(s, "SFT", {"nanomed": ours[0], "nanomed, again": ours[1]} | names)
    except Exception as error:
        for name in trl:
            fail(name, error)
    return failed


def main() -> None:
    s, given = arguments(flags(__doc__), gpu=[4096], cpu=[512])
    [row], batch = given.tokens, 64 if s.on_gpu else 16
    s.dtype, s.rounds = torch.bfloat16, 1 if given.quick else 3
    if s.on_gpu:
        memory = torch.cuda.get_device_properties(s.device).total_memory / GIB
        s.config = dataclasses.replace(s.config, n_layers=int(memory // LAYER_GIB))
    else:
        s.config = QUICK
    kernels.use("auto")
    rng, lengths = np.random.default_rng(0), [min(n, row) for n in islice(cycle(CHATS), 10 * batch)]
    ids = [rng.integers(s.config.vocab_size, size=n) for n in lengths]
    data = Examples([[(x, np.arange(len(x)) >= len(x) // 4)] for x in ids])
    failed = []
    with tempfile.TemporaryDirectory() as folder, start(s.device) as s.world:
        print(f"{s.config.n_params():,} parameters, {s.config.n_layers} layers; the gate:")
        sides = Sides(s, settings(SFT, batch, row), data, Path(folder))
        for plan in plans(batch, row, batch * float(np.mean(lengths)), s.on_gpu):
            failed += measure(sides, plan)
            emptied(s)
    if failed:
        raise SystemExit(f"computes something else than nanomed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
