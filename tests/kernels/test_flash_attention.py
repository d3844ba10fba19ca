"""kernels/attention_triton.py against kernels/reference.py in float64.

Without a GPU the kernels run in Triton's interpreter, in float32 (its bfloat16 is wrong, silently),
and are compiled for GPUs that are not there in a process of their own. A GPU runs all of it, and
tests/kernels/test_flash_attention_gpu.py.
"""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kernels import attention_tiles, reference
from kernels import attention_triton as flash_attention
from kernels.attention_tiles import find_tile
from kernels.attention_triton import attention
from tests import aot

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SOURCE = Path(flash_attention.__file__)
TOLERANCE = 2e-6  # of float32, norm-wise; 4e-7 is usual


def segments(lengths) -> torch.Tensor:
    """cu_seqlens."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)


def randn(*shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def case(T, H, K, E, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v and an incoming gradient."""
    return [randn(T, h, E, dtype=dtype, seed=i) for i, h in enumerate((H, K, K, H))]


def run(op, q, k, v, dout, cu_seqlens) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, cu_seqlens, int(cu_seqlens.diff().max()))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def errors(ours, tensors, cu_seqlens) -> torch.Tensor:
    """Of out, dq, dk, dv, relative to their norms, or to the incoming gradient's where that is
    more: after a segment of one token dq and dk are zero."""
    exact = run(reference.attention, *(x.double() for x in tensors), cu_seqlens)
    floor = tensors[3].double().norm()
    pairs = zip(ours, exact, strict=True)
    return torch.stack([(a.double() - b).norm() / b.norm().clamp(min=floor) for a, b in pairs])


def check(op, lengths, H, K, E) -> None:
    tensors, cu_seqlens = case(sum(lengths), H, K, E), segments(lengths)
    before = [x.clone() for x in tensors]
    ours = run(op, *tensors, cu_seqlens)
    assert errors(ours, tensors, cu_seqlens).max().item() <= TOLERANCE
    assert all(map(torch.equal, tensors, before))  # the incoming gradient, too


@pytest.mark.parametrize(
    "lengths, H, K, E",
    [
        ([1], 4, 2, 64),
        ([3], 4, 1, 128),
        ([63], 2, 2, 64),
        ([65], 2, 1, 64),
        ([70], 2, 1, 128),
        # Ends at, before and after the edges of tiles; the last begins at no multiple of 4.
        ([64, 1, 32, 96], 2, 1, 16),
        ([1] * 4 + [2, 5, 1], 2, 1, 32),
    ],
)
def test_output_and_gradients(lengths, H, K, E):
    check(attention, lengths, H, K, E)


# One wrong sign in each formula of the backward pass, and a mask that is off by one.
MUTANTS = {
    "delta": ("= tl.sum(dout_tile", "= -tl.sum(dout_tile"),
    "dq, P": ("s * scale - lse[:", "s * scale + lse[:"),
    "dq, dP": ("dp = tl.dot(dout", "dp = -tl.dot(dout"),
    "dq, dS": ("(dp - delta[:", "(dp + delta[:"),
    "dq": ("    total *= scale", "    total *= -scale"),
    "dk, P": ("s * scale - lse[N", "s * scale + lse[N"),
    "dk, dP": ("dp = tl.dot(v", "dp = -tl.dot(v"),
    "dk, dS": ("(dp - delta[N", "(dp + delta[N"),
    "dk": ("dk_sum *= scale", "dk_sum *= -scale"),
    "dv": ("tl.dot(p.to(q.dtype", "tl.dot(-p.to(q.dtype"),
    "dk, dv, mask": ("[None, :] >= keys", "[None, :] > keys"),
}


def mutant(folder: Path, right: str, wrong: str):
    """The kernels with one piece of their source replaced, under another name."""
    source = SOURCE.read_text()
    assert source.count(right) == 1
    path = folder / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_sees_a_wrong_formula(tmp_path, name):
    with pytest.raises(AssertionError, match=f"<= {TOLERANCE}"):
        check(mutant(tmp_path, *MUTANTS[name]), [7], 2, 1, 16)


