"""How nanomed's step grows, and what FSDP2 costs where there is nothing to shard.

It grows with the documents' length, the row's, and the number of processes."""

from collections.abc import Sequence

import torch

from bench.measure import interleaved, quartiles, ratio, show
from bench.ours import Ours, model_of, settings
from bench.setting import Setting
from nanomed.config import CPT, MODELS, ModelConfig
from nanomed.distributed import World, keep_freed_memory
from nanomed.training.optim import adamw
from tests.data import Examples

ROWS = (8192, 16_384, 32_768, 65_536)  # tokens, full of documents of the same length


def side(world: World, config: ModelConfig, document: int, row: int, n_rows: int = 1, **given):
    """A step of n_rows rows in all, each full of documents of the same length."""
    n = row // document * n_rows
    data = Examples.of_lengths([document] * n * 4, config.vocab_size)
    return Ours(world, config, data, settings(CPT, n, row), **given)


def fsdp(s: Setting, document: int, row: int) -> None:
    """Weights and computation in bfloat16: in float32 one process goes without FSDP2 (shard)."""
    dtype, sides = torch.bfloat16, {}
    for name, sharded in (("FSDP2 on one process", True), ("unsharded loop", False)):
        model = model_of(s.world, s.config, dtype, sharded).to(dtype)
        sides[name] = side(s.world, s.config, document, row, dtype=dtype, model=model)
    sides |= {"again": sides["FSDP2 on one process"]}
    seconds = interleaved(sides, s.rounds, 1, s.device, flush=False)
    first, plain, again = seconds.values()
    takes = str(ratio(first, plain, again, first))
    shapes = {"parameters": s.config.n_params(), "tokens": row}
    for name, facts in (("FSDP2 on one process", {}), ("unsharded loop", {"FSDP2_takes": takes})):
        s.results.add(
            "step", f"one process: {name}", seconds[name], dtype=dtype, shapes=shapes, **facts
        )
    show(s.results.lines[-2:], "\nOne process, the same loop with and without FSDP2:")


def rows(b) -> None:
    """On a CPU: the tiny model, because a row of 65,536 tokens is many seconds of work."""
    config, shapes, rounds = MODELS["tiny"], (512, ROWS, (128, 2048)), b.given.rounds or 5
    if b.given.quick:
        config, shapes = b.config, (128, (512, 2048), (32, 512))
    growth(Setting(b.device, config, torch.float32, rounds, b.results, b.world), *shapes)


def growth(s: Setting, document: int, sizes: Sequence[int], documents: Sequence[int]) -> list[dict]:
    """Rows of each of `sizes` full of documents of `document` tokens, and rows of the first size
    full of documents of each of `documents` tokens, in turns. With the documents' length fixed the
    work is proportional to the row, so the rate should be that of the shortest row."""
    model = model_of(s.world, s.config, s.dtype)
    shared = dict(dtype=s.dtype, model=model, optimizer=adamw(model, 0.1))
    first, longest = (document, sizes[0]), (document, sizes[-1])
    shapes = [*((document, n) for n in sizes), *((n, sizes[0]) for n in documents)]
    sides = {shape: side(s.world, s.config, *shape, **shared) for shape in shapes}
    sides["again"] = sides[first]
    seconds = interleaved(sides, s.rounds, warmup=1, device=s.device, flush=False)
    short, long = ([x / shape[1] for x in seconds[shape]] for shape in (first, longest))
    again = [x / sizes[0] for x in seconds["again"]]
    facts = {longest: {f"of_the_rate_at_{sizes[0]:,}": str(ratio(short, long, again, short))}}
    lines = [
        s.results.add(
            "scaling", f"rows of {shape[1]:,}, documents of {shape[0]:,}", seconds[shape],
            dtype=s.dtype, shapes={"parameters": s.config.n_params()},
            real_tokens_per_s=round(shape[1] / quartiles(seconds[shape])[1]),
            **facts.get(shape, {}),
        )
        for shape in shapes
    ]  # fmt: skip
    show(lines, "\nThe step against the row's length and the documents':")
    return lines


def ranks(b) -> None:
    """One process with all cores, and as many processes as cores with one each, on the same rows,
    in turns. The processes are started once, outside the time."""
    from tests.ranks import Pool

    n = max(2, torch.get_num_threads())
    rounds, n_steps = (2, 2) if b.given.quick else (4, 4)
    found, again = {1: [], n: []}, []  # seconds by number of processes
    with Pool(n) as pool:
        for _ in range(rounds):
            for size, seconds in (*found.items(), (n, again)):
                given = (b.config, (b.tokens // 8, b.tokens, n), n // size, n_steps)
                seconds += max(pool(size, steps, *given), key=sum)
    shapes = {"parameters": b.config.n_params(), "tokens": n * b.tokens}
    for size, facts in ((1, {}), (n, {"of_one_process": str(ratio(found[1], found[n], again))})):
        name = f"processes x threads: {size} x {n // size}"
        b.results.add("scaling", name, found[size], dtype=torch.float32, shapes=shapes, **facts)
    show(b.results.lines[-2:], "\nProcesses and threads on the same cores, the same step:")


def steps(world: World, config: ModelConfig, shape, threads: int, n_steps: int) -> list[float]:
    """Seconds of each step on this rank, after one that does not count."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as start() does in a run
    ours = side(world, config, *shape, dtype=torch.float32)
    return interleaved({"ours": ours}, n_steps, warmup=1)["ours"]
