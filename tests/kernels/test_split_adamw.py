"""The Triton step of AdamW on weights in two halves: on a GPU, or in the interpreter."""

import importlib.util

import pytest
import torch

from kernels import split_adamw, split_adamw_triton
from kernels.split_adamw import join, split
from tests import aot
from tests.conftest import ROOT
from tests.kernel_cases import DEVICE

CONSTANTS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def start(n: int, dtype=torch.float32) -> list[torch.Tensor]:
    """upper, low, mean, square."""
    draw = torch.Generator().manual_seed(n)
    halves = split(torch.randn(n, generator=draw) * 0.02)
    return [
        x.to(DEVICE) for x in (*halves, torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype))
    ]


def gradients(n: int, steps: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(n, generator=draw) * 10.0 ** -(k % 5)).to(DEVICE) for k in range(steps)]


def steps(adamw, n: int, scale: torch.Tensor | None) -> list[torch.Tensor]:
    """Weights and moments after seven steps."""
    upper, low, mean, square = start(n)
    for k, grad in enumerate(gradients(n, 7), 1):
        before = grad.clone()
        adamw(upper, low, grad, mean, square, scale, k, **CONSTANTS)
        assert torch.equal(grad, before)
    assert torch.equal(upper.float(), split(join(upper, low))[0].float())
    return [join(upper, low), mean, square]


def in_float64(n: int, scale: torch.Tensor | None) -> list[torch.Tensor]:
    """By torch's AdamW, from the same float32 weights."""
    p = join(*start(n)[:2]).double().requires_grad_()
    optimizer = torch.optim.AdamW([p], **CONSTANTS)
    for grad in gradients(n, 7):
        p.grad = grad.double() * (1 if scale is None else scale.double())
        optimizer.step()
    return [p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]]


def check(adamw, n: int, scaled: bool) -> None:
    """Each number is off by at most a few roundings of float32 in all seven steps."""
    scale = torch.tensor(0.37, device=DEVICE) if scaled else None
    ours, usual = (steps(op, n, scale) for op in (adamw, split_adamw.adamw))
    for mine, theirs, true in zip(ours, usual, in_float64(n, scale), strict=True):
        size = true.abs().max().clamp(min=7 * CONSTANTS["lr"])  # what the steps moved
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + 3e-7 * size
        assert mine.isfinite().all()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n", [1, 2047, 5000])
def test_it_is_as_exact_as_torchs(n, scaled):
    check(split_adamw_triton.adamw, n, scaled)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("w -= decay * w", "w -= lr * decay * w"),
        ("rest2 * g * g", "rest1 * g * g"),
        ("tl.sqrt_rn(v) / unbias2 + eps", "tl.sqrt_rn(v / unbias2) + eps"),
        ("if SCALED", "if not SCALED"),
        ("upper = (bits + 0x8000) >> 16", "upper = bits >> 16"),
        ("(upper << 16) + low", "(upper << 16) | low"),
        ("tl.store(square_ptr + i, v, mask=inside)", "tl.store(square_ptr + i, v, mask=i + 1 < n)"),
    ],
)
def test_a_planted_bug_is_seen(right, wrong, tmp_path):
    text = (ROOT / "kernels/split_adamw_triton.py").read_text("utf-8")
    assert text.count(right) == 1
    path = tmp_path / "mutant.py"
    path.write_text(text.replace(right, wrong), "utf-8")
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError):
        check(mutant.adamw, 100, True)
        check(mutant.adamw, 100, False)


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_compiled_for_three_kinds_of_numbers_and_nothing_is_spilled(architecture):
    """For GPUs that are not here: of 1 weight, of a number that 16 divides, and of any other."""
    made = aot.compiled(architecture)["split_adamw_step"]
    assert (made["times"], made["stack"]) == (3, 0)


def test_narrow_moments_are_neighbours_and_right_on_average():
    """Of the moments that float32 gives, over 10 copies of a start in each of 20 calls."""
    n, times = 64, 200
    (grad,) = gradients(n, 1)
    wide = start(n)
    split_adamw.adamw(*wide[:2], grad, *wide[2:], None, 1, **CONSTANTS)
    drawn: list[list[torch.Tensor]] = [[], []]
    torch.manual_seed(0)
    for _ in range(times // 10):
        upper, low, *moments = (x.repeat(10) for x in start(n, torch.bfloat16))
        split_adamw_triton.adamw(upper, low, grad.repeat(10), *moments, None, 1, **CONSTANTS)
        assert (join(upper, low) - join(*wide[:2]).repeat(10)).abs().max() < 1e-8
        for kept, x in zip(drawn, moments, strict=True):
            kept += x.double().split(n)
    for kept, true in zip(drawn, wide[2:], strict=True):
        kept, true = torch.stack(kept), true.double()
        assert ((kept - true).abs() <= 2**-7 * true.abs()).all()
        error = kept.std(0) / times**0.5 + 2**-7 * true.abs() / times  # one that was never seen
        assert ((kept.mean(0) - true).abs() <= 4.5 * error).all()
    # Away from 0 or towards it; the two are rounded independently. Of one draw it would be 0.08.
    away = [(k > k.mean(0)).double() for k in (torch.stack(x).abs() for x in drawn)]
    assert ((away[0] - away[0].mean(0)) * (away[1] - away[1].mean(0))).mean().abs() < 0.02
