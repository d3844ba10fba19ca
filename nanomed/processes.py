"""What a process knows of the others without torch: its rank, and the parent that it ends with.
Building and tokenising data need no more."""

import os
import sys
import threading
import time


def rank_from_env() -> tuple[int, int, int, int]:
    """(rank, world size, rank on this node, processes on this node), as torchrun sets them;
    one process if it was not used."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)
    return tuple(int(os.environ.get(name, default)) for name, default in names)


def n_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def end_with_torchrun() -> None:
    """Ends this process soon after the torchrun that has started it, if one has. A torchrun that is
    killed by -9 leaves its workers running: without this they go on training, and writing, beside
    those of the next launch."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if adopted_by(parent):  # torchrun was killed while this process imported torch
        print("error: the torchrun that started this process is gone", file=sys.stderr)
        os._exit(1)
    end_with(parent)


def end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may be killed without a word."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def adopted_by(parent: int) -> bool:
    """Whether this is who takes care of orphans, and no torchrun. torchrun is a Python and gives
    each worker a session, to which a wrapper between them (numactl, nsys, a shell) belongs."""
    try:
        if os.getsid(parent) == os.getsid(0):
            return False
        return "python" not in os.path.basename(os.readlink(f"/proc/{parent}/exe"))
    except PermissionError:  # another user's
        return parent == 1
    except OSError:
        return False
