"""How much of the host's memory a run may take, for --optimizer split_host."""

from pathlib import Path

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
