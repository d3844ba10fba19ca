"""kernels/reference.py, and what a CPU runs in its place, against formulas written here in float64;
and which version runs."""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import attention_by_segment, linear_nll_chunked, reference
from kernels.chunk import chunk_tokens
from tests.kernel_cases import (
    Largest,
    check_the_last_chunk_serves_once,
    check_untrained_tokens_meet_no_matmul,
)


def randn(*shape: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return [
        output.detach(),
        *torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True),
    ]


def assert_same(ours, theirs, tolerance=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm().clamp(min=1e-30)


def test_rmsnorm():
    x, w = randn(7, 12), randn(12)
    by_hand = x / (x.pow(2).sum(-1, keepdim=True) / 12 + 1e-5).sqrt() * w
    assert_same(gradients(kernels.rmsnorm(x, w, 1e-5), x, w), gradients(by_hand, x, w))


def test_swiglu():
    gate, up = randn(5, 8), randn(5, 8)
    by_hand = gate / (1 + (-gate).exp()) * up
    assert_same(gradients(kernels.swiglu(gate, up), gate, up), gradients(by_hand, gate, up))


def test_rope_is_a_rotation_by_complex_numbers():
    q, k = randn(6, 4, 8), randn(6, 2, 8)
    positions = torch.tensor([0, 1, 2, 0, 1, 4000])
    angle = positions[:, None] * 1e6 ** (-torch.arange(4, dtype=torch.float64) / 4)
    spin = torch.polar(torch.ones_like(angle), angle)[:, None]

    def by_hand(x):
        z = torch.complex(x[..., :4], x[..., 4:]) * spin
        return torch.cat((z.real, z.imag), -1)

    ours = torch.cat(kernels.rope(q, k, positions, 1e6), 1)
    theirs = torch.cat((by_hand(q), by_hand(k)), 1)
    # Angles are float32: at position 4000 they are exact to 4000 * 2**-24.
    assert_same(gradients(ours, q, k), gradients(theirs, q, k), tolerance=3e-4)
    assert torch.equal(ours[0], torch.cat((q, k), 1)[0].float().double())  # position 0 stays


def softmax_attention(q, k, v, borders, leak=False):
    """By hand: every score, a mask, a softmax. `leak` plants the bug of a mask without borders."""
    n = len(q)
    segment = torch.bucketize(torch.arange(n), torch.tensor(borders[1:]), right=True)
    seen = torch.ones(n, n).tril().bool()
    if not leak:
        seen &= segment[:, None] == segment[None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhe->ihe", weights, v)


@pytest.mark.parametrize("attention", [reference.attention, attention_by_segment.attention])
def test_attention_within_segments(attention):
    borders = [0, 1, 4, 9, 10]
    q, k, v = randn(10, 4, 8), randn(10, 2, 8), randn(10, 2, 8)
    cu = torch.tensor(borders, dtype=torch.int32)
    ours = gradients(attention(q, k, v, cu, 5), q, k, v)
    assert_same(ours, gradients(softmax_attention(q, k, v, borders), q, k, v))
    with pytest.raises(AssertionError):  # the test sees a leak
        assert_same(ours, gradients(softmax_attention(q, k, v, borders, leak=True), q, k, v))


@pytest.mark.parametrize("chunk", [3, 1024, None])
def test_linear_nll_equals_dense_log_softmax(monkeypatch, chunk):
    """Chunked scores and gradients equal dense ones, at any chunk; so does the
    definition."""
    op = linear_nll_chunked.linear_nll if chunk else reference.linear_nll
    monkeypatch.setattr(linear_nll_chunked, "LOGITS_CPU", (chunk or 1) * 29)
    hidden, weight = randn(11, 6, dtype=torch.float32), randn(29, 6, dtype=torch.float32)
    labels = torch.tensor([3, -100, 28, 0, -100, 7, 7, 7, 1, 2, -100])
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits, learned = h @ w.T, labels >= 0
    labels[0] = logits[0].argmax()
    dense_nll = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * learned
    dense_lse = logits.logsumexp(-1) * learned
    for loss in (lambda nll, lse: nll, lambda nll, lse: lse, lambda nll, lse: nll + lse**2):
        nll, lse, right = op(hidden, weight, labels)
        assert nll.dtype == lse.dtype == torch.float32 and not (nll + lse)[~learned].any()
        assert torch.equal(right, logits.argmax(-1) == labels) and right[0]
        wanted = gradients(loss(dense_nll, dense_lse), h, w)
        assert_same(gradients(loss(nll, lse), hidden, weight), wanted, tolerance=1e-6)


def test_a_label_that_shares_the_largest_logit_is_right():
    hidden, weight = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, 1.0]])
    assert kernels.linear_nll(hidden, weight, torch.arange(3))[2].tolist() == [True, True, False]


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_linear_nll_computes_the_last_chunks_logits_once(monkeypatch, n_chunks):
    n_ids, chunk = 97, -(-29 // n_chunks)  # 29 of the case's tokens have a label
    monkeypatch.setattr(linear_nll_chunked, "LOGITS_CPU", chunk * n_ids)
    monkeypatch.setattr(linear_nll_chunked, "CHUNK_CUDA", chunk)
    check_the_last_chunk_serves_once(linear_nll_chunked.linear_nll, n_chunks)


def test_linear_nll_without_any_label_has_a_graph_and_zero_gradients():
    """A rank's filler row: it must take part in the backward pass of a sharded head."""
    hidden, weight = randn(4, 6), randn(29, 6)
    nll, lse, right = kernels.linear_nll(hidden, weight, torch.full((4,), -100))
    (nll + lse).sum().backward()
    assert not nll.any() and not lse.any() and not right.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_linear_nll_skips_untrained_tokens_before_the_matmul():
    check_untrained_tokens_meet_no_matmul(linear_nll_chunked.linear_nll)


def test_places_that_are_not_the_labels_are_refused():
    """A row whose labels were changed alone: tokens would be trained or left out silently."""
    hidden, weight, labels = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([1, -100, 2, -100])
    known = kernels.linear_nll(hidden, weight, labels, torch.tensor([0, 2]))
    assert torch.equal(known[0], kernels.linear_nll(hidden, weight, labels)[0])
    for wrong in ([0], [0, 1], [0, 2, 3], []):
        with pytest.raises(ValueError, match=r"row\.scored"):
            kernels.linear_nll(hidden, weight, labels, torch.tensor(wrong, dtype=torch.int64))


def test_linear_nll_never_holds_all_logits(monkeypatch):
    """Nothing larger than a chunk of logits exists, forward or backward."""
    monkeypatch.setattr(linear_nll_chunked, "LOGITS_CPU", 16 * 100)
    hidden, weight = randn(400, 4), randn(100, 4)
    with Largest() as seen:
        labels = torch.zeros(400, dtype=torch.int64)
        kernels.linear_nll(hidden, weight, labels)[0].sum().backward()
    assert seen.bytes == 8 * max(16 * 100, 400 * 4)
    with Largest() as seen:  # the counter sees what a dense head would make
        (hidden @ weight.T).log_softmax(-1)
    assert seen.bytes == 8 * 400 * 100


def test_backward_changes_nothing_it_was_given():
    hidden, weight, labels = randn(5, 6), randn(9, 6), torch.arange(5)
    before = hidden.detach().clone(), weight.detach().clone()
    dnll = torch.ones(5)
    kernels.linear_nll(hidden, weight, labels)[0].backward(dnll)
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])
    assert (dnll == 1).all()


