"""The CUDA path on a machine without a GPU: tests/pretend.py refuses what CUDA would refuse.

FSDP and NCCL are not in it: the model is whole, and a sum over ranks does nothing but check that it
was given tensors of the GPU.
"""

import dataclasses
import inspect
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch.nn.attention.varlen import varlen_attn

import kernels
import train_cpt
import train_dpo
import train_sft
from nanomed import distributed
from nanomed.batches.packing import row_from
from nanomed.config import MODELS, SFT, InputError
from nanomed.distributed import World
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.generation import Sampling, generate
from nanomed.model.recompute import set_recompute
from nanomed.run import checkpoint, log
from nanomed.run.log import Meter, RunFolder
from nanomed.run.saves import HostCopy
from nanomed.stages import memory, stage
from nanomed.training import step
from nanomed.training.optim import adamw
from nanomed.training.reference import check_start, reference_logps
from nanomed.training.step import reduced, train_step
from nanomed.training.trainer import fit
from tests import pretend
from tests.conftest import ROOT
from tests.pretend import CUDA, Pretended, pretended
from tests.training import test_dpo, test_exactness
from tests.training.test_exactness import metrics_of, next_token_loss, settings

WORLD = World(0, 1, CUDA, mesh=None)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


@pytest.fixture
def gpu(world, monkeypatch):
    """A GPU of one process, with the plain kernels."""
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, of_the_gpu)
    monkeypatch.setattr(step, "get_total_norm", norm_of)  # torch's asks C++ for devices
    monkeypatch.setattr(step, "clip_grads_with_norm_", lambda *_: None)
    kernels.use("reference")
    with pretended() as device:
        yield device
    kernels.use("auto")


def of_the_gpu(values, **_):
    assert isinstance(values, Pretended), "NCCL takes no CPU tensors"


def norm_of(grads):
    return torch.stack([grad.norm() for grad in grads]).norm()


def model_on_gpu(config, dtype=torch.bfloat16, recompute="none") -> Aquila:
    with torch.device("meta"):
        model = Aquila(config).to(dtype)
    set_recompute(model, recompute)
    model.to_empty(device=CUDA)
    init_weights(model)
    return model


# ---------------------------------------------------------------- the device itself


