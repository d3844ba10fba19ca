"""The Triton ops without a GPU: run by Triton's interpreter, and compiled for GPUs elsewhere.

The interpreter knows no bfloat16 and takes 1 to 2 ms a program, so shapes are small. Where there
is a GPU these tests run on it; tests/kernels/test_kernels_gpu.py has those that need one.
"""

import importlib
import importlib.util
import re
import warnings

import pytest
import torch

import kernels
from kernels import reference
from nanomed.batches.packing import row_from
from nanomed.model.decoder import Aquila
from tests import aot, kernel_cases
from tests.conftest import ROOT
from tests.kernel_cases import CASES, DEVICE, check
from tests.training.test_exactness import sharded

MODULES = ["rmsnorm", "rope", "swiglu", "linear_nll"]
# float32 against float64; a GPU's exp, log and rsqrt are approximate to some 1e-7.
TOLERANCE = 1e-5 if DEVICE.type == "cuda" else 1e-6


def module_of(op: str):
    return importlib.import_module(f"kernels.{op}_triton")


def triton_op(op: str):
    return getattr(module_of(op), op)


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    kernel_cases.poison(monkeypatch)


@pytest.fixture
def on_triton():
    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.mark.parametrize("n", [1, 3, 127, 129])
@pytest.mark.parametrize("op", MODULES)
def test_forward_and_gradients_equal_pytorchs_float64(op, n):
    """At sizes that no block divides, on views, with nan in all memory that was not written."""
    check(triton_op(op), CASES[op](n), tolerance=TOLERANCE)


@pytest.mark.parametrize(
    "case",
    [
        kernel_cases.rmsnorm(2, d=2051),
        kernel_cases.rope(2, h=5, k=3, e=2),
        kernel_cases.rope(9, scaling=(8.0, 1.0, 4.0, 128)),
        kernel_cases.swiglu(2, f=2051),
        kernel_cases.linear_nll(5, v=4099),
        kernel_cases.linear_nll(3, v=4096),
    ],
    ids=lambda case: case.op,
)
def test_more_than_one_block(case):
    check(triton_op(case.op), case, tolerance=TOLERANCE)


@pytest.mark.parametrize("op", MODULES)
def test_the_same_bits_every_time(op):
    kernel_cases.check_same_bits(triton_op(op), CASES[op](5))


def test_rmsnorm_rounds_where_the_definition_does():
    """To x's dtype before the weight. The interpreter knows float16: 1 element in 50 may differ by
    the last bit of rstd; without that rounding a quarter does."""
    x, weight = (kernel_cases.like(x, torch.float16) for x in kernel_cases.rmsnorm(20).inputs)
    ours, definition = (f(x, weight, 1e-5) for f in (triton_op("rmsnorm"), reference.rmsnorm))
    assert ours.dtype == torch.float16 and (ours != definition).float().mean() < 0.02


def test_head_in_several_chunks(monkeypatch):
    """Their sums are one gradient; the last chunk is smaller."""
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n, d: 7)
    check(triton_op("linear_nll"), kernel_cases.linear_nll(30), tolerance=TOLERANCE)


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_head_computes_the_last_chunks_logits_once(monkeypatch, n_chunks):
    chunk = -(-29 // n_chunks)
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n, d: chunk)
    kernel_cases.check_the_last_chunk_serves_once(triton_op("linear_nll"), n_chunks)


def test_head_skips_untrained_tokens_before_the_matmul():
    kernel_cases.check_untrained_tokens_meet_no_matmul(triton_op("linear_nll"))


def test_head_never_holds_all_logits(monkeypatch):
    """Nothing is larger than a chunk of logits, whose rows are padded to 128."""
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n, d: 16)
    case = kernel_cases.linear_nll(100, d=4, v=100, trained=1.0)
    hidden, weight = (x.float().to(DEVICE).requires_grad_() for x in case.inputs)
    with kernel_cases.Largest() as seen:
        triton_op("linear_nll")(hidden, weight, case.others[0].to(DEVICE))[0].sum().backward()
    assert seen.bytes == 4 * 16 * 128


def test_head_without_any_label_has_a_graph_and_zero_gradients():
    hidden, weight = (torch.randn(*s, device=DEVICE).requires_grad_() for s in ((5, 6), (29, 6)))
    labels = torch.full((5,), -100, device=DEVICE)
    nll, lse, right = triton_op("linear_nll")(hidden, weight, labels)
    (nll + lse).sum().backward()
    assert not nll.any() and not lse.any() and not right.any()
    assert not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("v", [29, 128, 131])
