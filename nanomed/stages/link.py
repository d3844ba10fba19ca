"""What GPUs exchange in a step, which bound rules, and the settings that get most out of a machine.

Every formula is a count. FSDP gathers each weight, in the dtype of the computation, for a row's
forward and again for its backward, and adds up float32 gradients over the GPUs after each row or
once a step. None of it depends on how long a row is: few long rows pass less over the link. Of n
GPUs that share a tensor one has 1/n of it; the rest comes, and goes, over the link.

Left out, and all of it makes a run slower: elementwise work, FSDP's copies inside a GPU, gaps
between launches, ranks that wait for the slowest. The link is taken to work while the GPU computes.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from nanomed.config import InputError, ModelConfig, Run
from nanomed.distributed import Sharing
from nanomed.model.recompute import by_layer
from nanomed.run.log import flops_of
from nanomed.stages import memory
from nanomed.stages.hardware import REACHED, Hardware

ROOM = 1.0  # GiB that advice and `auto` leave free: nothing was measured on several GPUs


def copies(c: Run, hw: Hardware) -> int:
    """Of the model: one for each node, or one over all GPUs."""
    return hw.n_nodes if c.nodes_share == "replicate" else 1


def gib(config: ModelConfig, c: Run, hw: Hardware) -> float:
    """Predicted on each GPU."""
    return sum(memory.memory(config, c, hw.n_gpus // copies(c, hw)).values())


def fits(config: ModelConfig, c: Run, hw: Hardware) -> bool:
    in_host = sum(memory.in_host(config, c).values()) if c.optimizer == "split_host" else 0
    return gib(config, c, hw) <= hw.gib - ROOM and in_host <= hw.host


def decided(config: ModelConfig, c: Run, hw: Hardware) -> Run:
    """The settings with `auto` of --optimizer, --nodes_share and --sum_gradients decided: of the
    ways that fit the one that exchanges least, else the one that takes least memory. On several
    GPUs --optimizer is fsdp, even where each of them is a node that holds a whole model. Raises
    InputError where it cannot be."""
    bf16 = c.dtype != "fp32"
    alone = hw.n_gpus == 1 and bf16
    if c.optimizer.startswith("split") and not alone:
        raise InputError(
            f"--optimizer {c.optimizer} is for one process that computes in bfloat16; here are "
            f"{hw.n_gpus}" + ("" if bf16 else " in float32 (--dtype bf16)")
        )
    optimizers = [c.optimizer]
    if c.optimizer == "auto":
        optimizers = ["split", "split_host"] if alone else ["fsdp"]
    nodes = ["replicate"] * (hw.n_nodes > 1) + ["shard"]
    nodes = nodes if c.nodes_share == "auto" else [c.nodes_share]
    sums = ["step", "row"] if c.sum_gradients == "auto" else [c.sum_gradients]
    ways = [
        dataclasses.replace(c, optimizer=o, nodes_share=n, sum_gradients=s)
        for o in optimizers
        for n in nodes
        for s in sums
    ]
    return next((way for way in ways if fits(config, way, hw)), ways[-1])


# ---------------------------------------------------------------- counting


@dataclass(frozen=True)
class Step:
    """One optimizer step: tokens of all GPUs, the sum of the squared lengths of their segments, and
    how many of the tokens are in both segments of a pair, which computes them once."""

    tokens: float
    squares: float
    shared: float = field(default=0.0, kw_only=True)

    def flops(self, config: ModelConfig) -> float:
        """Of forward and backward."""
        return flops_of(config, self.tokens - self.shared, self.squares)

    def rows(self, c: Run, hw: Hardware) -> int:
        """On each GPU, if they are full."""
        return max(1, math.ceil(self.tokens / (hw.n_gpus * c.micro_tokens)))


def sent(config: ModelConfig, c: Run, hw: Hardware, n_rows: int) -> tuple[float, float]:
    """Bytes that one GPU sends in a step of so many rows: (all of them, those to other nodes)."""
    n_copies = copies(c, hw)
    n = hw.n_gpus // n_copies  # that share one
    n_params = config.n_params()
    # Forward gathers all; for backward head, last norm and last layer are there, and the embedding
    # is not needed.
    again = (config.n_layers - 1) * memory.layer_params(config)
    gathered = memory.width(c) * (n_params + again) * n_rows
    summed = 4 * n_params * (1 if c.sum_gradients == "step" else n_rows)
    shared = (gathered + summed) * (n - 1) / n
    # A node gets what it lacks once, and its GPUs share the work.
    n_nodes = hw.n_nodes // n_copies
    far = (gathered + summed) * (n_nodes - 1) / n_nodes / hw.per_node
    # Copies add up their shards of the gradients, once a step: there and back.
    added = 2 * 4 * n_params / n * (n_copies - 1) / n_copies
    return shared + added, far + added


def executed(config: ModelConfig, c: Run, step: Step) -> float:
    """FLOPs of a step, what is computed again included."""
    counted = step.flops(config)
    head = 2 * config.vocab_size * config.d_model * (step.tokens - step.shared)
    layers = counted / 3 - head  # forward alone
    share = by_layer(c.recompute, config.n_layers).count("full") / config.n_layers
    return counted + share * layers


def seconds(config: ModelConfig, c: Run, hw: Hardware, step: Step) -> tuple[float, float]:
    """(of computing, of the link) for one step. The step takes at least the longer one."""
    computing = executed(config, c, step) / (hw.n_gpus * hw.flops * c.mfu)
    total, far = sent(config, c, hw, step.rows(c, hw))
    return computing, max((total - far) / (hw.link * REACHED), far / (hw.between * REACHED))


def rules(config: ModelConfig, c: Run, hw: Hardware, step: Step) -> str:
    """What bounds a step: the link, if it takes longer than computing; memory, if whole layers are
    computed twice to save it; else matmuls."""
    computing, link = seconds(config, c, hw, step)
    if link > computing:
        return "link"
    return "memory" if "full" in by_layer(c.recompute, config.n_layers) else "matmuls"


# ---------------------------------------------------------------- advice


def policies(config: ModelConfig) -> list[str]:
    """Of --recompute, the fastest first: as few layers in full as must be."""
    return ["none", "lean", *(f"full:{n}" for n in range(1, config.n_layers)), "full"]


def stays_on_the_gpu(config: ModelConfig, c: Run, hw: Hardware) -> str:
    """The fastest --recompute with which one GPU holds all that --optimizer split keeps; or ""."""
    ways = (dataclasses.replace(c, recompute=p, optimizer="split") for p in policies(config))
    return next((way.recompute for way in ways if fits(config, way, hw)), "")


def advice(config: ModelConfig, c: Run, hw: Hardware, step: Step) -> Run | None:
    """The settings of speed and memory, of those that fit, with which a step takes least; of equal
    ones that with the fewest and then the shortest rows. None if nothing fits."""
    least = 2 * c.seq_len if c.stage == "dpo" else c.seq_len
    most = max(least, 2 * step.tokens / hw.n_gpus)  # a longer row would only be emptier
    sizes = [least << k for k in range(20) if least << k <= most]
    nodes = ["shard", "replicate"] if hw.n_nodes > 1 else ["shard"]
    found = []
    for size, share, sums in ((t, n, s) for t in sizes for n in nodes for s in ("row", "step")):
        way = dataclasses.replace(c, micro_tokens=size, nodes_share=share, sum_gradients=sums)
        ways = (dataclasses.replace(way, recompute=policy) for policy in policies(config))
        if way := next((way for way in ways if fits(config, way, hw)), None):
            found.append(way)

    def cost(way: Run) -> tuple[float, int, int]:
        took = max(seconds(config, way, hw, step))
        return float(f"{took:.2g}"), step.rows(way, hw), way.micro_tokens

    return min(found, key=cost, default=None)


def flags(c: Run, hw: Hardware) -> str:
    more = f" --nodes_share {c.nodes_share}" if hw.n_nodes > 1 else ""
    more += " --optimizer split_host" if c.optimizer == "split_host" else ""
    return (
        f"--recompute {c.recompute} --micro_tokens {c.micro_tokens} "
        f"--sum_gradients {c.sum_gradients}{more}"
    )


def remedy(config: ModelConfig, c: Run, hw: Hardware, step: Step) -> str:
    best = advice(config, c, hw, step)
    if not best and hw.n_gpus == 1 and c.dtype != "fp32":
        best = advice(config, dataclasses.replace(c, optimizer="split_host"), hw, step)
    return f"{flags(best, hw)} fits" if best else "no --micro_tokens fits, more GPUs are needed"


def sharing_line(sharing: Sharing, n: int) -> str:
    """What n processes hold of the model."""
    kept = f"one model over all {n}"
    if sharing.copies > 1:
        kept = f"one model on each of {sharing.copies} nodes, over {n // sharing.copies}"
    when = "once a step" if sharing.once else "after each row"
    return f"sharing: {kept} processes; gradients are summed over them {when}"


def lines(config: ModelConfig, c: Run, hw: Hardware, step: Step) -> list[str]:
    """Of settings without `auto`: what passes over the link, which bound rules, and advice."""
    n_rows = step.rows(c, hw)
    total, far = sent(config, c, hw, n_rows)
    computing, link = seconds(config, c, hw, step)
    where, reached = "over PCIe or NVLink", f"{hw.link / 1e9:.0f} GB/s"
    if hw.n_nodes > 1:
        where += f", {far / 1e9:.1f} GB between nodes"
        reached += f" ({hw.between / 1e9:.0f} between nodes)"
    text, waits = ["sharing: none, one GPU holds the whole model"], ""
    if hw.n_gpus > 1:
        text = [
            sharing_line(Sharing(copies(c, hw), c.sum_gradients == "step"), hw.n_gpus),
            f"link: each GPU sends {(total - far) / 1e9:.1f} GB a step {where}, for {n_rows} rows "
            f"of {c.micro_tokens:,} tokens; a longer row sends no more",
        ]
        waits = f", and {link:.3g} s of the link at {REACHED:.0%} of {reached}"
    text.append(
        f"bound: {rules(config, c, hw, step)}: a step takes {computing:.3g} s of computing at "
        f"{c.mfu:.0%} of {hw.flops / 1e12:.0f} TFLOP/s{waits}"
    )
    if c.optimizer == "split_host":
        parts = memory.in_host(config, c)
        moved = next(iter(parts.values()))
        each = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
        text.append(
            f"host: {sum(parts.values()):.1f} GiB of its memory are needed: {each}; each step "
            f"moves {moved:.1f} GiB to the GPU and back, {moved * memory.GIB / 32e9:.1f} s or more "
            "over PCIe of generation 4, half of that over 5"
        )
    best = advice(config, c, hw, step)
    if best and gib(config, c, hw) <= hw.gib:
        faster = max(computing, link) / max(seconds(config, best, hw, step))
        text.append(
            f"advice: {flags(best, hw)}: {faster:.2f} times as fast by these bounds"
            if faster > 1.02
            else "advice: keep these settings; by these bounds none is faster"
        )
    return text
