"""The full AquilaMed step on one GPU: CPT, SFT and DPO, in its parts, against what the GPU can do.

    python -m bench.step_gpu [--tokens 4096 8192] [--only cpt scaling fsdp] [--optimizer split]
    python -m bench.step_gpu --device cpu --quick          the same code with a tiny model

Weights are initialised on the device from a seed. Documents are random tokens: CPT's are all as
long (4,096; 1,024 and 256 at the first size of a row), SFT's have the lengths of real medical chats
in a fixed order (bench/cases.py), a pair is two such chats. How the step grows, up to rows of
65,536 tokens, and what FSDP2 costs is measured with AquilaMed cut to four layers.
"""

import dataclasses
import gc

import torch

import kernels
from bench.cases import documents
from bench.measure import show
from bench.ours import PARTS, Ours, in_parts, model_of, settings
from bench.setting import Setting, arguments, flags
from bench.step_scaling import ROWS, fsdp, growth
from kernels.chunk import even
from nanomed.config import CPT, DPO, SFT, ModelConfig, Run
from nanomed.distributed import start
from nanomed.model.recompute import set_recompute
from nanomed.run.log import peak_flops
from nanomed.stages import link, memory
from nanomed.training.alone import split_weights
from nanomed.training.optim import adamw
from tests.data import Examples

CONVENTION = (
    "MFU counts 6 FLOPs per matmul weight and token (the embedding is a lookup, the head a matmul) "
    "and 6 L D S per token of a document of S tokens, over {peak:.0f} TFLOP/s ({name}, data sheet, "
    "dense bf16). HFU adds the matmuls that are computed again: logits of all the head's chunks "
    "but the last, and all layers under recompute full. Tokens are real ones; there is no padding"
)
GIB, N_ROWS = memory.GIB, 8  # rows of a step: gradients are accumulated, as in a run

TABLES = ("cpt", "sft", "dpo", "scaling", "fsdp")


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="some tables")
    parser.add_argument("--kernels", default="auto", choices=kernels.CHOICES)
    ways = ("fsdp", "split", "split_bf16", "split_host")
    parser.add_argument("--optimizer", default="fsdp", choices=ways)
    s, given = arguments(parser, gpu=[8192, 4096, 16_384, 32_768], cpu=[128])
    s.dtype, s.rounds = torch.bfloat16, 2 if given.quick else 5
    kernels.use(given.kernels)
    with start(s.device) as s.world:
        version = kernels.in_force(s.device, s.dtype, s.config.head_size)
        print(f"{s.config.n_params():,} parameters on {s.device}, float32 masters, ops: {version}")
        if set(given.only) - {"scaling", "fsdp"}:
            steps(s, given)
        s.config = dataclasses.replace(s.config, n_layers=min(4, s.config.n_layers))
        emptied(s)
        if "scaling" in given.only:
            growth(s, *((4096, ROWS, (256, 1024)) if s.on_gpu else (32, (64, 256), (8,))))
            emptied(s)
        if "fsdp" in given.only:
            s.rounds *= 2
            fsdp(s, *((4096, 8192) if s.on_gpu else (32, 128)))


def emptied(s: Setting) -> None:
    """Frees the parameters and moments of the part before, which refer to one another."""
    gc.collect()
    if s.on_gpu:
        torch.cuda.empty_cache()


def steps(s: Setting, given) -> None:
    """One model and one optimizer for all, so that the weights are initialised once."""
    model = optimizer = None
    sizes, longest = given.tokens, s.config.max_seq_len
    plan = [("cpt", CPT, sizes, longest)]
    plan += [("cpt", CPT, sizes[:1], length) for length in (1024, 256)]  # documents, same row
    plan += [("sft", SFT, sizes, 2048), ("dpo", DPO, sizes, 2048)]
    for stage, cls, rows, document in plan:
        if stage not in given.only:
            continue
        for c in policies(s, cls, rows, given):
            if model is None:
                model = model_of(s.world, s.config, s.dtype, given.optimizer == "fsdp")
                if given.optimizer != "fsdp":
                    split_weights(model, given.optimizer)
                optimizer = adamw(model, 0.1)
            set_recompute(model, c.recompute)
            data = examples(stage, c.micro_tokens, s.config, document)
            c = dataclasses.replace(c, batch_size=len(data))
            print(f"{stage}, rows of {c.micro_tokens:,}, recompute {c.recompute}", flush=True)
            ours = Ours(s.world, s.config, data, c, s.dtype, model, optimizer)
            show([measure(s, stage, ours, 2 if given.quick else 3)])


