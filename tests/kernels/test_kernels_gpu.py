"""The Triton ops on a GPU, in bfloat16, at the sizes of a 7B model and at odd ones."""

import dataclasses

import pytest
import torch
import triton

import kernels
from nanomed.batches.packing import row_from
from nanomed.model.decoder import Aquila
from tests import kernel_cases
from tests.kernel_cases import CASES, DEVICE, check, check_same_bits
from tests.kernels.test_kernels_triton import MODULES, module_of, on_triton, triton_op  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GIB = 2**30


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    kernel_cases.poison(monkeypatch)


@pytest.mark.parametrize("n", [1, 3, 127, 129, 1000])
@pytest.mark.parametrize("op", MODULES)
def test_bfloat16_is_as_exact_as_pytorchs(op, n):
    check(triton_op(op), CASES[op](n), torch.bfloat16)


@pytest.mark.parametrize(
    "case",
    [
        kernel_cases.rmsnorm(1000, d=4096),
        kernel_cases.rope(1000, h=32, k=8, e=128),
        kernel_cases.swiglu(300, f=14336),
        kernel_cases.linear_nll(300, d=256, v=151851),
    ],
    ids=lambda case: case.op,
)
def test_sizes_of_aquilamed(case):
    check(triton_op(case.op), case, torch.bfloat16)
    check_same_bits(triton_op(case.op), case, torch.bfloat16)


def test_rmsnorm_of_many_rows_that_load_16_bytes_at_a_time():
    """kernel_cases has views that begin anywhere, which the compiler reads element by element. Here
    a program of backward goes through 19 or more rows, the next ones on their way."""
    case = kernel_cases.rmsnorm(5000, d=4096)
    case.inputs = tuple(x.contiguous() for x in case.inputs)
    check(triton_op("rmsnorm"), case, torch.bfloat16)
    check_same_bits(triton_op("rmsnorm"), case, torch.bfloat16)


@pytest.mark.parametrize("op", ["rmsnorm", "rope", "swiglu"])
def test_offsets_past_two_to_the_31(op, monkeypatch):
    monkeypatch.undo()  # poison would cost seconds
    last_rows_are_the_first_ones_twins(op, 2**31)


def last_rows_are_the_first_ones_twins(op: str, elements: int) -> None:
    """Eight rows again and again, until the last are this many elements away from the first."""
    width = {"rmsnorm": 4096, "rope": 4096, "swiglu": 28672}[op]
    times = elements // (8 * width) + 2
    rows = torch.randn(8, width, device=DEVICE, dtype=torch.bfloat16)
    x = rows.repeat(times, 1).requires_grad_()
    if op == "rmsnorm":
        y = triton_op(op)(x, torch.ones_like(x[0]), 1e-5)
    elif op == "swiglu":
        y = triton_op(op)(x, x.detach())
    else:
        positions = torch.arange(8, device=DEVICE).repeat(times)
        y = triton_op(op)(x.view(-1, 32, 128), x[:, :128].unflatten(1, (1, 128)), positions, 1e6)[0]
    y.backward(y.detach())
    for result in (y, x.grad):
        assert torch.equal(result[-8:], result[:8]) and result[-8:].isfinite().all()


@pytest.mark.parametrize("op", MODULES)
def test_nothing_compiles_again_for_another_number_of_tokens(op):
    compiled = []
    sizes = dict(rmsnorm=dict(d=512), rope=dict(h=4, k=2, e=64), swiglu=dict(f=512))
    options = sizes.get(op, dict(d=64, v=999))
    check(triton_op(op), CASES[op](64, **options), torch.bfloat16)
    triton.knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["repr"])
    try:
        for n in (2, 5, 33, 64, 131, 1024):
            check(triton_op(op), CASES[op](n, **options), torch.bfloat16)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


def test_head_in_several_chunks(monkeypatch):
    """Each adds its bfloat16 product to the gradient in float32, which a CPU cannot do."""
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n, d: 7)
    check(triton_op("linear_nll"), CASES["linear_nll"](127), torch.bfloat16)
    check_same_bits(triton_op("linear_nll"), CASES["linear_nll"](127), torch.bfloat16)


def test_head_offsets_past_two_to_the_31(monkeypatch):
    monkeypatch.undo()  # poison would cost seconds
    last_tokens_are_the_first_ones_twins(monkeypatch, 16_384, 151_851)


