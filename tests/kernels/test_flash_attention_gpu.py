"""Flash attention on a GPU, in half precision and at sizes of the 7B model."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kernels.attention_triton import attention
from tests import kernel_cases
from tests.kernels.test_flash_attention import DEVICE, case, errors, run, segments

NEEDS_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    kernel_cases.poison(monkeypatch)


def by_torch(q, k, v, cu_seqlens, max_seqlen) -> torch.Tensor:
    """PyTorch's own attention in the inputs' dtype, a segment at a time."""
    out = []
    for a, b in pairwise(cu_seqlens.tolist()):
        heads_first = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        shared = q.shape[1] != k.shape[1]
        y = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=shared)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def as_exact_as_torch(lengths, H, K, E, dtype) -> bool:
    tensors, cu_seqlens = case(sum(lengths), H, K, E, dtype), segments(lengths)
    ours = errors(run(attention, *tensors, cu_seqlens), tensors, cu_seqlens)
    theirs = errors(run(by_torch, *tensors, cu_seqlens), tensors, cu_seqlens)
    return bool((ours <= 2 * theirs + 1e-6).all())  # where both are all but exact


def test_as_exact_as_torch():
    """What the next test asks of bfloat16, here of float32: within twice PyTorch's own error."""
    assert as_exact_as_torch([40, 9], 2, 1, 64, torch.float32)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(
    "E, K, dtype",  # each is compiled, which takes some 5 s
    [
        (128, 1, torch.bfloat16),
        (128, 4, torch.bfloat16),
        (128, 8, torch.bfloat16),
        (64, 4, torch.bfloat16),
        (64, 1, torch.float16),
        (128, 4, torch.float16),
    ],
)
@pytest.mark.parametrize("lengths", [[1], [127], [1000], [129, 1, 256, 3, 640, 64], [1] * 200])
def test_half_precision_is_as_exact_as_torchs(lengths, E, K, dtype):
    assert as_exact_as_torch(lengths, 8, K, E, dtype)


@pytest.mark.gpu
@NEEDS_GPU
def test_long_and_short_segments_in_a_row():
    assert as_exact_as_torch_in_parts([1, 24_576, 3, 8_000, 1, 129], 4, 1, 128, torch.bfloat16)


def as_exact_as_torch_in_parts(lengths, H, K, E, dtype) -> bool:
    """As above, segment by segment: a long one would hide what is wrong in a short one. The truth
    is PyTorch's in float32, where every query head has its own keys: in float64, or with shared
    keys, it would hold the square of scores."""
    tensors, cu_seqlens = case(sum(lengths), H, K, E, dtype), segments(lengths)
    exact = run(own_keys, *(x.float() for x in tensors), cu_seqlens)
    ours, theirs = (run(op, *tensors, cu_seqlens) for op in (attention, by_torch))
    for x, y, z, dout in zip(ours, theirs, exact, [tensors[3]] * 4, strict=True):
        parts = (t.float().split(lengths) for t in (x, y, z, dout))
        for mine, usual, true, given in zip(*parts, strict=True):
            floor = 1e-6 * given.norm().clamp(min=true.norm())
            if not (mine - true).norm() <= 2 * (usual - true).norm() + floor:  # nan, too
                return False
    return True


def own_keys(q, k, v, cu_seqlens, max_seqlen) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return by_torch(q, k, v, cu_seqlens, max_seqlen)


def test_a_long_row_is_compared_in_parts():
    assert as_exact_as_torch_in_parts([1, 40, 3, 9], 2, 1, 64, torch.float32)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("E", [64, 128])
def test_half_precision_stays_within_segments_with_the_same_bits(E):
    """nan lies around the segments; the bits are those of the segment alone."""
    tensors = [torch.full_like(x, torch.nan) for x in case(2500, 8, 4, E, torch.bfloat16)]
    for x, y in zip(tensors, case(2000, 8, 4, E, torch.bfloat16), strict=True):
        x[300:2300] = y
    cu_seqlens = torch.tensor([300, 301, 1330, 2300], dtype=torch.int32, device=DEVICE)
    once, again = (run(attention, *tensors, cu_seqlens) for _ in range(2))
    alone = run(attention, *(x[301:1330] for x in tensors), segments([1029]))
    for a, b, c in zip(once, again, alone, strict=True):
        assert a[300:2300].isfinite().all() and torch.equal(a[300:2300], b[300:2300])
        assert torch.equal(a[301:1330], c)


@pytest.mark.gpu
@NEEDS_GPU
def test_8k_tokens_need_no_square_and_no_look_at_the_lengths():
    tensors, cu_seqlens = case(8192, 32, 8, 128, torch.bfloat16), segments([8192])
    run(attention, *tensors, cu_seqlens)  # compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [x.requires_grad_() for x in tensors[:3]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attention(*leaves, cu_seqlens, 8192)
        gradients = torch.autograd.grad(out, leaves, tensors[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made = sum(x.numel() * 2 for x in (out, *gradients)) + 2 * 32 * 8192 * 4  # lse, delta
    assert torch.cuda.max_memory_allocated() - before <= made + 2**20
    half = [x[:, :4] if x.shape[1] == 32 else x[:, :1] for x in (*tensors, out, *gradients)]
    theirs = errors(run(by_torch, *half[:4], cu_seqlens), half[:4], cu_seqlens)
    assert (errors([x.detach() for x in half[4:]], half[:4], cu_seqlens) <= 2 * theirs).all()


@pytest.mark.gpu
@NEEDS_GPU
def test_offsets_past_int32():
    """The last of many segments, 2**31 elements into the row, has the bits it has alone."""
    n = 2**31 // (32 * 128) // 1000 + 1
    if torch.cuda.get_device_properties(DEVICE).total_memory < 48 * 2**30:
        pytest.skip("needs 48 GiB")
    last = case(1000, 32, 8, 128, torch.bfloat16)
    tensors = [torch.zeros(1000 * n, *x.shape[1:], dtype=x.dtype, device=DEVICE) for x in last]
    for x, y in zip(tensors, last, strict=True):
        x[-1000:] = y
    packed = run(attention, *tensors, segments([1000] * n))
    alone = run(attention, *last, segments([1000]))
    assert all(torch.equal(x[-1000:], y) for x, y in zip(packed, alone, strict=True))
