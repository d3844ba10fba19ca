"""Processes, sharding and sums: everything nanomed asks of torch.distributed, in plain sight."""

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record

from nanomed import meeting
from nanomed.config import InputError
from nanomed.meeting import PATIENCE, PATIENCE_GPU
from nanomed.processes import end_with_torchrun, n_cores, rank_from_env
from nanomed.watchdog import LIMIT, Watchdog


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # None for a process alone
    launch: tuple[str, str] = ("-", "-")  # names of the launch and of the attempt: meeting.place()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(asked: str) -> torch.device:
    """`auto` is the GPU if there is one. A GPU that torch cannot use is an error, not a CPU run,
    unless CUDA_VISIBLE_DEVICES says that no GPU is to be seen."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    if asked == "auto":
        is_seen = torch.cuda.is_available() or os.path.exists("/proc/driver/nvidia/version")
        asked = "cuda" if is_seen and visible not in ("", "-1") else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) cannot use "
            f"this machine's GPU; NVIDIA driver: {_driver()}; CUDA_VISIBLE_DEVICES: "
            f"{visible or 'empty'}. Install the torch build that fits the driver (README, 'Which "
            "torch'), or ask for the CPU with --device cpu."
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
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip()
    except OSError:
        return "none found"


def launch(main: Callable[[], None]) -> None:
    """Runs a script's main and ends the process. Bad input and a disk that refuses are one line on
    the screen; all else is a traceback, and `record` puts it into torchrun's closing table too."""
    sys.stdout.reconfigure(errors="replace")  # of what the terminal's encoding lacks, "?"
    end_with_torchrun()
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its old name
        # Every packed row has another length: without it what lies between two of them is lost.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    code = 1
    with suppress(OSError):  # of a screen that is gone: RunFolder.print
        try:
            record(main)()
            code = 0
        except SystemExit as ending:
            code = ending.code or 0
        except KeyboardInterrupt as ending:  # Ctrl-C, with what to do then if somebody knows better
            code = 128 + signal.SIGINT
            if rank_from_env()[0] == 0:
                words = str(ending) or "what is finished is kept; the same command goes on"
                print(f"\nended by Ctrl-C; {words}", file=sys.stderr)
        except Exception as error:
            if words := _refusal(error):
                meeting.tell_torchrun(words)
                if rank_from_env()[2] > 0 and not hasattr(error, "is_first"):
                    time.sleep(5)  # this machine's first rank says the same first, and ends us
                print(words, file=sys.stderr)
            else:
                traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    # All is written. Python's own teardown of torch's threads was seen to abort once in some
    # hundred runs, and torchrun would then call a finished run a failed one; after an error it
    # would wait for what NCCL has begun and never ends.
    os._exit(code)


# What a disk may refuse at any place: read-only, not permitted, full.
DISK = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT}


def _refusal(error: Exception) -> str:
    """The line that says all, or nothing if it takes a traceback."""
    if isinstance(error, OSError) and error.errno in DISK and error.filename:
        return f"error: {error.filename}: {error.strerror}"
    return f"error: {error}" if isinstance(error, InputError) else ""


@contextmanager
def start(device: torch.device):
    """Joins the process group and yields the World. Tensors on a GPU are exchanged
    through NCCL, all else, objects too, through gloo.

    If several ranks fail, the first raises its error and the others SystemExit."""
    rank, size, _, local_size = rank_from_env()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # More threads than cores would only wait for each other. torchrun sets the variable to 1
        # for several processes, so there it says nothing of what the user wants.
        most = max(1, n_cores() // local_size)
        is_chosen = local_size == 1 and "OMP_NUM_THREADS" in os.environ
        torch.set_num_threads(min(torch.get_num_threads(), most) if is_chosen else most)
        keep_freed_memory()
    store, named = meeting.place(rank, size)
    _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, size, store)
    ear = meeting.Ear(store, rank, size)
    failed, first = False, LIMIT if device.type == "cuda" else PATIENCE.total_seconds()
    try:
        with ear, Watchdog(store, rank, size, first):
            yield World(rank, size, device, init_device_mesh(device.type, (size,)), named)
    except KeyboardInterrupt:
        failed = True
        raise
    except Exception as error:
        failed = True
        if ear.another_failed_before(error):
            raise SystemExit(1) from None
        error.is_first = True
        raise
    finally:
        # NCCL would first finish what it has begun: if this rank fails alone, the others never do
        # their part, and the error would be seen after PATIENCE.
        if not (failed and device.type == "cuda"):
            dist.destroy_process_group()