def test_a_cpus_chunk_is_short_at_a_large_vocabulary():
    """Tokens of AquilaMed's head; fewer are one chunk, more are shared out evenly."""
    weight = torch.empty(151_851, 1, device="meta")
    for n in (1, 511, 883):
        assert linear_nll_chunked._chunk(n, weight) == n
    for n in (2048, 4096, 8192, 32_768, 100_000):
        assert 512 <= linear_nll_chunked._chunk(n, weight) <= 1024


def test_attention_is_one_call_per_segment(monkeypatch):
    lengths, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def counted(q, *args, **options):
        lengths.append(q.shape[-2])
        return sdpa(q, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    borders = torch.tensor([0, 1, 4, 9, 10], dtype=torch.int32)
    q, k, v = randn(10, 4, 8), randn(10, 2, 8), randn(10, 2, 8)
    attention_by_segment.attention(q, k, v, borders, 5)
    assert lengths == [1, 3, 5, 1]


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def chosen_again():
    yield
    kernels.use("auto")


def test_the_choice_is_said_with_its_reason(monkeypatch, chosen_again):
    """in_force() and reasons() need no device: a run says what it is going to do."""

    def said(device=CUDA, dtype=torch.bfloat16, head_size=128) -> tuple[str, str]:
        kind = device, dtype, head_size
        return kernels.in_force(*kind), kernels.reasons(*kind)

    mixed = "triton, attention reference"
    assert said(CPU) == ("reference", "Triton is for CUDA tensors")
    monkeypatch.setattr(kernels, "_is_measured", lambda device: True)
    assert said() == ("triton", "")
    assert said(dtype=torch.float32)[0] == said(head_size=80)[0] == mixed
    assert "no tensor cores in float32" in said(dtype=torch.float32)[1]
    assert said(head_size=80)[1].endswith("since Triton's takes heads of (16, 32, 64, 128)")
    monkeypatch.setattr(kernels, "_is_measured", lambda device: False)
    assert said()[0] == mixed and "attention: torch's varlen_attn, since" in said()[1]
    monkeypatch.setattr(kernels, "triton_error", lambda: "No module named 'triton'")
    assert said() == ("reference", "Triton does not import: No module named 'triton'")
    for name in ("triton", "reference"):
        kernels.use(name)
        assert said() == (name, "")
    with pytest.raises(ValueError, match="must be one of"):
        kernels.use("cuda")


def test_the_gpu_is_asked_anew(monkeypatch):
    """A test that hides the GPU must not decide for one that meets it later in the process."""
    pytest.importorskip("triton")
    for capability, attention in (((8, 0), ", attention reference"), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, it=capability: it)
        assert kernels.in_force(CUDA, torch.bfloat16, 64) == "triton" + attention


def test_a_call_goes_to_what_is_chosen_at_that_time(monkeypatch, chosen_again):
    triton = SimpleNamespace(swiglu=lambda gate, up: "triton")
    monkeypatch.setattr(kernels, "swiglu_triton", triton, raising=False)
    x = torch.ones(2, 3)
    assert torch.equal(kernels.swiglu(x, x), reference.swiglu(x, x))  # auto, on a CPU
    kernels.use("triton")
    assert kernels.swiglu(x, x) == "triton"
    with pytest.raises(TypeError, match="float64 is the reference"):
        kernels.swiglu(x.double(), x.double())
    kernels.use("reference")
    assert torch.equal(kernels.swiglu(x, x), reference.swiglu(x, x))


def test_an_error_inside_triton_is_not_a_reason_to_do_without(monkeypatch, chosen_again):
    """Only a Triton that does not import sends "auto" elsewhere."""

    def broken(gate, up):
        raise RuntimeError("a bug")

    monkeypatch.setattr(kernels, "swiglu_triton", SimpleNamespace(swiglu=broken), raising=False)
    monkeypatch.setattr(kernels, "_version", lambda *_: "triton")
    with pytest.raises(RuntimeError, match="a bug"):
        kernels.swiglu(torch.ones(2, 3), torch.ones(2, 3))


def test_the_heads_chunks_are_even_and_bounded():
    assert chunk_tokens(0, 4096) == 1 and chunk_tokens(1, 4096) == 1
    assert chunk_tokens(8192, 4096) == 8192 and chunk_tokens(8193, 4096) == 4097
    assert chunk_tokens(100_000, 256) == 4000  # 25 chunks; the limit is 4,096
    for n in (5000, 12_345, 32_768, 10**6):
        for d in (64, 2048, 3000, 4096, 8192):
            chunk, most = chunk_tokens(n, d), min(max(2 * d, 4096), 8192)
            n_chunks = -(-n // chunk)
            assert chunk <= most and n_chunks == -(-n // most)
            assert n - (n_chunks - 1) * chunk > chunk - n_chunks  # the last one is as long
            # beside the float32 gradient [V,D], whatever V is: at most as much again
            assert 2 * chunk <= 4 * max(d, 2048)