def test_the_head_adds_to_the_sum_of_gradients_unless_it_is_frozen(monkeypatch, v, frozen):
    """float32 sums of a bfloat16 weight, over two rows of three chunks each, one with no label."""

    def matmul(out, a, b, add):  # a CPU has no product of bfloat16 in float32
        out.copy_(a.float() @ b.float() + (out if add else 0))

    monkeypatch.setattr(module_of("linear_nll"), "_matmul", matmul)
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n, d: 4)
    weight = torch.nn.Parameter(torch.randn(v, 6, device=DEVICE).bfloat16())
    weight.grad_dtype = torch.float32
    weight.requires_grad_(not frozen)
    exact, losses = weight.detach().double().requires_grad_(), []
    for n in (10, 0, 9):
        hidden = torch.randn(n + 2, 6, device=DEVICE).bfloat16().requires_grad_()
        labels = torch.tensor([*range(n), -100, -100], device=DEVICE)
        triton_op("linear_nll")(hidden, weight, labels)[0].sum().backward()
        losses.append(reference.linear_nll(hidden.detach().double(), exact, labels)[0].sum())
        assert (n == 0) == (not hidden.grad.any())
    if frozen:
        assert weight.grad is None
        return
    sum(losses).backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - exact.grad).norm() < 1e-2 * exact.grad.norm()


def test_a_label_outside_the_vocabulary_is_nan():
    hidden, weight = torch.randn(2, 6, device=DEVICE), torch.randn(29, 6, device=DEVICE)
    labels = torch.tensor([28, 29], device=DEVICE)
    nll, _, right = triton_op("linear_nll")(hidden, weight, labels)
    assert nll[0].isfinite() and nll[1].isnan() and not right[1]
    # So it is if the places of the labels are wrong, and name a token that has none.
    labels[1] = -100
    nll, _, right = triton_op("linear_nll")(hidden, weight, labels, torch.arange(2, device=DEVICE))
    assert nll[0].isfinite() and nll[1].isnan() and not right[1]


def test_logits_far_from_zero():
    """exp would overflow, or the sum of exps be zero, without the running maximum. It changes: the
    largest logits are in the second block. In float32 a log-sum-exp near 50 is rounded by 2e-6, and
    so is the softmax that it makes."""
    case = kernel_cases.linear_nll(9, v=4500)
    case.inputs[1][4200:] *= 2
    check(triton_op("linear_nll"), case, tolerance=3 * TOLERANCE)
    case.inputs = (200 * case.inputs[0], case.inputs[1])
    check(triton_op("linear_nll"), case, tolerance=3 * TOLERANCE)