def test_what_cuda_refuses_is_refused(gpu):
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    assert on_gpu.device == CUDA and (on_gpu + torch.tensor(1.0)).is_cuda  # a number may be there
    for mixed in (
        lambda: on_gpu + on_cpu,
        lambda: torch.stack([on_gpu[0], on_cpu[0]]),
        lambda: on_cpu[torch.zeros(1, dtype=torch.int64, device="cuda")],
        lambda: torch.nn.functional.embedding(torch.arange(2), on_gpu[:, None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        on_gpu.numpy()


# ---------------------------------------------------------------- model and step


@pytest.mark.parametrize("recompute", ["none", "lean", "full"])
def test_the_model_on_a_gpu_is_the_model_on_a_cpu(gpu, small, recompute):
    """In bfloat16, where a GPU takes varlen_attn with the borders, and with its groups of heads if
    this torch's has them."""
    pretend._heads.clear()
    row = row_from([range(40), range(7), range(3, 60)])
    on_cpu = Aquila(small).bfloat16()
    init_weights(on_cpu)
    on_gpu = model_on_gpu(small, recompute=recompute)
    wanted, found = on_cpu(row).nll, on_gpu(row.to(CUDA)).nll
    assert (found.cpu() - wanted).norm() < 1e-2 * wanted.norm()
    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # an older torch: no
    n_kv_heads = small.n_kv_heads if takes_groups else small.n_heads
    assert set(pretend._heads) == {(small.n_heads, n_kv_heads)}
    wanted.sum().backward()
    found.sum().backward()
    for (name, p), q in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        if "k_proj.bias" not in name:  # 0 but for rounding
            assert (q.grad.cpu() - p.grad).norm() < 2e-2 * p.grad.norm(), name


def test_the_host_waits_for_the_gpu_at_the_end_of_a_step_alone(gpu, small):
    """And not at all for what a step that shows its numbers adds, but to read them."""
    c = settings(batch_size=16, micro_tokens=128)
    cases = [
        (c, test_exactness.loader_of(WORLD, 16, c), next_token_loss),
        (test_dpo.C, test_dpo.loader_of(WORLD, test_dpo.C, 16), dpo_loss(16)),
    ]
    for c, loader, loss in cases:
        model = model_on_gpu(small)
        optimizer, meter = adamw(model, 0.1), Meter(small, 1)
        n_rows = len(loader.step(0))
        gpu.waits.clear()
        result = train_step(c, model, optimizer, loader, loss, 0, 1e-3, meter)
        assert n_rows > 1 and gpu.waits == ["tolist", "aten._local_scalar_dense.default"]
        values = reduced(result, loader.divisor(0), meter)
        assert math.isfinite(values["loss"]) and 0 < values["trained_share"] < 1


def test_a_step_that_is_not_finite(gpu, small):
    """It is counted layer by layer, and no weight has moved."""
    c = settings(batch_size=16, micro_tokens=128)
    model, loader = model_on_gpu(small), test_exactness.loader_of(WORLD, 16, c)
    optimizer, before = adamw(model, 0.1), model.lm_head.weight.clone()
    model.norm.weight.data[0] = torch.nan
    result = train_step(c, model, optimizer, loader, next_token_loss, 0, 1e-3, Meter(small, 1))
    assert not result.applied and set(result.layers) >= {"layers.0", "lm_head", "norm"}
    assert torch.equal(model.lm_head.weight.cpu(), before.cpu())


def dpo_loss(n: int):
    reference = test_dpo.random_reference(n).to(CUDA)
    kinds = (torch.arange(n) % 2).to(CUDA)
    names = ["subjective", "objective"]
    return train_dpo.preference_loss(reference, kinds, names, test_dpo.C)


@pytest.mark.parametrize("save", ["blocking", "background"])
def test_fit_on_a_gpu(gpu, small, tmp_path, save):
    """Validation, steps, saves, the best checkpoint; then on from the first checkpoint."""
    c = settings(out=str(tmp_path / "x"), batch_size=8, epochs=1, save_every=1, save=save)
    c = dataclasses.replace(c, min_lr_ratio=0.5)
    run, loader = RunFolder(c, WORLD), test_exactness.loader_of(WORLD, 16, c)
    model = model_on_gpu(small, torch.float32)
    fit(c, model, loader, next_token_loss, run)
    trained = [p.detach().cpu() for p in model.parameters()]
    losses = metrics_of(tmp_path / "x")
    stage.load_best(model, run)
    run.close()
    checkpoint.delete(tmp_path / "x/checkpoints/step-000002")

    again = dataclasses.replace(c, resume="latest")
    run, model = RunFolder(again, WORLD), model_on_gpu(small, torch.float32)
    fit(again, model, loader, next_token_loss, run)
    run.close()
    assert metrics_of(tmp_path / "x") == losses
    for p, wanted in zip(model.parameters(), trained, strict=True):
        assert torch.equal(p.cpu(), wanted)


def test_the_reference_of_dpo_on_a_gpu(gpu, small, tmp_path):
    c = dataclasses.replace(test_dpo.C, out=str(tmp_path / "x"))
    run, loader = RunFolder(c, WORLD), test_dpo.loader_of(WORLD, c, 24)
    model = model_on_gpu(small, torch.float32)
    reference = reference_logps(model, loader, run, torch.float32)
    assert reference.is_cuda
    kinds = torch.zeros(24, dtype=torch.int64, device=CUDA)
    check_start(
        model, loader, train_dpo.preference_loss(reference, kinds, [], c), c.beta, True, run
    )


# ---------------------------------------------------------------- copies, generation


def test_a_copy_in_host_memory_is_waited_for(gpu):
    """It is page-locked, so the copy goes on when copy_ returns; until then it is full of NaN."""
    weights = torch.arange(6.0, device=CUDA)
    host = HostCopy()
    for add in (1, 2):  # the second copy goes into the same memory
        weights += add
        host.take({"w": weights})
        weights.zero_()
        assert gpu.pinned and host.tensors["w"].tolist() == [x + add for x in range(6)]
        weights.copy_(torch.arange(6.0))


@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}])
def test_generation_waits_for_each_token_alone(gpu, small, drawn):
    """And finds what the CPU finds, with prompts of several lengths and places that fall idle."""
    prompts = [[1, 2, 3], [4], list(range(9)), [7, 7]]
    sampling = Sampling(max_new=8, repetition_penalty=1.2, **drawn)
    wanted = generate(Aquila(small), prompts, {5}, sampling)
    model = model_on_gpu(small, torch.float32).eval()
    gpu.waits.clear()
    assert generate(model, prompts, {5}, sampling) == wanted
    reads = gpu.waits.count("tolist") - small.n_layers  # float32's attention asks for the borders
    assert reads == max(len(ids) + (end == "stop") for ids, end in wanted)
    assert not [w for w in gpu.waits if w.startswith("aten.")]


