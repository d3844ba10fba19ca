"""--recompute lean and full give the gradients of none; they keep what stages/memory.py says."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import kernels
from nanomed.batches.packing import row_from
from nanomed.config import SFT, InputError
from nanomed.distributed import full, shard
from nanomed.model import recompute
from nanomed.model.decoder import Aquila, init_weights

ROW = [range(40), range(7), range(3, 60)]


def gradients(world, config, policy, dtype=torch.float32):
    """Of one row, through shard() as a run does it, with dropout."""
    with torch.device("meta"):
        model = Aquila(config, dropout=0.3)
    recompute.set_recompute(model, policy)
    shard(model, world, dtype)
    model.to_empty(device=world.device)
    init_weights(model)
    torch.manual_seed(5 + world.rank)
    model(row_from(ROW)).nll.sum().backward()
    return {name: full(p.grad).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_lean_changes_no_gradient(pool, small, n_ranks):
    """In bf16 bit for bit, with the same dropout masks. In float32 the plain norm reads its input
    twice, and the three terms of that input's gradient are added in another order."""
    for dtype, tolerance in ((torch.bfloat16, 0), (torch.float32, 1e-6)):
        wanted, lean, whole, mixed = (
            pool(n_ranks, gradients, small, policy, dtype)[0]
            for policy in (*recompute.POLICIES, "full:1")
        )
        for name, grad in wanted.items():
            if "k_proj.bias" not in name:  # 0 but for rounding: softmax ignores a common shift
                for found in (lean, mixed):
                    assert (found[name] - grad).norm() <= tolerance * grad.norm(), name
            assert torch.equal(whole[name], grad), name


def test_the_first_layers_are_computed_again(small):
    assert recompute.by_layer("full:1", 3) == ["full", "lean", "lean"]
    assert recompute.by_layer("full:0", 2) == ["lean"] * 2
    assert recompute.by_layer("full:2", 2) == recompute.by_layer("full", 2)
    with pytest.raises(InputError, match="full:3: the model has 2 layers"):
        recompute.set_recompute(Aquila(small), "full:3")
    for wrong in ("fully", "full:", "full:-1", "lean:2", "none:1"):
        with pytest.raises(InputError, match=r"--recompute is .*so many layers full"):
            SFT(recompute=wrong)


def test_a_function_that_changes_between_its_runs_is_seen(pool, small, monkeypatch):
    """Planted: a swiglu that is another one when it runs again."""
    runs = []

    def swiglu(gate, up):
        runs.append(1)
        return torch.nn.functional.silu(gate) * up * (1 + (len(runs) > small.n_layers))

    row, model = row_from(ROW), Aquila(small)
    recompute.set_recompute(model, "lean")
    model(row).nll.sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(kernels, "swiglu", swiglu)
    model(row).nll.sum().backward()
    assert not all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))


# ---------------------------------------------------------------- what is kept


class AttentionOfAGPU(torch.autograd.Function):
    """Keeps what flash attention keeps; its numbers mean nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class FusedNorm(torch.autograd.Function):
    """Keeps what a fused norm keeps: its input and one number for each vector."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)


def like_a_gpu(monkeypatch, plain: bool) -> None:
    """The ops keep what they keep there: plain, or fused (RoPE then keeps nothing to speak of)."""

    monkeypatch.setattr(kernels, "attention", lambda q, k, v, *_: AttentionOfAGPU.apply(q, k, v))
    if not plain:
        monkeypatch.setattr(kernels, "rmsnorm", lambda x, w, eps: FusedNorm.apply(x, w))
        monkeypatch.setattr(kernels, "swiglu", FusedSwiGLU.apply)
        monkeypatch.setattr(kernels, "rope", lambda q, k, *_: (q * 1, k * 1))


def kept_bytes(layer, x, row, monkeypatch) -> float:
    """Of unique storages that autograd keeps when the layer runs, without its weights."""
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def count(tensor):
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in weights:
            storage = tensor.untyped_storage()  # held, so that no address comes twice
            kept[storage.data_ptr()] = storage
        return tensor

    # Only the innermost hooks are asked, so ours stand inside those of recompute.py, too.
    monkeypatch.setattr(
        recompute,
        "saved_tensors_hooks",
        lambda pack, unpack: saved_tensors_hooks(lambda tensor: count(pack(tensor)), unpack),
    )
    with saved_tensors_hooks(count, lambda tensor: tensor):
        layer(x, row)
    return sum(storage.nbytes() for storage in kept.values())