@pytest.mark.parametrize("op", MODULES)
def test_layouts_that_autograd_hands_over(op):
    """The gradient of a sum is one number, expanded; a transposed input's rows lie apart."""
    case = CASES[op](3)
    inputs = tuple(x.float().to(DEVICE).transpose(0, 1).contiguous().transpose(0, 1)
                   for x in case.inputs if x.dim() > 1)  # fmt: skip
    inputs += tuple(x.float().to(DEVICE) for x in case.inputs if x.dim() == 1)
    others = tuple(x.to(DEVICE) if torch.is_tensor(x) else x for x in case.others)

    def gradients(op, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = op(*leaves, *others)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(sum(y.sum() for y in outputs if y.requires_grad), leaves)

    ours, truth = gradients(triton_op(op), torch.float32), gradients(case.truth, torch.float64)
    assert all(kernel_cases.error(a, b) <= TOLERANCE for a, b in zip(ours, truth, strict=True))


@pytest.mark.parametrize("op", MODULES)
def test_no_tokens(op):
    """No kernel runs; the weights' gradients are zero."""
    case = CASES[op](1)
    many = {"rope": 2, "swiglu": 2}.get(op, 1)  # inputs that have tokens
    inputs = [x[:0] if i < many else x for i, x in enumerate(case.inputs)]
    others = [x[:0].to(DEVICE) if torch.is_tensor(x) else x for x in case.others]
    outputs, gradients, _ = kernel_cases.run(
        triton_op(op), [x.float().to(DEVICE) for x in inputs], others
    )
    assert not any(y.numel() for y in outputs)
    assert all(
        (g == 0).all() and g.shape == x.shape for g, x in zip(gradients, inputs, strict=True)
    )


def test_rope_reads_positions_as_they_come():
    """int32, or every other element of a list."""
    case = kernel_cases.rope(7)
    positions = case.others[0]
    for given in (positions.int(), torch.stack((positions, -positions), 1)[:, 0]):
        case.others = (given, *case.others[1:])
        check(triton_op("rope"), case, tolerance=TOLERANCE)


def test_heads_far_apart_are_copied():
    """rope's offsets within a token are int32."""
    readable = module_of("rope")._readable
    for stride, kept in ((2**29, True), (2**30, False)):
        x = torch.empty_strided((1, 3, 4), (4, stride, 1), device="meta")
        assert (readable(x) is x) == kept and readable(x).shape == x.shape


# Each with one sign turned in a formula.
MUTANTS = {
    "rmsnorm dx": ("rmsnorm", "rstd * (g - n *", "rstd * (g + n *"),
    "rmsnorm dweight": ("rmsnorm", "dw += dy * n", "dw -= dy * n"),
    "rope": ("rope", "ctx.turning, -1.0", "ctx.turning, 1.0"),
    "swiglu dgate": ("swiglu", "(1 + g * (1 - s))", "(1 - g * (1 - s))"),
    "swiglu dup": ("swiglu", "dup_ptr + row * F + f, dy", "dup_ptr + row * F + f, -dy"),
    "linear_nll": ("linear_nll", "- tl.where(v == label", "+ tl.where(v == label"),
    "linear_nll dlse": ("linear_nll", "else dnll + dlse", "else dnll"),
    "linear_nll right": ("linear_nll", "right_ptr + token, z == m", "right_ptr + token, z < m"),
    # And one store that stops short.
    "unwritten": ("swiglu", "sigmoid(g) * u, mask=f < F", "sigmoid(g) * u, mask=f < F - 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_seen(name, tmp_path):
    """The same check on the same file with one planted bug, loaded under another name."""
    op, right, wrong = MUTANTS[name]
    text = (ROOT / f"kernels/{op}_triton.py").read_text()
    assert text.count(right) == 1
    path = tmp_path / f"mutant_{op}.py"
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    with pytest.raises(AssertionError):
        check(getattr(mutant, op), CASES[op](3), tolerance=TOLERANCE)


def test_compiled_once_for_any_number_of_tokens():
    """For an H100, in bfloat16, at the sizes of AquilaMed. Rows are read 16 bytes at a time; no
    sine is approximate, nothing is atomic."""
    check_compiled(aot.compiled(90))


@pytest.mark.slow
def test_compiled_for_an_a100():
    check_compiled(aot.compiled(80))


LABELS_LOGIT = "ld.global.b16"  # the only thing that is less than 16 bytes of a row, of the head


def check_compiled(reports: dict[str, dict]) -> None:
    reports = {name: made for name, made in reports.items() if name.startswith(tuple(MODULES))}
    assert len(reports) == 7  # RoPE's backward kernel is its forward kernel
    for name, made in reports.items():
        ptx = made["ptx"]
        assert made["times"] == 1 and "ld.global.v4.b32" in ptx, name
        assert not re.search(r"(ld|st)\.global\.(v2|b16)", ptx.replace(LABELS_LOGIT, "", 1)), name
        assert "sin.approx" not in ptx and not aot.ATOMIC.search(ptx), name
        # Exact sines of huge angles need a little memory; nothing else is spilled.
        assert made["stack"] <= (64 if name == "rope_forward" else 0), (name, made["stack"])

    # The rows that a program of many will read next are already on their way.
    assert "cp.async.cg" in reports["rmsnorm_backward"]["ptx"]
    # A thread has one angle: no two compute the same exact sine.
    assert reports["rope_forward"]["ptx"].count("div.rn.f32") == 1


def nll_and_gradients(model, row) -> list[torch.Tensor]:
    model.zero_grad()
    nll = model(row).nll
    nll.sum().backward()
    return [nll.detach(), *(p.grad.clone() for p in model.parameters())]


def worst(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Relative, norm-wise. Adding to all keys alike would move no softmax if RoPE did not turn
    them: the gradient of k_proj.bias is a small rest of large terms, and counts from 0.01 up."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).norm() / b.norm().clamp(min=0.01)).item() for a, b in pairs)


SEGMENTS = [[5, 90, 3, 41], [8], [60, 61, 9]]


def test_the_model_on_triton_packed_and_alone(small, on_triton):
    model = Aquila(small).to(DEVICE)
    row = row_from(SEGMENTS).to(DEVICE)
    packed = nll_and_gradients(model, row)
    alone = [nll_and_gradients(model, row_from([s]).to(DEVICE)) for s in SEGMENTS]
    nll, *gradients = zip(*alone, strict=True)
    assert worst(packed, [torch.cat(nll), *map(sum, gradients)]) <= 3e-6
    kernels.use("reference")
    assert worst(packed, nll_and_gradients(model, row)) <= 3e-6


def on_two_ranks(world, config, recompute) -> float:
    """Triton's gradients of this rank's row, summed over ranks, beside the definition's."""
    model = sharded(world, config, recompute=recompute)
    row = row_from(SEGMENTS[world.rank :])
    results = []
    for name in ("triton", "reference"):
        kernels.use(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # FSDP2 warns of an output that is a view
            nll, *gradients = nll_and_gradients(model, row)
        results.append([nll, *(g.full_tensor() for g in gradients)])
    kernels.use("auto")
    return worst(*results)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="gloo ranks on a CPU need the interpreter")
@pytest.mark.parametrize("recompute", ["lean", "full"])
def test_two_sharded_ranks_on_triton_equal_the_definition(small, pool, recompute):
    assert max(pool(2, on_two_ranks, small, recompute)) <= 3e-6
