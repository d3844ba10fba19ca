"""How every figure of bench/ is taken.

Interleaved samples, ratios with their spread, JSON lines that say on which machine and of which
code they were taken.

    samples = interleaved({"ours": f, "ours again": f, "theirs": g}, rounds=30, device=device)
    ratio(samples["theirs"], samples["ours"], samples["ours again"])  # how many times faster f is
    Results("bench/results/NAME.jsonl", device).add(kind, name, samples["ours"], ...)
"""

import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def interleaved(
    works: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    flush: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each work in each round, the works taking turns (A B A B ...), so that what slows
    the machine slows all of them.

    On CUDA the times are between events, and before each sample a buffer of 16 times the L2 cache
    is written: it empties the cache, and in the third of a millisecond that it takes the host gets
    ahead, so that a short kernel is not timed with its own launch. `flush=False` leaves it out,
    where work is long and memory short.
    """
    for work in works.values():
        for _ in range(warmup):
            work()
    on_gpu, buffer = "cuda" in str(device), torch.empty(0)
    if on_gpu and flush:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        buffer = torch.empty(16 * l2, dtype=torch.int8, device=device)
    taken: dict[str, list[tuple]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            buffer.zero_()
            start = now(on_gpu)
            work()
            taken[name].append((start, now(on_gpu)))
    # Asked for after the last round: nothing waits in between.
    return {name: [between(*pair) for pair in pairs] for name, pairs in taken.items()}


def now(on_gpu: bool) -> float | torch.cuda.Event:
    """This moment, by the clock of the CPU or in the GPU's queue."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, end) -> float:  # seconds
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; the interquartile range is third minus first."""
    if len(samples) == 1:
        samples = samples * 2
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


@dataclass
class Ratio:
    """Of paired samples: median (in bench/step.py it is over all), smallest, largest. `noise`: how
    far from 1 a work's ratio to itself was found; a median nearer to 1 is no difference."""

    median: float
    low: float
    high: float
    noise: float

    @property
    def differs(self) -> bool:
        return abs(self.median - 1) > self.noise

    def __str__(self) -> str:
        spread = f"({self.low:.2f} to {self.high:.2f})"
        return f"{self.median:.2f} {spread}" if self.differs else f"no difference {spread}"


def ratio(a: list[float], b: list[float], again: list[float], of: list | None = None) -> Ratio:
    """a over b, pair by pair as they were taken in turn. `again` are samples of b's work, or of
    that of `of`, taken a second time in each round: the noise is the larger distance from 1 of the
    first and the ninth decile of what they are to the first ones, which leaves out single
    hiccups."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    same = [x / y for x, y in zip(again, of or b, strict=True)]
    deciles = statistics.quantiles(same, n=10, method="inclusive") if len(same) > 1 else same
    noise = max(abs(deciles[0] - 1), abs(deciles[-1] - 1))
    return Ratio(statistics.median(pairs), min(pairs), max(pairs), noise)


def against_first(
    works: dict[str, Callable[[], object]], *how: object, **named: object
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(samples, how many times faster the first work is than each other one). The first is timed
    twice in each round: the noise is what it is to itself. `how` goes to interleaved."""
    first = next(iter(works))
    samples = interleaved({first: works[first], "again": works[first], **works}, *how, **named)
    again = samples.pop("again")
    faster = {n: str(ratio(samples[n], samples[first], again)) for n in works if n != first}
    return samples, {first: "", **faster}


def fingerprint(device: torch.device | str = "cpu") -> dict:
    """Code, software, machine and its state now. `clean` is false where more was running than there
    are cores. Settings of the GPU are read, never changed."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    found = {
        "date": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "commit": _said("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_said("git", "status", "--porcelain", "--", "*.py")),
        "source": _source_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton", "__version__"),
        "cpu": _cpu_name(),
        "capability": _capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(load, 2),
        "clean": load <= cores,
        "device": str(device),
    }
    return found | (_gpu(device) if "cuda" in str(device) else {})


def _gpu(device: torch.device | str) -> dict:
    properties = torch.cuda.get_device_properties(device)
    fields = ["driver_version", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm"]
    said = _said(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"
    )
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        **dict(zip(fields, said.split(", "), strict=False)),
    }


def _said(*command: str) -> str:
    """What a program printed; empty where it is absent or fails (a copy without .git, no GPU)."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _source_hash() -> str:
    """Names the code where there is no git: SHA-256 of the Python files that are measured."""
    files = sorted(
        p for part in ("kernels", "nanomed", "bench") for p in ROOT.glob(f"{part}/**/*.py")
    )
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:12]