# ---------------------------------------------------------------- processes


class Joined(Exception):
    pass


def start_on_gpu(monkeypatch, error) -> list:
    """What distributed.start() asks torch for, if `error` comes up inside."""
    asked = []
    monkeypatch.setattr(distributed, "_join", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("left"))
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    with pretended(), pytest.raises(type(error)), distributed.start(CUDA):
        raise error
    return asked


def test_objects_go_through_gloo(monkeypatch):
    """How long each of the two waits: tests/test_meeting.py."""
    (backend, *_), *_ = start_on_gpu(monkeypatch, SystemExit())
    assert backend == "cpu:gloo,cuda:nccl"


def test_a_rank_that_fails_alone_does_not_wait_for_the_others(monkeypatch):
    """destroy_process_group() finishes what NCCL has begun; the others never do their part."""
    assert "left" not in start_on_gpu(monkeypatch, Joined())
    assert "left" in start_on_gpu(monkeypatch, SystemExit(143))  # all ranks end by a signal


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pretended(), pytest.raises(InputError, match=r"9 processes.* torch sees 8 GPUs"):
        distributed.pick_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pretended():
        assert distributed.pick_device("auto") == torch.device("cuda", 7)


def test_mfu_is_a_share_of_what_this_gpu_can_do(monkeypatch):
    values = {}
    with pretended():
        for name in ("H200", "H200 NVL", "H100 PCIe", "H800 PCIe", "A100-SXM4-40GB", "T4"):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: f"NVIDIA {name}")
            values[name] = log.peak_flops()
    assert list(values.values()) == [989e12, 835e12, 756e12, 756e12, 312e12, None]


def test_a_runs_end_has_the_measured_peak_beside_the_prediction(monkeypatch):
    """Of torch's tensors: the reserve is none of them."""
    model, c = MODELS["aquilamed-7b"], SFT(micro_tokens=8192, dropout=0.0, kernels="triton")
    predicted = sum(memory.memory(model, c, 8).values()) - memory.RESERVE
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(1.25 * predicted * 2**30))
    assert memory.compared(model, c, 8) == (
        f"memory: {1.25 * predicted:.2f} GiB at most allocated on this GPU, {predicted:.2f} GiB "
        "predicted for full rows of 8,192 tokens (+25%)"
    )


def test_an_export_on_a_gpu_says_so(monkeypatch):
    printed = []
    run = SimpleNamespace(world=WORLD, path=Path("x"), print=printed.append)
    model = SimpleNamespace(config=MODELS["tiny"], decided=SFT())
    encoder = SimpleNamespace(tokenizer=None, template=None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**29)
    monkeypatch.setattr(stage.hf, "export", lambda *_, **__: None)
    stage.export(SFT(), model, encoder, run)
    assert printed[0].startswith("memory: 1.50 GiB at most allocated on this GPU, ")


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu(world, monkeypatch, small):
    """Its rates and its memory are not the GPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # a save looks for streams
    assert "mfu_causal" not in Meter(small, 1).read(world.device)
    assert log.peak_memory() > 2**20


# ---------------------------------------------------------------- whole scripts


@pytest.mark.parametrize(
    "script, flags",
    [
        (train_cpt, "--recompute full"),  # two seconds; the others take twenty
        pytest.param(train_sft, "--recompute lean --save background", marks=pytest.mark.slow),
        pytest.param(train_dpo, "--dropout 0 --model tiny", marks=pytest.mark.slow),
    ],
)
def test_a_script_on_a_gpu(gpu, script, flags, tmp_path, monkeypatch, capsys):
    """From its first line to the export, but for FSDP: answers and exam included."""
    init = dist.init_process_group
    monkeypatch.chdir(ROOT)
    dist.destroy_process_group()
    monkeypatch.setattr(
        dist, "init_process_group", lambda b, **k: init(b.replace("nccl", "fake"), **k)
    )
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(stage, "shard", lambda model, world, dtype: model.to(dtype))
    given = f"--device cuda --kernels reference --steps 2 --out {tmp_path / 'x'} {flags}"
    monkeypatch.setattr(sys, "argv", ["script", *given.split()])
    try:
        script.main()
    finally:  # as the fixture `world` left it; a run that fails on a GPU keeps its group
        if dist.is_initialized():
            dist.destroy_process_group()
        init("gloo", rank=0, world_size=1, store=dist.HashStore())
    assert (tmp_path / "x/export/model.safetensors").exists()
    assert "MFU" in capsys.readouterr().out
