"""How nanomed's step grows: with the documents' length, the row's, and the number of processes;
and what FSDP2 costs where there is nothing to shard."""

import torch

from bench.measure import Results, interleaved, ratio, shown, table
from bench.ours import Examples, Ours, settings
from nanomed.config import CPT, ModelConfig
from nanomed.distributed import World

SHARE = "of_one_process"


def side(world: World, config: ModelConfig, document: int, row: int, n_rows: int = 1, **given):
    """A step of n_rows rows in all, each full of documents of the same length."""
    n = row // document * n_rows
    data = Examples.of_lengths([document] * n * 4, config.vocab_size)
    return Ours(world, config, data, settings(CPT, n, row), **given)


def fsdp(b) -> None:
    """Both in float32: only FSDP2 casts the weights for a computation in bf16."""
    given = dict(document=b.tokens // 8, row=b.tokens, dtype=torch.float32)
    names = {"FSDP2 on one process": True, "FSDP2, again": True, "unsharded loop": False}
    sides = {n: side(b.world, b.config, sharded=s, **given) for n, s in names.items()}
    seconds = interleaved(sides, b.rounds)
    first, again, plain = seconds.values()
    cost = ratio(first, plain, _noise(first, again, plain))
    facts = {"unsharded loop": {"FSDP2_takes": str(cost)}}
    lines = [
        b.results.add("step", f"one process: {n}", seconds[n], dtype=torch.float32,
                      shapes={"parameters": b.config.n_params(), "tokens": b.tokens},
                      **facts.get(n, {}))
        for n in names if n != "FSDP2, again"
    ]  # fmt: skip
    print("\nOne process, the same loop with and without FSDP2:")
    print(table([shown(line) for line in lines]), flush=True)


def _noise(first: list[float], again: list[float], plain: list[float]) -> list[float]:
    """`again` over `first`, as samples beside `plain`, which the ratio divides by."""
    return [p * a / f for f, a, p in zip(first, again, plain, strict=True)]


def rows(b) -> None:
    """Step time against the documents' length in rows of the same size, and the other way round."""
    lengths = [b.tokens // 32, b.tokens // 8, b.tokens // 2, b.tokens]
    sizes = [b.tokens // 4, b.tokens, 4 * b.tokens]
    shapes = dict.fromkeys(
        [*((n, b.tokens) for n in lengths), *((b.tokens // 8, n) for n in sizes)]
    )
    sides = {shape: side(b.world, b.config, *shape, dtype=b.dtype) for shape in shapes}
    seconds = interleaved(sides, max(3, b.rounds // 3), warmup=1)
    print("\nThe step against the documents' length and the row's:")
    print(table([shown(_line(b.results, b.config, b.dtype, s, seconds[s])) for s in shapes]))


def _line(results: Results, config: ModelConfig, dtype: torch.dtype, shape, seconds) -> dict:
    document, row = shape
    rate = row * len(seconds) / sum(seconds)
    return results.add(
        "step", "nanomed", seconds, dtype=dtype, real_tokens_per_s=round(rate),
        shapes={"parameters": config.n_params(), "document": document, "row": row},
    )  # fmt: skip


def ranks(b) -> None:
    """One process with all cores, and as many processes as cores with one each, on the same rows,
    in turns. The processes are started once, outside the time."""
    from tests.ranks import Pool

    n = max(2, torch.get_num_threads())
    rounds = 2 if b.given.quick else 4
    found: dict[int, list[float]] = {1: [], n: []}
    with Pool(n) as pool:
        for _ in range(rounds):
            for size in found:
                given = (b.config, b.tokens // 8, b.tokens, n, b.given.dtype, n // size)
                found[size] += max(pool(size, steps, *given), key=sum)
    paired = ratio(found[1], found[n], found[n]).median
    facts = {1: {}, n: {SHARE: f"{paired:.2f}"}}
    lines = [
        b.results.add(
            "step", f"{size} x {n // size} threads", found[size], dtype=b.dtype,
            shapes={"parameters": b.config.n_params(), "tokens": n * b.tokens}, **facts[size],
        )
        for size in found
    ]  # fmt: skip
    print("\nProcesses and threads on the same cores, the same step:")
    print(table([shown(line) for line in lines]), flush=True)


def steps(
    world: World,
    config: ModelConfig,
    document: int,
    row: int,
    n_rows: int,
    dtype: str,
    threads: int,
) -> list[float]:
    """Seconds of a few steps on this rank, after two that do not count."""
    torch.set_num_threads(threads)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    ours = side(world, config, document, row, n_rows, dtype=kind)
    return interleaved({"ours": ours}, rounds=4)["ours"]
