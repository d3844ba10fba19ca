"""How nanomed's step grows, and what FSDP2 costs where there is nothing to shard.

It grows with the documents' length, the row's, and the number of processes."""

from collections.abc import Sequence

import torch

from bench.measure import Results, interleaved, quartiles, ratio, shown, table
from bench.ours import Examples, Ours, model_of, settings
from nanomed.config import CPT, MODELS, ModelConfig
from nanomed.distributed import World, keep_freed_memory
from nanomed.training.optim import adamw

SHARE = "of_one_process"
ROWS = (8192, 16_384, 32_768, 65_536)  # tokens, full of documents of the same length


def side(world: World, config: ModelConfig, document: int, row: int, n_rows: int = 1, **given):
    """A step of n_rows rows in all, each full of documents of the same length."""
    n = row // document * n_rows
    data = Examples.of_lengths([document] * n * 4, config.vocab_size)
    return Ours(world, config, data, settings(CPT, n, row), **given)


def fsdp(
    world: World,
    config: ModelConfig,
    results: Results,
    document: int,
    row: int,
    dtype: torch.dtype,
    rounds: int,
    warmup: int,
) -> None:
    """Weights and computation of both in dtype: only FSDP2 casts float32 weights for bf16."""
    sides = {}
    for name, sharded in (("FSDP2 on one process", True), ("unsharded loop", False)):
        model = model_of(world, config, dtype, "none", sharded).to(dtype)
        sides[name] = side(world, config, document, row, dtype=dtype, model=model)
    sides = {**sides, "FSDP2, again": sides["FSDP2 on one process"]}
    seconds = interleaved(sides, rounds, warmup, world.device, flush=False)
    first, plain, again = seconds.values()
    cost = ratio(first, plain, _noise(first, again, plain))
    facts = {"unsharded loop": {"FSDP2_takes": str(cost)}}
    lines = [
        results.add("step", f"one process: {n}", seconds[n], dtype=dtype,
                    shapes={"parameters": config.n_params(), "tokens": row}, **facts.get(n, {}))
        for n in sides if n != "FSDP2, again"
    ]  # fmt: skip
    print("\nOne process, the same loop with and without FSDP2:")
    print(table([shown(line) for line in lines]), flush=True)


def _noise(first: list[float], again: list[float], plain: list[float]) -> list[float]:
    """`again` over `first`, as samples beside `plain`, which the ratio divides by."""
    return [p * a / f for f, a, p in zip(first, again, plain, strict=True)]


def rows(b) -> None:
    """On a CPU: the tiny model, because a row of 65,536 tokens is many seconds of work."""
    if b.given.quick:
        config, document, documents, sizes, rounds = b.config, 128, (32, 512), (512, 2048), 3
    else:
        config, document, documents, sizes, rounds = MODELS["tiny"], 512, (128, 2048), ROWS, 5
    given = dict(dtype=torch.float32, rounds=b.given.rounds or rounds)
    lines = growth(b.world, config, b.results, document, sizes, documents, **given)
    print("\nThe step against the row's length and the documents':")
    print(table([shown(line) for line in lines]), flush=True)


def growth(
    world: World,
    config: ModelConfig,
    results: Results,
    document: int,
    sizes: Sequence[int],
    documents: Sequence[int],
    dtype: torch.dtype,
    rounds: int,
) -> list[dict]:
    """Rows of each of `sizes` full of documents of `document` tokens, and rows of the first size
    full of documents of each of `documents` tokens, in turns. With the documents' length fixed the
    work is proportional to the row, so the rate should be that of the shortest row."""
    model = model_of(world, config, dtype, "none")
    optimizer = adamw(model, 0.1)
    shared = dict(dtype=dtype, model=model, optimizer=optimizer)
    first, longest = (document, sizes[0]), (document, sizes[-1])
    shapes = [*((document, n) for n in sizes), *((n, sizes[0]) for n in documents)]
    sides = {shape: side(world, config, *shape, **shared) for shape in shapes}
    sides["again"] = sides[first]
    seconds = interleaved(sides, rounds, warmup=1, device=world.device, flush=False)
    short, long = ([s / shape[1] for s in seconds[shape]] for shape in (first, longest))
    again = [s / sizes[0] for s in seconds["again"]]
    rate = ratio(short, long, _noise(short, again, long))
    facts = {longest: {f"of_the_rate_at_{sizes[0]:,}": str(rate)}}
    return [
        results.add(
            "scaling", f"rows of {shape[1]:,}, documents of {shape[0]:,}", seconds[shape],
            dtype=dtype, shapes={"parameters": config.n_params()},
            real_tokens_per_s=round(shape[1] / quartiles(seconds[shape])[1]),
            **facts.get(shape, {}),
        )
        for shape in shapes
    ]  # fmt: skip


def ranks(b) -> None:
    """One process with all cores, and as many processes as cores with one each, on the same rows,
    in turns. The processes are started once, outside the time."""
    from tests.ranks import Pool

    n = max(2, torch.get_num_threads())
    rounds, n_steps = (2, 2) if b.given.quick else (4, 4)
    found: dict[int, list[float]] = {1: [], n: []}
    again: list[float] = []
    with Pool(n) as pool:
        for _ in range(rounds):
            for size, seconds in (*found.items(), (n, again)):
                given = (b.config, (b.tokens // 8, b.tokens, n), n // size, n_steps)
                seconds += max(pool(size, steps, *given), key=sum)
    facts = {1: {}, n: {SHARE: str(ratio(found[1], found[n], again))}}
    lines = [
        b.results.add(
            "scaling", f"processes x threads: {size} x {n // size}", found[size],
            dtype=torch.float32, **facts[size],
            shapes={"parameters": b.config.n_params(), "tokens": n * b.tokens},
        )
        for size in found
    ]  # fmt: skip
    print("\nProcesses and threads on the same cores, the same step:")
    print(table([shown(line) for line in lines]), flush=True)


def steps(world: World, config: ModelConfig, shape, threads: int, n_steps: int) -> list[float]:
    """Seconds of each step on this rank, after one that does not count."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as start() does in a run
    ours = side(world, config, *shape, dtype=torch.float32)
    return interleaved({"ours": ours}, n_steps, warmup=1)["ours"]
