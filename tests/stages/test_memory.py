"""nanomed/stages/memory.py against torch's own FSDP memory tracker, and against counted bytes."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from kernels import linear_nll_chunked
from kernels.linear_nll_chunked import CHUNK_CUDA
from nanomed.batches.packing import Row
from nanomed.config import MODELS, SFT, InputError
from nanomed.distributed import Sharing, World, local, shard, sum_in_backward
from nanomed.model.decoder import Aquila
from nanomed.model.recompute import set_recompute
from nanomed.stages import memory
from nanomed.tools import memory as tool
from nanomed.training.optim import adamw
from tests.model.test_recompute import like_a_gpu


def every_token_is_trained(labels: torch.Tensor) -> torch.Tensor:
    """In the place of nonzero(): fake tensors have no values to choose by."""
    return torch.arange(len(labels))[:, None]


def tracked(model_config, c, n_gpus, monkeypatch) -> float:
    """The peak in GiB of a second row's forward and backward, on one of n_gpus in a process group
    whose collectives do nothing. Tensors are fake: they have a size and take no memory."""
    like_a_gpu(monkeypatch, plain=True)
    monkeypatch.setattr(linear_nll_chunked, "LOGITS_CPU", CHUNK_CUDA * model_config.vocab_size)
    dist.init_process_group("fake", rank=0, world_size=n_gpus, store=FakeStore())
    device, t = torch.device("cpu"), c.micro_tokens
    try:
        mesh = init_device_mesh("cpu", (n_gpus,))
        with FakeTensorMode():
            with torch.device("meta"):
                model = Aquila(model_config)
            set_recompute(model, c.recompute)
            once = c.sum_gradients == "step"
            shard(model, World(0, n_gpus, device, mesh), torch.bfloat16, Sharing(once=once))
            model.to_empty(device=device)
            optimizer = adamw(model, 0.1)
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
            if once:  # else there are some of an earlier row
                optimizer.zero_grad()
            ids = torch.zeros(t, dtype=torch.int64)
            row = Row(ids, ids, ids, torch.tensor([0, t], dtype=torch.int32), t, ids[:1])
            monkeypatch.setattr(torch.Tensor, "nonzero", every_token_is_trained)
            with FSDPMemTracker(model, optimizer) as tracker:
                for last in (False, True):
                    sum_in_backward(model, last)
                    model(row).nll.sum().backward()
            return tracker.get_tracker_snapshot("peak")[device]["Total"] / memory.GIB
    finally:
        dist.destroy_process_group()


def assert_counted(
    monkeypatch, n_layers, n_gpus, recompute, micro_tokens, tolerance, sums="row", **changes
):
    model = dataclasses.replace(MODELS["aquilamed-7b"], n_layers=n_layers, **changes)
    c = SFT(micro_tokens=micro_tokens, recompute=recompute, dropout=0.0, kernels="reference")
    c = dataclasses.replace(c, sum_gradients=sums)
    counted = tracked(model, c, n_gpus, monkeypatch)
    predicted = sum(memory.memory(model, c, n_gpus).values()) - memory.RESERVE
    assert predicted == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize("n_gpus, recompute", [(8, "none"), (8, "full:1"), (1, "full")])
def test_the_peak_is_what_torchs_tracker_counts(monkeypatch, n_gpus, recompute):
    """AquilaMed with 2 of its layers. The peak is in the head's backward. A lean that keeps what
    it should not is seen: 0.4 GiB of 10."""
    assert_counted(monkeypatch, 2, n_gpus, recompute, 4096, tolerance=0.001)


@pytest.mark.parametrize("n_gpus, recompute", [(8, "full:1"), (1, "lean")])
def test_the_peak_if_gradients_are_summed_once_a_step(monkeypatch, n_gpus, recompute):
    """Until then they are whole, in float32."""
    assert_counted(monkeypatch, 2, n_gpus, recompute, 4096, tolerance=0.001, sums="step")


@pytest.mark.parametrize("recompute", ["none", "lean"])
def test_the_peak_of_other_shapes(monkeypatch, recompute):
    """Wider heads than d_model / n_heads, norms of q and k, all biases: 5% of the peak."""
    others = {"head_dim": 192, "qk_norm": True, "o_bias": True}
    assert_counted(monkeypatch, 2, 8, recompute, 4096, 0.001, **others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute, micro_tokens", [("full", 32_768), ("lean", 8192), ("full:12", 32_768)]
)
def test_the_peak_of_the_whole_model(monkeypatch, recompute, micro_tokens):
    """The first has its peak in a layer's backward."""
    assert_counted(monkeypatch, 32, 8, recompute, micro_tokens, tolerance=0.002)


def state_bytes(world, config) -> dict[str, float]:
    with torch.device("meta"):
        model = Aquila(config)
    shard(model, world, torch.float32)
    model.to_empty(device=world.device)
    optimizer = adamw(model, 0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    moments = [x for s in optimizer.state.values() for n, x in s.items() if n != "step"]
    counted = {
        "weights": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters()],
        "optimizer": moments,
    }
    return {name: sum(local(x).nbytes for x in xs) for name, xs in counted.items()}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_states_are_counted_bytes(pool, small, n_ranks):
    """Over all ranks exactly; a rank has its share but for the row that an odd number leaves."""
    ranks, wanted = pool(n_ranks, state_bytes, small), memory.states(small, n_ranks)
    for name, share in wanted.items():
        assert sum(rank[name] for rank in ranks) == share * n_ranks, name
        assert all(rank[name] == pytest.approx(share, rel=0.02) for rank in ranks), name


@pytest.mark.parametrize("tokens", [3000, 8192, 8300, 9000])
def test_no_loss_chunk_is_larger_than_predicted(tokens):
    """However many tokens of the row are trained; and one number of them makes it as large."""
    linear_nll = pytest.importorskip("kernels.linear_nll_triton")
    model = MODELS["aquilamed-7b"]
    chunks = [linear_nll.chunk_tokens(n, model.d_model) for n in range(tokens + 1)]
    room = max(chunks) * linear_nll._stride(model.vocab_size)
    c = SFT(micro_tokens=tokens, kernels="triton")
    assert memory.loss_chunk(model, c) == 2 * room


def test_the_tool(capsys):
    flags = ["--hardware", "8x40,312,300", "--model", "aquilamed-7b", "--dtype", "bf16"]
    tool.main([*flags, "--micro_tokens", "32768"])
    text = capsys.readouterr().out
    model, c = MODELS["aquilamed-7b"], SFT(micro_tokens=32_768, dropout=0.0, dtype="bf16")
    for part in (
        *memory.memory(model, c, 8),
        "DOES NOT FIT; --recompute",
        "with --recompute lean",
        "bound: ",
    ):
        assert part in text
    with pytest.raises(InputError, match="--gpus is 0; it must be at least 1"):
        tool.main(["--gpus", "0"])
    with pytest.raises(InputError, match="did you mean --micro_tokens"):
        tool.main(["--micro_token", "8"])