def last_tokens_are_the_first_ones_twins(monkeypatch, n: int, v: int) -> None:
    """In one chunk. PyTorch's matmuls may sum another tile's rows in another order."""
    monkeypatch.setattr(module_of("linear_nll"), "chunk_tokens", lambda n_tokens, d: n_tokens)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    hidden, weight = (torch.randn(m, 64, device=DEVICE, dtype=dtype) / 4 for m in (n, v))
    labels = torch.randint(v, (n,), device=DEVICE)
    hidden[-8:], labels[-8:] = hidden[:8], labels[:8]
    hidden.requires_grad_()
    nll = triton_op("linear_nll")(hidden, weight, labels)[0]
    nll.sum().backward()
    for result in (nll.detach(), hidden.grad):
        assert result.isfinite().all() and result[:8].any()
        assert kernel_cases.error(result[-8:], result[:8].double()) < 0.01


def losses(model: Aquila, rows: list, dtype: torch.dtype) -> torch.Tensor:
    """Of 50 steps of AdamW with float32 masters, the model computing in `dtype`."""
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3)
    model = model.to(dtype)
    seen = []
    for row in rows:
        with torch.no_grad():
            for param, master in zip(model.parameters(), masters, strict=True):
                param.copy_(master)
        loss = model(row).nll.sum() / (row.labels >= 0).sum()
        loss.backward()
        for param, master in zip(model.parameters(), masters, strict=True):
            master.grad, param.grad = param.grad.float(), None
        optimizer.step()
        seen.append(loss.detach())
    return torch.stack(seen)


def test_a_small_models_loss_curve_is_the_definitions(small, monkeypatch):
    """50 steps on 16 rows that come again. Triton's bfloat16 stays as near to float32 as the
    definition's bfloat16 does."""
    monkeypatch.undo()
    config = dataclasses.replace(small, d_model=256, n_heads=4, n_kv_heads=2, vocab_size=1003)
    generator = torch.Generator().manual_seed(0)
    texts = [
        [torch.randint(1003, (n,), generator=generator).tolist() for n in (100, 1, 77, 190)]
        for _ in range(16)
    ]
    rows = [row_from(texts[i % 16]).to(DEVICE) for i in range(50)]
    curves = {}
    for name, dtype in (
        ("reference", torch.float32),
        ("reference", torch.bfloat16),
        ("triton", torch.bfloat16),
    ):
        torch.manual_seed(0)
        kernels.use(name)
        try:
            curves[name, dtype] = losses(Aquila(config).to(DEVICE), rows, dtype)
        finally:
            kernels.use("auto")
    exact = curves["reference", torch.float32]
    usual = (curves["reference", torch.bfloat16] - exact).abs().max()
    ours = (curves["triton", torch.bfloat16] - exact).abs().max()
    assert exact[-16:].mean() < exact[:16].mean() - 0.3  # it learned
    assert ours <= 2 * usual, (ours.item(), usual.item())


@pytest.mark.parametrize("n", [16384, 32768])
def test_memory_of_the_head_is_a_chunk_and_the_gradients(n, monkeypatch):
    """At AquilaMed's vocabulary; logits of all tokens would take 4.6 or 9.3 GiB."""
    monkeypatch.undo()
    d, v = 1024, 151851
    hidden = torch.randn(n, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(v, (n,), device=DEVICE)
    op = triton_op("linear_nll")
    op(hidden[:8], weight, labels[:8])[0].sum().backward()  # what cuBLAS and Triton keep
    hidden.grad = weight.grad = None
    chunk = module_of("linear_nll").chunk_tokens(n, d)
    logits = 2 * chunk * 151936
    lists = 40 * n  # trained tokens, nll, lse, right and what makes them
    parts = 3 * 2 * chunk * d  # hidden of a chunk, its gradient, a copy

    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nll = op(hidden, weight, labels)[0]
    forward = torch.cuda.max_memory_allocated() - start
    assert forward <= logits + parts + lists + 2**26, (forward / GIB, logits / GIB)

    torch.cuda.reset_peak_memory_stats()
    nll.sum().backward()
    backward = torch.cuda.max_memory_allocated() - start
    sums = 2 * n * d + 4 * v * d  # float32; rounded when the logits have gone
    assert backward <= sums + max(logits + parts, 2 * v * d) + lists + 2**26, backward / GIB
