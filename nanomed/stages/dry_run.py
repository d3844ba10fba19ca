"""What a run would take, by shapes alone: memory (memory.py), steps, tokens, FLOPs, days, disk."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nanomed.batches.loader import Loader, split
from nanomed.batches.packing import row_from
from nanomed.batches.prompts import share_prompts
from nanomed.batches.slices import Slices
from nanomed.config import SAVED_BYTES, InputError, ModelConfig, Run
from nanomed.processes import rank_from_env
from nanomed.stages import link, memory
from nanomed.stages.hardware import Hardware, parse_hardware
from nanomed.store import Store

GB = 1e9


# ---------------------------------------------------------------- work of the whole run


@dataclass(frozen=True)
class Work(link.Step):
    """One pass over so many examples."""

    examples: int


def published_work(c: Run) -> tuple[Work, Work]:
    """(training, held out) of --examples, every segment seq_len tokens long."""
    n_val = 0 if c.val_data else round(c.examples * c.val_fraction)
    if n_val == c.examples:
        raise InputError(
            f"--val_fraction {c.val_fraction} of --examples {n_val} leaves none to train on; give "
            "more, or another fraction"
        )
    segments = 2 if c.stage == "dpo" else 1

    def work(n: int) -> Work:
        return Work(n * segments * c.seq_len, n * segments * c.seq_len**2, n)

    return work(c.examples - n_val), work(n_val)


def counted_work(c: Run, data: Store | Slices) -> tuple[Work, Work]:
    """(training, held out) of tokenised data; of slices the squares of a sample."""
    if isinstance(data, Slices):
        Loader(c, data, parts=(data.train, data.val), mixture=data.mixture)  # can it be run?
        return sliced_work(data, data.train), sliced_work(data, data.val)

    def work(part: np.ndarray) -> Work:
        squares = np.diff(data.borders).astype(float).reshape(len(data), -1) ** 2
        tokens, shared = float(data.lengths[part].sum()), 0.0
        if c.stage == "dpo":
            rows = (share_prompts(row_from([s.ids for s in data[i]])) for i in part)
            shared = tokens - sum(len(row.tokens) for row in rows)
        return Work(tokens, float(squares[part].sum()), len(part), shared=shared)

    train, val = split(data, c.val_fraction, len(c.data) if c.val_data else None)
    return work(train), work(val)


def sliced_work(data: Slices, part: range, sample: int = 256) -> Work:
    """Pieces' lengths are those of `sample` slices evenly spaced; of all if there are fewer."""
    seen = np.unique(np.linspace(part.start, part.stop - 1, sample).astype(int)) if part else []
    lengths = [np.array([len(s.ids) for s in data[i]], float) for i in seen]
    n_tokens = int(data.n_tokens.reshape(2, -1)[int(part.start > 0)].sum())
    sampled = sum(x.sum() for x in lengths)
    squares = sum((x**2).sum() for x in lengths)
    return Work(float(n_tokens), squares * n_tokens / max(1, sampled), len(part))


def n_steps(c: Run, train: Work) -> int:
    return c.steps or math.ceil(train.examples / c.batch_size) * c.epochs


def n_validations(c: Run, train: Work) -> int:
    """One before the first step, then as fit() does."""
    every = c.eval_every or math.ceil(train.examples / c.batch_size)
    return 1 + math.ceil(n_steps(c, train) / every)


def flops(c: Run, config: ModelConfig, train: Work, val: Work) -> float:
    """Training 3 parts (forward 1, backward 2), each validation 1; DPO's reference 1 part, once."""
    passes = n_steps(c, train) * c.batch_size / train.examples
    reference = (train.flops(config) + val.flops(config)) / 3 if c.stage == "dpo" else 0
    validation = n_validations(c, train) * val.flops(config) / 3
    return passes * train.flops(config) + validation + reference


def disk(c: Run, config: ModelConfig, tokens: float) -> dict[str, float]:
    """Bytes: float32 weights and moments for each checkpoint (the last ones, the best, and the one
    being written), weights in bf16 for the export, 4 bytes and a flag for each token."""
    return {
        "checkpoints": (c.keep_last + 2) * SAVED_BYTES * config.n_params(),
        "export": 2 * config.n_params(),
        "token store": 5 * tokens,
    }


# ---------------------------------------------------------------- on the screen


def step_of(c: Run, train: Work) -> link.Step:
    share = c.batch_size / train.examples
    return link.Step(train.tokens * share, train.squares * share, shared=train.shared * share)


def show(c: Run, config: ModelConfig, load: Callable[[], Store | Slices]) -> None:
    """Prints the plan on rank 0. `load` tokenises the data and is called if --examples is 0."""
    hw = parse_hardware(c.hardware)
    if rank_from_env()[0] == 0:
        works = published_work(c) if c.examples else counted_work(c, load())
        step, n = step_of(c, works[0]), hw.n_gpus
        c = link.decided(config, c, hw)
        remedy = link.remedy(config, c, hw, step)
        for line in (
            f"dry run of {c.stage} on {n} x {c.hardware.partition('x')[2]}: nothing is trained",
            f"model: {config.n_params():,} parameters",
            *memory.lines(config, c, n // link.copies(c, hw), hw.gib, remedy),
            *link.lines(config, c, hw, step),
            *_work_lines(c, config, *works, hw),
        ):
            print(line)


def _work_lines(c: Run, config: ModelConfig, train: Work, val: Work, hw: Hardware) -> list[str]:
    steps, total = n_steps(c, train), flops(c, config, train, val)
    passes = steps * c.batch_size / train.examples
    step = step_of(c, train)
    per_step = max(link.seconds(config, c, hw, step))
    # What validations and DPO's reference take is taken to be as slow as training.
    seconds = total / step.flops(config) * per_step
    needed = disk(c, config, train.tokens + val.tokens)
    most = "at most " if c.examples else ""
    note = " (--examples, each of full length; --examples 0 reads --data)" if c.examples else ""
    twice = f", {train.shared / train.tokens:.0%} of them a prompt's second time, not computed"
    return [
        f"data: {train.examples:,} examples to train on, {val.examples:,} held out{note}",
        f"steps: {steps:,} of {c.batch_size} examples; {most}{passes * train.tokens:.4g} tokens"
        + twice * (train.shared > 0),
        f"compute: {most}{total:.3g} FLOPs, {n_validations(c, train)} validations included (causal "
        "count: 6 per matmul weight and token, 6 L D S per token of a segment of S)",
        f"time: {most}{_duration(seconds)} at an assumed MFU of {c.mfu:.0%} of {hw.n_gpus} x "
        f"{hw.flops / 1e12:.0f} TFLOP/s, {_duration(per_step)} a step"
        + (f", a checkpoint every {_duration(per_step * c.save_every)}" if c.save_every else ""),
        f"disk: {sum(needed.values()) / GB:,.1f} GB: "
        + ", ".join(f"{name} {size / GB:,.1f} GB" for name, size in needed.items()),
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