def test_reads_and_writes_stay_within_segments(tmp_path, monkeypatch):
    """Of 210 tokens 5 to 75 and 75 to 140 are segments. The others hold nan, and whatever attention
    allocates holds 7: what it computes is finite, and outside the segments it changes no byte."""
    allocated = []

    def empty(shape, **options):
        allocated.append(torch.full(tuple(shape), 7.0, **options))
        return allocated[-1]

    def untouched(x):  # x[T, H, E], or numbers[H, n]: a segment's begin at a multiple of 4
        outside = (x[:5], x[140:]) if len(x) == 210 else (x[:, :4], x[:, 74:76], x[:, 141:])
        return all((part == 7).all() for part in outside)

    tensors = case(210, 2, 1, 64)
    for x in tensors:
        x[:5] = x[140:] = torch.nan
    cu_seqlens = torch.tensor([5, 75, 140], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: empty(x.shape, device=x.device))

    ours = run(attention, *tensors, cu_seqlens)
    assert len(allocated) == 6 and all(map(untouched, allocated))  # out, lse, delta, dq, dk, dv
    within = [x[5:140] for x in (*tensors, *ours)]
    assert errors(within[4:], within[:4], cu_seqlens - 5).max() <= TOLERANCE

    allocated.clear()
    masked = "tile.to(x.dtype.element_ty), mask=row + rows < length)"
    bug = mutant(tmp_path, masked, masked.replace("length", "length + ROWS"))
    run(bug, *tensors, cu_seqlens)
    assert not all(map(untouched, allocated))  # the test sees a store without its mask


def test_same_bits_every_time_and_alone():
    """A segment's tiles begin at its first token, so its neighbours do not change a bit."""
    lengths, tensors = [3, 70, 1], case(74, 2, 1, 64)
    once, again = (run(attention, *tensors, segments(lengths)) for _ in range(2))
    assert all(map(torch.equal, once, again))
    alone = run(attention, *(x[3:73] for x in tensors), segments([70]))
    assert all(map(torch.equal, [x[3:73] for x in once], alone))


def test_views_and_expanded_gradients():
    """q, k and v as a projection's output is cut, or with heads outside; a gradient that is one
    number, expanded, or whose elements are apart."""
    packed, cu_seqlens = randn(37, 4, 64), segments([30, 7])
    views = packed.split((2, 1, 1), dim=1)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views]
    apart = randn(64, 2, 37).permute(2, 1, 0)
    for tensors in (views, heads_first):
        for dout in (torch.ones((), device=DEVICE).expand(37, 2, 64), apart):
            ours = run(attention, *tensors, dout, cu_seqlens)
            assert errors(ours, (*tensors, dout), cu_seqlens).max() <= TOLERANCE


@triton.jit
def _write_tile(found, cu_seqlens, n_segments, B: tl.constexpr):
    start, length, first, _ = find_tile(cu_seqlens, n_segments, tl.program_id(0), B)
    tl.store(found + 2 * tl.program_id(0), start + first)
    tl.store(found + 2 * tl.program_id(0) + 1, (first < length).to(tl.int32))


@pytest.mark.parametrize(
    "lengths", [[1], [32], [33, 31, 64, 1], [1] * 9, [15, 17, 16, 16, 80], [16, 0, 3, 0, 0, 40, 0]]
)
def test_every_tile_has_one_program(lengths):
    """In the bound of T // B + n programs, without a look at the lengths on the host."""
    slots = sum(lengths) // 16 + len(lengths)
    found = torch.zeros(slots, 2, dtype=torch.int32, device=DEVICE)
    cu_seqlens = segments(lengths)
    _write_tile[(slots,)](found, cu_seqlens, len(lengths), B=16)
    borders = cu_seqlens.tolist()
    expected = [t for a, b in pairwise(borders) for t in range(a, b, 16)]
    assert [token for token, busy in found.tolist() if busy] == expected