def _join(backend: str, rank: int, size: int, store: dist.Store) -> None:
    group = dict(rank=rank, world_size=size, store=store, timeout=PATIENCE_GPU)
    dist.init_process_group(backend, **group)
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(PATIENCE)


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


@dataclass(frozen=True)
class Sharing:
    """Who holds what, and when gradients are summed over the ranks."""

    copies: int = 1  # of the model; each is sharded over as many ranks, which are neighbours
    once: bool = False  # a step, until when each rank has them whole; else after each row


def shard(
    model: nn.Module, world: World, compute_dtype: torch.dtype, sharing: Sharing | None = None
) -> nn.Module:
    """FSDP2: parameters, gradients and optimizer state live sharded in float32; each unit is
    gathered in compute_dtype around its forward and backward.

    The root owns no parameter: a root that does stays gathered after a forward without backward,
    and an optimizer or a load then silently works on the wrong copy.

    One process in float32 has nothing to gather, to cast or to sum: its model is left as it is.
    """
    if world.size == 1 and compute_dtype == torch.float32:
        return model
    # Here, because it takes as long to import as torch, and most commands never shard.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model.sharing = sharing = sharing or Sharing()
    mesh = world.mesh if sharing.copies == 1 else mesh_of(world.device.type, sharing)
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in (model.embed_tokens, *model.layers, model.norm, model.lm_head, model):
        # Backward begins with what forward ends with: it is gathered once for both.
        keeps = unit in (model.layers[-1], model.norm, model.lm_head)
        fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=not keeps)
        if keeps:
            unit.register_forward_hook(_reshard_without_backward)
        # fit() divides the loss by the trained tokens of the whole step, so FSDP must not divide
        # gradients: its divisor is 1. It must also reduce by a plain sum, because gloo cannot
        # divide while it reduces. For one process FSDP would copy each gradient to divide it by 1.
        if world.size > 1:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    model.embed_tokens.set_unshard_in_backward(False)  # its gradient needs the ids alone
    return model


def sum_in_backward(model: nn.Module, last: bool) -> None:
    """Whether the next backward, a step's `last` or not, sums gradients over the ranks. Copies wait
    for the last one in any case: what they have to add up is sharded, and takes no more room."""
    if hasattr(model, "sharing"):  # shard() has set it
        model.set_requires_gradient_sync(last or not model.sharing.once)
        model.set_requires_all_reduce(last)


def _reshard_without_backward(unit: nn.Module, *_) -> None:
    if not torch.is_grad_enabled():
        unit.reshard()


def host_group() -> dist.ProcessGroup:
    """All ranks, joined by a gloo group of its own: another thread may exchange there while this
    one trains. Whoever is early there waits for the slowest disk; a rank that is gone is noticed at
    once, by its closed connection. All ranks call it."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def mesh_of(device_type: str, sharing: Sharing) -> DeviceMesh:
    """All ranks, by copies and by the shards of one. All ranks call it."""
    n, size = sharing.copies, dist.get_world_size()
    if n == 1:
        return init_device_mesh(device_type, (size,))
    return init_device_mesh(device_type, (n, size // n), mesh_dim_names=("copy", "shard"))


def is_sharded(param: Tensor) -> bool:
    """Whether it is a DTensor, which shard() alone makes. Its class would have to be imported."""
    return hasattr(param, "placements")


def fill(param: Tensor, full: Tensor) -> None:
    """Copies this rank's rows of the whole tensor `full` into a parameter, sharded or not."""
    with torch.no_grad():
        local(param).copy_(full[local_rows(param)])


def local_rows(param: Tensor) -> slice:
    """The rows (of dimension 0) of a parameter, sharded or not, that this rank holds."""
    if not is_sharded(param):
        return slice(0, len(param))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    return slice(offset[0], offset[0] + shape[0])


def local(param: Tensor) -> Tensor:
    """This rank's part."""
    return param.to_local() if is_sharded(param) else param


def full(param: Tensor) -> Tensor:
    """The whole tensor; every rank must call it."""
    return param.full_tensor() if is_sharded(param) else param


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
    is another way between the same ranks: see host_group()."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def from_main_tensor(values: Tensor) -> Tensor:
    """Rank 0's values, on every rank; shape and dtype are the same everywhere. Without processes
    they are the values."""
    if dist.is_initialized():
        dist.broadcast(values, src=0)
    return values
