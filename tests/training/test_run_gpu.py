"""A run on a GPU, with FSDP, NCCL, background saves and a resume, against the same run on the CPU.

The case "cpu" runs the same lines where there is no GPU.
"""

import dataclasses
import math

import pytest
import torch

import kernels
from nanomed.config import SFT
from nanomed.distributed import fill, full, shard, start
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.recompute import set_recompute
from nanomed.run import checkpoint
from nanomed.run.log import RunFolder
from nanomed.training.alone import master, split_weights
from nanomed.training.trainer import fit
from tests.training.test_exactness import loader_of, metrics_of, next_token_loss, settings
from tests.training.test_frozen import FROZEN

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = torch.bfloat16


def train(device: str, dtype: torch.dtype, config, c: SFT, frozen: list[str]) -> list[dict]:
    """Six steps from weights that are the same on every device; what the run wrote down. Weights
    whose names have a part in `frozen` do not move."""
    on_cpu = Aquila(config)
    init_weights(on_cpu)
    with start(torch.device(device)) as world:
        with torch.device("meta"):
            model = Aquila(config)
        set_recompute(model, c.recompute)
        if c.optimizer == "fsdp":
            shard(model, world, dtype)
        model.to_empty(device=world.device)
        for param, whole in zip(model.parameters(), on_cpu.parameters(), strict=True):
            fill(param, whole.detach().to(world.device))
        if c.optimizer != "fsdp":
            split_weights(model, c.optimizer)
        still = {n: p for n, p in model.named_parameters() if any(part in n for part in frozen)}
        before = {name: full(master(p.requires_grad_(False))).clone() for name, p in still.items()}
        run = RunFolder(c, world)
        fit(c, model, loader_of(world, 61, c, max_steps=6), next_token_loss, run)
        assert all(p.device == world.device for p in model.parameters())
        assert all(torch.equal(full(master(p)), before[name]) for name, p in still.items())
        run.close()
    return metrics_of(run.path)


def losses(metrics: list[dict]) -> list[float]:
    return [value for m in metrics for name, value in m.items() if name.endswith("loss")]


@pytest.mark.parametrize(
    "device, dtype, use, recompute, optimizer, frozen, tolerance",
    [
        pytest.param("cpu", BF16, "auto", "full", "fsdp", [], 0.01, marks=pytest.mark.slow),
        pytest.param("cpu", BF16, "auto", "lean", "split", FROZEN, 0.01, marks=pytest.mark.slow),
        pytest.param("cuda:0", torch.float32, "reference", "none", "fsdp", [], 1e-4, marks=GPU),
        pytest.param("cuda:0", BF16, "reference", "full", "fsdp", [], 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "lean", "fsdp", [], 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "full:1", "split", [], 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "none", "split_host", [], 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "full", "fsdp", FROZEN, 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "lean", "split", FROZEN, 0.01, marks=GPU),
        pytest.param("cuda:0", BF16, "auto", "full", "split_host", FROZEN, 0.01, marks=GPU),
    ],
)
def test_a_run_is_the_cpus(
    small, tmp_path, device, dtype, use, recompute, optimizer, frozen, tolerance
):
    """Steps and validations, with saves in the background; once more from a checkpoint."""
    c = settings(batch_size=16, lr=3e-3, eval_every=3, save="blocking", optimizer="fsdp")
    c = dataclasses.replace(c, out=str(tmp_path / "cpu"))
    wanted = losses(train("cpu", torch.float32, small, c, frozen))
    out = tmp_path / "x"
    changes = dict(out=str(out), save="background", recompute=recompute, optimizer=optimizer)
    kernels.use(use)
    try:
        found = train(device, dtype, small, dataclasses.replace(c, **changes), frozen)
        checkpoint.delete(out / "checkpoints/step-000006")
        again = dataclasses.replace(c, **changes, resume="latest")
        resumed = train(device, dtype, small, again, frozen)
    finally:
        kernels.use("auto")
    assert losses(found) == pytest.approx(wanted, rel=tolerance)
    assert losses(resumed) == pytest.approx(wanted, rel=tolerance)
    assert len(wanted) == 9
    assert math.isfinite(sum(m.get("grad_norm", 0) for m in resumed))
