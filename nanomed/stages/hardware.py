"""--hardware: what a plan needs to know of the GPUs that it is made for."""

import re
from dataclasses import dataclass

from nanomed.config import InputError, nearest

PER_NODE = 8  # GPUs of one machine, where a plan is for more
# Of the links' data sheets this much is assumed to be reached: a ring of NCCL over 8 A100 was seen
# near 230 of 300 GB/s by others.
REACHED = 0.75


@dataclass(frozen=True)
class Hardware:
    n_gpus: int
    gib: float  # that torch sees on each
    flops: float  # dense bf16, of one, by the data sheet
    link: float  # bytes/s that one sends to the others of its node, by the data sheet
    between: float = 25e9  # bytes/s that it has to itself between nodes; 25 GB/s: a 200 Gb/s card
    per_node: int = PER_NODE

    @property
    def n_nodes(self) -> int:
        return max(1, self.n_gpus // self.per_node)


# GiB, TFLOP/s, GB/s in each direction: NVLink, or PCIe (32 GB/s: generation 4; 64: 5)
KINDS = {
    "A100-40G": (39.5, 312, 300),
    "A100-80G": (79.1, 312, 300),
    "A100-40G-PCIe": (39.5, 312, 32),
    "A100-80G-PCIe": (79.1, 312, 32),
    "A800": (79.1, 312, 200),
    "H100": (79.1, 989, 450),
    "H100-PCIe": (79.1, 756, 64),
    "H800": (79.1, 989, 200),
    "H20": (95.6, 148, 450),
    "H200": (139.7, 989, 450),
    "4090": (23.5, 165, 32),
}
KINDS |= {"H100-80G": KINDS["H100"], "H200-141G": KINDS["H200"]}


def parse_hardware(text: str) -> Hardware:
    """Of "8xA100-40G", of "8x80,989,450" (GiB, TFLOP/s, GB/s to the others of a node) or with a
    fourth number, GB/s between nodes. Raises InputError."""
    number, _, kind = text.partition("x")
    values = KINDS.get(kind) or _numbers(kind)
    if not re.fullmatch(r"[1-9]\d*", number) or values is None:
        raise InputError(
            f"--hardware is {text!r}; it must be like 8xA100-40G, of {', '.join(KINDS)}; or like "
            "8x80,989,450: GiB, TFLOP/s, GB/s between GPUs (and a fourth: GB/s between nodes)"
            + nearest(kind or text, KINDS)
        )
    n, (gib, tflops, *links) = int(number), values
    if n > PER_NODE and n % PER_NODE:
        raise InputError(f"--hardware {text}: over {PER_NODE} GPUs must be nodes of {PER_NODE}")
    return Hardware(n, gib, tflops * 1e12, *(link * 1e9 for link in links))


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        return None
    return values if len(values) in (3, 4) and all(value > 0 for value in values) else None