def installed(module: str, name: str) -> object | None:
    """An attribute of a package that may be absent."""
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return None


def _capability() -> str:
    """The vector instructions that torch and oneDNN use, and whether any are made for bfloat16."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    words = [torch.backends.cpu.get_cpu_capability(), f"bfloat16 {['emulated', 'native'][native]}"]
    names = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"
    return ", ".join(words + [f"{n}={os.environ[n]}" for n in names if n in os.environ])


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return found[1] if found else platform.machine()


class Results:
    """A file of JSON lines, one per measurement, written as it is taken. The first line of a run is
    its fingerprint, which the others name by `run`."""

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = fingerprint(device)
        self.lines: list[dict] = []  # of this run
        self.run = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
        self._append({"kind": "fingerprint", "run": self.run, **found})

    def add(
        self,
        kind: str,
        name: str,
        samples: Iterable[float],
        unit: str = "s",
        *,
        shapes: dict[str, object] | None = None,
        dtype: torch.dtype | str = "",
        convention: str = "",
        **facts: object,
    ) -> dict:
        """Appends one measurement. `kind` is its table (bench/results.py), `shapes` its sizes by
        name, `convention` how a derived figure counts, `facts` what else the table shows: counts,
        rates, ratios as text. No samples means that it was not measured, and a fact says why."""
        line = {
            "kind": kind, "name": name, "run": self.run, "shapes": shapes or {},
            "dtype": str(dtype).removeprefix("torch."), "convention": convention,
            "unit": unit, "samples": [float(f"{x:.6g}") for x in samples], "facts": facts,
        }  # fmt: skip
        self._append(line)
        self.lines.append(line)
        return line

    def _append(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read(paths: Iterable[Path | str]) -> tuple[list[dict], dict[str, dict]]:
    """The measurements of some files, in order, and the fingerprints by run."""
    lines = [json.loads(x) for p in paths for x in Path(p).read_text("utf-8").splitlines()]
    runs = {line["run"]: line for line in lines if line["kind"] == "fingerprint"}
    return [line for line in lines if line["kind"] != "fingerprint"], runs


def shown(line: dict) -> dict[str, object]:
    """A measurement as the cells of a table: name, sizes, time (seconds as milliseconds), facts."""
    scale, unit = (1000, "ms") if line["unit"] == "s" else (1, line["unit"])
    samples = [scale * x for x in line["samples"]]
    times = {}
    if len(samples) == 1:  # a count, or something that is done once
        times = {unit: samples[0]}
    elif samples:
        low, middle, high = quartiles(samples)
        times = {f"median {unit}": middle, f"min {unit}": min(samples), f"IQR {unit}": high - low}
    facts = {key.replace("_", " "): value for key, value in line["facts"].items()}
    return {"name": line["name"], **line["shapes"], "dtype": line["dtype"], **times, **facts}


def show(lines: list[dict], title: str = "") -> None:
    """Prints measurements as a table at once: a run that is stopped keeps it."""
    print(title, table([shown(line) for line in lines]), sep="\n" * bool(title), flush=True)


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a markdown table that is also aligned to read on a screen. Columns are the keys of
    all rows in the order in which they come; None and missing cells stay empty."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(head)) for head in heads] for row in rows]
    # A rule of one character, ":", would be no rule.
    widths = [max(2, *map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [all(isinstance(row.get(head), int | float | None) for row in rows) for head in heads]

    def line(texts: list[str]) -> str:
        both = zip(texts, widths, right, strict=True)
        return "| " + " | ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in both) + " |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(heads), line(rule), *map(line, cells)])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    print(json.dumps(fingerprint("cuda" if torch.cuda.is_available() else "cpu"), indent=1))
