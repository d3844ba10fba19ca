"""Frozen weights (`requires_grad_(False)`) stay bit for bit and have no moments; all others train,
are saved and resumed as ever."""

import dataclasses
import math

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from nanomed.batches.packing import row_from
from nanomed.distributed import full
from nanomed.run import checkpoint
from nanomed.run.log import RunFolder
from nanomed.training.alone import master, split_weights
from nanomed.training.step import gradient_norms
from nanomed.training.trainer import fit
from tests.training.test_exactness import loader_of, metrics_of, next_token_loss, settings, sharded

# Two units of FSDP whole, and parts of two others.
FROZEN = ["embed_tokens.", "layers.0.", "layers.1.post_attention_layernorm.", "lm_head."]
FROZEN += ["layers.1.mlp.up_proj.", "layers.1.self_attn.k_proj.bias"]
WAYS = [(1, "bf16"), (2, "float32"), (1, "split")]


def build(world, config, way: str, frozen: list[str]):
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    model = sharded(world, config, recompute="lean", dtype=dtype)
    if way == "split":
        split_weights(model, way)
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in frozen))
    return model


def train(world, config, out: str, way: str, resume: str = ""):
    """(names of frozen weights, all weights before, after) 4 steps; a checkpoint every second."""
    c = settings(batch_size=16, micro_tokens=256, epochs=5, out=out, save_every=2)
    c = dataclasses.replace(c, resume=resume)
    model = build(world, config, way, FROZEN)
    still = [name for name, param in model.named_parameters() if not param.requires_grad]
    before = weights(model)
    run = RunFolder(c, world)
    fit(c, model, loader_of(world, 61, c, max_steps=4), next_token_loss, run)
    run.close()
    return still, before, weights(model), checkpoint.size_of(model)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: full(master(p)).clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("n_ranks, way", WAYS)
def test_frozen_weights_stay_and_the_others_train(pool, small, tmp_path, n_ranks, way):
    """A resume from step 2 is bitwise; what a checkpoint takes is what is counted for it."""
    out = tmp_path / "run"
    still, before, after, counted = pool(n_ranks, train, small, str(out), way)[0]
    assert all(any(part in name for name in still) for part in FROZEN)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in still), name

    saved = out / "checkpoints/step-000002"
    tensors = FileSystemReader(saved).read_metadata().state_dict_metadata
    moments = {key for key in tensors if key.endswith(".exp_avg")}
    assert moments == {f"optimizer.state.{name}.exp_avg" for name in before if name not in still}
    values = [x for x in tensors.values() if hasattr(x, "size") and x.size.numel() > 1]
    assert counted == sum(x.size.numel() * x.properties.dtype.itemsize for x in values)

    straight = metrics_of(out)
    checkpoint.delete(out / "checkpoints/step-000004")
    _, _, again, _ = pool(n_ranks, train, small, str(out), way, "latest")[0]
    assert metrics_of(out) == straight
    assert all(torch.equal(again[name], after[name]) for name in after)


def gradients(world, config, way: str, frozen: list[str]) -> dict[str, torch.Tensor]:
    model = build(world, config, way, frozen)
    model(row_from([range(40), range(7)])).nll.sum().backward()
    assert 0 < gradient_norms(model)["layers.1"] < math.inf
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: full(p.grad).clone() for name, p in trained.items()}


@pytest.mark.parametrize("n_ranks, way", WAYS)
def test_the_others_have_the_gradients_that_they_had(pool, small, n_ranks, way):
    wanted, found = (pool(n_ranks, gradients, small, way, names)[0] for names in ([], FROZEN))
    assert 0 < len(found) < len(wanted)
    assert all(torch.equal(grad, wanted[name]) for name, grad in found.items())
