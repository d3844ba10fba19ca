"""What a plan needs to know of the GPUs that it is made for: of --hardware, or of this machine."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nanomed.config import InputError, Run, nearest
from nanomed.distributed import World, from_all
from nanomed.processes import rank_from_env
from nanomed.run.log import PEAK_FLOPS
from nanomed.stages.memory import GIB

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
    host: float = math.inf  # GiB of the host's memory that are free

    @property
    def n_nodes(self) -> int:
        return max(1, self.n_gpus // self.per_node)


# GiB, FLOP/s, GB/s in each direction: NVLink, or PCIe (32 GB/s: generation 4; 64: 5)
KINDS = {
    "A100-40G": (39.5, PEAK_FLOPS["A100"], 300),
    "A100-80G": (79.1, PEAK_FLOPS["A100"], 300),
    "A100-40G-PCIe": (39.5, PEAK_FLOPS["A100"], 32),
    "A100-80G-PCIe": (79.1, PEAK_FLOPS["A100"], 32),
    "A800": (79.1, PEAK_FLOPS["A800"], 200),
    "H100": (79.1, PEAK_FLOPS["H100"], 450),
    "H100-PCIe": (79.1, PEAK_FLOPS["H100 PCIe"], 64),
    "H800": (79.1, PEAK_FLOPS["H800"], 200),
    "H20": (95.6, PEAK_FLOPS["H20"], 450),
    "H200": (139.7, PEAK_FLOPS["H200"], 450),
    "4090": (23.5, PEAK_FLOPS["4090"], 32),
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
    n, (gib, flops, *links) = int(number), values
    if n > PER_NODE and n % PER_NODE:
        raise InputError(f"--hardware {text}: over {PER_NODE} GPUs must be nodes of {PER_NODE}")
    return Hardware(n, gib, flops, *(link * 1e9 for link in links))


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        gib, tflops, *links = (float(part) for part in text.split(","))
    except ValueError:
        return None
    values = gib, tflops * 1e12, *links
    return values if len(links) in (1, 2) and all(value > 0 for value in values) else None


# ---------------------------------------------------------------- this machine


def this_machine(c: Run, world: World) -> Hardware:
    """What link.py decides by: the least memory that a GPU has, and how many of them a node has.
    A CPU's memory is not predicted: it counts as none."""
    rank, _, local_rank, n_local = rank_from_env()
    gib, host = 0.0, math.inf
    if world.device.type == "cuda":
        gib = torch.cuda.get_device_properties(world.device).total_memory / GIB
        host = host_room() / GIB
    ranks = from_all((gib, n_local, rank % n_local == local_rank))
    even = all(neighbours and n == n_local for _, n, neighbours in ranks)
    if c.nodes_share == "replicate" and not even:
        raise InputError(
            "--nodes_share replicate: each node needs as many processes as the others, with ranks "
            "that follow one another (Slurm: --distribution=block); or use --nodes_share shard"
        )
    per_node = n_local if even else world.size
    return Hardware(world.size, min(ranks)[0], flops=1, link=1, per_node=per_node, host=host)


GROUPS = {  # of processes, by the version of Linux's control groups: (folder, limit, used)
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "": ("/sys/fs/cgroup", "memory.max", "memory.current"),
}


def host_room(root: Path = Path("/")) -> float:
    """Bytes of the host's memory that this process may still take: what Linux calls available, and
    no more than a container or job leaves. Files that only wait to be read again count as free."""
    try:
        lines = (root / "proc/meminfo").read_text("utf-8").splitlines()
        own = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return float("inf")
    room = next(1024.0 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    for line in own:
        _, kinds, path = line.split(":", 2)
        for kind in set(kinds.split(",")) & set(GROUPS):
            home, limit, used = GROUPS[kind]
            group = Path(path.strip("/"))
            for folder in (root / home[1:] / part for part in (group, *group.parents)):
                room = min(room, _left(folder, limit, used))
    return room


def _left(folder: Path, limit: str, used: str) -> float:
    try:
        most, now = (int((folder / name).read_text("utf-8")) for name in (limit, used))
        lines = (folder / "memory.stat").read_text("utf-8").splitlines()
        stat = dict(line.split() for line in lines)
    except (OSError, ValueError):  # "max", or of another container
        return float("inf")
    return most - now + int(stat.get("inactive_file", 0))
