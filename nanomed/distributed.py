"""Processes, sharding and sums: everything nanomed asks of torch.distributed, in plain sight."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanomed.config import InputError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # of a process alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_from_env() -> tuple[int, int, int, int]:
    """(rank, world size, rank on this node, processes on this node), as torchrun sets them;
    one process if it was not used."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def pick_device(asked: str) -> torch.device:
    """`auto` is the GPU if there is one. A GPU that torch cannot use is an error, not a CPU run."""
    if asked == "auto":
        gpu_seen = os.path.exists("/proc/driver/nvidia/version")
        asked = "cuda" if torch.cuda.is_available() or gpu_seen else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) cannot use "
            f"this machine's GPU; NVIDIA driver: {_driver()}. Install the torch build that fits "
            "the driver (README, 'Which torch'), or ask for the CPU with --device cpu."
        )
    if asked != "cuda":
        return torch.device("cpu")
    _, _, local_rank, local_size = rank_from_env()
    if local_size > torch.cuda.device_count():
        raise InputError(
            f"{local_size} processes on a machine where torch sees {torch.cuda.device_count()} "
            "GPUs; each process needs one of its own: lower --nproc_per_node"
        )
    return torch.device("cuda", local_rank)


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return "none found"


def launch(main: Callable[[], None]) -> None:
    """Runs a script's main. Bad input is one line on the screen; anything else is a traceback, and
    `record` puts it into torchrun's closing table too."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    try:
        record(main)()
    except InputError as error:
        if rank_from_env()[0] > 0:  # the same message from rank 0 comes first and ends the others
            time.sleep(2)
        sys.exit(f"error: {error}")
    # All is written and the group is left. Python's own teardown of torch's threads was seen to
    # abort once in some hundred runs, and torchrun would then call a finished run a failed one.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def end_with(parent: int) -> None:
    """Ends this process soon after its parent. A torchrun that is killed by -9 leaves its workers
    running: without this they go on training, and writing, beside those of the next launch."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# How long a rank waits for the others, that is, for the slowest disk among them: torch's 10 minutes
# for NCCL are less than a checkpoint takes on some. A rank that is gone is noticed by torchrun.
PATIENCE = timedelta(hours=2)


@contextmanager
def start(device: torch.device):
    """Joins the process group and yields the World. Tensors on a GPU go through NCCL; what is in
    host memory, objects included, through gloo, on whatever device the model is."""
    rank, size, _, local_size = rank_from_env()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # More threads than cores would only wait for each other. torchrun sets the variable to 1
        # for several processes, so there it says nothing of what the user wants.
        most = max(1, len(os.sched_getaffinity(0)) // local_size)
        is_chosen = local_size == 1 and "OMP_NUM_THREADS" in os.environ
        torch.set_num_threads(min(torch.get_num_threads(), most) if is_chosen else most)
        keep_freed_memory()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=rank, world_size=size, store=_meeting_place(), timeout=PATIENCE
    )
    failed = False
    try:
        yield World(rank, size, device, init_device_mesh(device.type, (size,)))
    except Exception:
        failed = True
        raise
    finally:
        # NCCL would first finish what it has begun: if this rank fails alone, the others never do
        # their part, and the error would be seen after PATIENCE.
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()


def keep_freed_memory() -> bool:
    """Has glibc keep what tensors free, and says whether it will. It gives each block of more than
    32 MiB back to the kernel at once, and every page of the next one is a fault: a quarter of the
    time of a step over a row of 65,536 tokens. The price: what was freed stays with the process,
    and the gaps of the heap cost up to a third more memory. Other C libraries have no such setting,
    and an old glibc refuses so large a threshold."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    if not mallopt or not mallopt(m_mmap_threshold, 2**31 - 1):
        return False  # the second alone would keep glibc from raising the first, and be far slower
    return bool(mallopt(m_trim_threshold, 2**31 - 1))


def alone_or_start(device: torch.device):
    """start() if there are several processes. One alone needs no group, and opens no socket."""
    if rank_from_env()[1] > 1:
        return start(device)
    if device.type == "cpu":
        keep_freed_memory()
    return nullcontext(World(0, 1, device))


def _meeting_place() -> dist.Store:
    """Where processes find one another. A group that torchrun has restarted gets a part of it to
    itself: else it would find the addresses of the processes that are gone (torch 2.13, gloo)."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    store, *_ = next(rendezvous("env://"))
    return dist.PrefixStore(f"attempt {restart_count()}", store)


def restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def shard(model: nn.Module, world: World, compute_dtype: torch.dtype) -> nn.Module:
    """FSDP2: parameters, gradients and optimizer state live sharded in float32; each unit is
    gathered in compute_dtype around its forward and backward.

    The root owns no parameter: a root that does stays gathered after a forward without backward,
    and an optimizer or a load then silently works on the wrong copy.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in (model.embed_tokens, *model.layers, model.norm, model.lm_head, model):
        fully_shard(unit, mesh=world.mesh, mp_policy=precision)
        # Gradients are plain sums: fit() divides by the trained tokens of the whole step. gloo
        # cannot divide within a reduction, so without the second line the first raises there. Alone
        # there is nothing to divide by, and FSDP would make a copy of each gradient to divide by 1.
        if world.size > 1:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def host_mesh() -> DeviceMesh:
    """All ranks, for tensors in host memory, joined by a gloo group of its own: another thread may
    exchange there while this one trains. Whoever is early there waits for the slowest disk; a rank
    that is gone is noticed at once, by its closed connection. All ranks call it."""
    return DeviceMesh.from_group(dist.new_group(backend="gloo", timeout=timedelta(days=1)), "cpu")


def fill(param: Tensor, full: Tensor) -> None:
    """Copies this rank's rows of the whole tensor `full` into a parameter, sharded or not."""
    with torch.no_grad():
        if isinstance(param, DTensor):
            param.to_local().copy_(full[local_rows(param)])
        else:
            param.copy_(full)


def local_rows(param: DTensor) -> slice:
    """The rows (of dimension 0) of a sharded parameter that this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return slice(offset[0], offset[0] + shape[0])


def local(param: Tensor) -> Tensor:
    """This rank's part."""
    return param.to_local() if isinstance(param, DTensor) else param


def full(param: Tensor) -> Tensor:
    """The whole tensor; every rank must call it."""
    return param.full_tensor() if isinstance(param, DTensor) else param


def sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def from_main(value):
    """Rank 0's value, on every rank; any picklable object. Without processes it is the value."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's value, by rank; any picklable object. Without processes there is one. `group`
    is another way between the same ranks: see host_mesh()."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def from_main_tensor(values: Tensor) -> Tensor:
    """Rank 0's values, on every rank; shape and dtype are the same everywhere."""
    dist.broadcast(values, src=0)
    return values