def test_what_cannot_be_read_where_it_lies_is_copied():
    """Heads apart, rows or the first of them at no multiple of 16 bytes, rows that overlap, and
    rows so far apart that offsets within a tile of 128 are no int32."""
    memory = torch.empty(2**25, dtype=torch.bfloat16, device=DEVICE)
    for strides, offset, kept in (
        ((40, 16, 1), 0, True), ((40, 16, 1), 8, True), ((2**24 - 8, 16, 1), 0, True),
        ((40, 20, 1), 0, False), ((42, 16, 1), 0, False), ((40, 16, 1), 4, False),
        ((32, 16, 1), 4, False), ((0, 16, 1), 0, False), ((2**24, 16, 1), 0, False),
    ):  # fmt: skip
        x = memory.as_strided((2, 2, 16), strides, offset)
        read = attention_tiles.readable(x)
        assert (read is x) == kept
        assert read.data_ptr() % 16 == 0 and (kept or read.stride() == (32, 16, 1))


def test_without_a_copy_engine(monkeypatch):
    monkeypatch.setattr(attention_tiles, "has_copy_engine", lambda q: False)
    check(attention, [130, 3], 2, 1, 16)


def test_unfit_shapes_are_refused():
    with pytest.raises(ValueError, match=r"q\[3, 2, 24\], .* E must be"):
        attention(*case(3, 2, 1, 24)[:3], segments([3]), 3)
    with pytest.raises(ValueError, match="K divide H"):
        attention(*case(3, 3, 2, 64)[:3], segments([3]), 3)


# Compiling for GPUs that are not there (tests/aot.py).

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
CHIPS = {80: "ampere", 90: "hopper"}
KERNELS = ("_forward_kernel", "_dq_kernel", "_dk_dv_kernel")


# Number and lengths of segments, and of tokens: 1, odd, and multiples of 16, and a list of borders
# that begins anywhere, which Triton by itself would tell apart.
MANY_LENGTHS = [[1], [3, 4], [16], [13] * 16, [4096]]


def compile_all(architecture: int, head_size: int, lengths: list[list[int]], folder: Path) -> dict:
    """What a step of each row of segments compiles, per kernel."""
    blocks = attention_tiles.BLOCKS.get((CHIPS[architecture], head_size), attention_tiles.SMALL)
    flash_attention.choose_blocks = lambda q: blocks
    attention_tiles.has_copy_engine = lambda q: architecture >= 90
    kernels = aot.compiling(architecture, flash_attention, KERNELS)
    for row in lengths:
        # q, k and v as they come out of one projection.
        packed = torch.zeros(sum(row), 48, head_size, dtype=torch.bfloat16)
        tensors = packed.split((32, 8, 8), 1)
        aside = len(row) % 4
        borders = torch.zeros(aside + len(row) + 1, dtype=torch.int32)[aside:]
        borders.copy_(segments(row))
        run(attention, *tensors, torch.zeros_like(tensors[0]), borders)
    return {name: aot.report(kernel, folder) for name, kernel in kernels.items()}


def test_compiled_once_for_all_lengths():
    report = aot.compiled(90)
    assert [report[name]["times"] for name in KERNELS] == [1, 1, 1]
    assert not any(aot.ATOMIC.search(report[name]["ptx"]) for name in KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_kernel_fits_the_chip(tmp_path, architecture, head_size):
    function = "tests.kernels.test_flash_attention.compile_all"
    reports = aot.elsewhere(tmp_path, function, architecture, head_size, [[5, 11]])
    for name, made in reports.items():
        assert made["shared"] <= SHARED_MEMORY[architecture], name
        # dK and dV at head size 128 keep values there, nearly all used outside the hot loop.
        assert made["stack"] <= (400 if name == "_dk_dv_kernel" else 64), name
        assert not aot.ATOMIC.search(made["ptx"]), f"{name}: sums are in no fixed order"
        wide = "bulk.tensor" if (architecture, name) == (90, "_dk_dv_kernel") else "cg"
        assert f"cp.async.{wide}" in made["ptx"], f"{name} does not load 16 bytes at a time"