def policies(s: Setting, cls: type[Run], sizes: list[int], given) -> list[Run]:
    """For each size of a row the cheapest recompute policy that memory.py says fits."""
    limit = float("inf")
    if s.on_gpu:
        limit = torch.cuda.get_device_properties(s.device).total_memory / GIB
    found = []
    for size in sizes:
        for recompute in link.policies(s.config):
            c = settings(cls, 1, size, recompute)
            c = dataclasses.replace(c, optimizer=given.optimizer, kernels=given.kernels)
            total = sum(memory.memory(s.config, c, 1).values())
            if total <= limit:
                found.append(c)
                break
        else:
            print(f"{cls.stage}: rows of {size:,} tokens need {total:.1f} GiB of {limit:.1f}")
    return found


def examples(stage: str, row: int, config: ModelConfig, longest: int) -> Examples:
    """N_ROWS rows full of random tokens: CPT's of documents all as long, the others' of chats' and
    pairs' lengths, which are `longest` at most; a pair is a chat's length twice."""
    segments = 2 if stage == "dpo" else 1
    longest, total, lengths = min(longest, row // segments), row * N_ROWS // segments, []
    for n in documents(8 * total, "chats"):
        n = min(longest if stage == "cpt" else n, longest, total - sum(lengths))
        if n < 2:
            break
        lengths.append(n)
    return Examples.of_lengths(lengths, config.vocab_size, segments)


def measure(s: Setting, stage: str, ours: Ours, rounds: int) -> dict:
    """Some steps in their parts, after one that does not count."""
    packed = ours.loader.step(0)
    longest = max(len(row.tokens) for row in packed)
    ours()
    if s.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = [in_parts(ours) for _ in range(rounds)]
    seconds = [sum(parts.values()) for parts in taken]
    parts = {f"{p}_ms": round(1000 * sum(t[p] for t in taken) / rounds, 1) for p in PARTS}
    lengths = [n for row in packed for n in row.cu_seqlens.diff().tolist()]
    c = dataclasses.replace(ours.c, micro_tokens=longest, seq_len=2)
    counted, executed = flops(s.config, lengths, c)
    peak, name = peak_flops(), torch.cuda.get_device_name() if s.on_gpu else ""
    rate = rounds / sum(seconds)
    predicted = memory.memory(s.config, c, s.world.size)
    return s.results.add(
        "step", f"{'AquilaMed' if s.on_gpu else 'tiny'} {stage.upper()}", seconds, dtype=s.dtype,
        convention=CONVENTION.format(peak=peak / 1e12, name=name) if peak else "",
        shapes={"row": longest, "rows": len(packed), "documents": len(lengths)},
        ops=kernels.in_force(s.device, s.dtype, s.config.head_size), recompute=c.recompute,
        optimizer=c.optimizer,
        real_tokens_per_s=round(sum(lengths) * rate), **parts,
        MFU=f"{counted * rate / peak:.1%}" if peak else None,
        HFU=f"{executed * rate / peak:.1%}" if peak else None,
        peak_GiB=round(torch.cuda.max_memory_allocated() / GIB, 2) if s.on_gpu else None,
        predicted_GiB=round(sum(predicted.values()) - memory.RESERVE, 2),
    )  # fmt: skip


def flops(config: ModelConfig, lengths: list[int], c: Run) -> tuple[float, float]:
    """(counted, executed) of one step over documents of these lengths."""
    step = link.Step(sum(lengths), sum(n * n for n in lengths))
    head = 2 * config.vocab_size * config.d_model * step.tokens  # its forward
    last = even(c.micro_tokens, memory.chunk(config, c))  # tokens of the last chunk
    again = head * (1 - last / c.micro_tokens)
    return step.flops(config), link.executed(config, c, step) + again


if __name__ == "__main__":
    main()
