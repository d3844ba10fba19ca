"""One GPU without FSDP (nanomed/training/alone.py), on a CPU: against torch's AdamW in float32, and
against the same run under FSDP2."""

import copy
import dataclasses
import gc
import json
from unittest import mock

import pytest
import torch

import kernels
from kernels.split_adamw import join, rounded_at_random, split
from nanomed.batches.packing import row_from
from nanomed.config import MODELS, SFT, InputError, ModelConfig
from nanomed.distributed import World
from nanomed.model.decoder import Aquila, init_weights
from nanomed.run import checkpoint
from nanomed.run.log import RunFolder
from nanomed.stages import hardware, link, memory, stage
from nanomed.stages.hardware import Hardware
from nanomed.training import alone
from nanomed.training.alone import split_weights
from nanomed.training.optim import adamw
from nanomed.training.reference import fingerprint
from nanomed.training.trainer import fit
from tests.pretend import CUDA, pretended
from tests.training.test_exactness import loader_of, metrics_of, next_token_loss, settings, sharded


def halves(config, optimizer="split", seed=0) -> Aquila:
    model = Aquila(config)
    init_weights(model, seed)
    split_weights(model, optimizer)
    return model


# ---------------------------------------------------------------- numbers


def test_two_halves_are_a_float32():
    """Of all exponents, signs and roundings; the upper one is a cast's result but for ties."""
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32)
    bits = torch.cat([bits, torch.arange(2**17, dtype=torch.int32) + 0x3F800000])
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x.abs() < 3e38)]
    upper, low = split(x)
    assert torch.equal(join(upper, low).view(torch.int32), x.view(torch.int32))
    ties = x.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(upper[~ties], x.bfloat16()[~ties]) and ties.sum() >= 2
    assert ((upper.float() - x).abs() <= (x.bfloat16().float() - x).abs()).all()


def test_rounding_at_random_is_right_on_average():
    """The mean of 2,500 roundings within 4 standard errors; each is a neighbour."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200), torch.randn(50) * 1e-12, torch.tensor([1 + 2**-12, -1e-30])])
    drawn = torch.stack([rounded_at_random(x).double() for _ in range(2_500)])
    error = drawn.std(0, correction=1) / 50
    assert ((drawn.mean(0) - x.double()).abs() <= 4 * error + 1e-45).float().mean() > 0.99
    assert ((drawn - x.double()).abs() <= 2**-7 * x.double().abs()).all()
    exact = torch.tensor([0.0, 1.0, -0.5])
    assert torch.equal(rounded_at_random(exact).float(), exact)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("way", ["split", "split_host"])
def test_twenty_steps_are_float32_adamw_bit_for_bit(small, monkeypatch, way, clips):
    monkeypatch.setattr(alone, "CHUNK", 4096)  # several for each matrix
    ours, theirs = halves(small, way), Aquila(small)
    init_weights(theirs)
    optimizer, wanted = adamw(ours, 0.1), adamw(theirs, 0.1)
    assert isinstance(wanted, torch.optim.AdamW) and isinstance(optimizer, alone.SplitAdamW)
    draw = torch.Generator().manual_seed(1)
    for step in range(20):
        for group in (*optimizer.param_groups, *wanted.param_groups):
            group["lr"] = 1e-3 / (step + 1)
        scale = torch.tensor(0.3) if clips and step % 2 else None
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=draw) * 1e-2
            q.grad = p.grad * scale if scale is not None else p.grad.clone()
        optimizer.scale = scale
        optimizer.step()
        wanted.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(join(p.detach(), p.low), q)
        for name, value in wanted.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_what_lies_in_the_hosts_memory_passes_over_the_gpu(small, monkeypatch):
    """Page-locked, there and back; the host waits at the end of a step; and a checkpoint of it."""
    monkeypatch.setattr(alone, "CHUNK", 4096)
    kernels.use("reference")
    on_cpu = halves(small)
    with pretended() as gpu:
        with torch.device("meta"):
            on_gpu = Aquila(small)
        on_gpu.to_empty(device=CUDA)
        init_weights(on_gpu)
        split_weights(on_gpu, "split_host")
        optimizers = [adamw(model, 0.1) for model in (on_cpu, on_gpu)]
        for step in range(3):
            for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                q.grad = p.grad.to(CUDA)
            gpu.waits.clear()
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 1e-2
                optimizer.step()
            assert gpu.waits == ["synchronize"] * 2  # one for each stream
            # Two take turns, and neither begins before the gradients are there.
            first, second, *_ = gpu.streams
            assert first is not second and gpu.streams == [first, second] * (len(gpu.streams) // 2)
            for stream in (first, second):
                stream.wait_stream.assert_called_with(torch.cuda.current_stream())
                assert stream.wait_stream.call_count == step + 1
            gpu.streams.clear()
        for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            assert q.is_cuda and not q.low.is_cuda and gpu.is_pinned(q.low)
            assert torch.equal(q.cpu(), p) and torch.equal(q.low, p.low)
            for name in ("exp_avg", "exp_avg_sq"):
                kept = optimizers[1].state[q][name]
                assert not kept.is_cuda and torch.equal(kept, optimizers[0].state[p][name])
        saved = on_gpu.state_dict()
        for (name, p), q in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
            assert torch.equal(saved[name], join(p.detach(), p.low))
            q.low.zero_()
        on_gpu.load_state_dict(saved)
        for p, q in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
            assert torch.equal(q.low, p.low)
        assert len(gpu.pinned) == 3 * len([*on_gpu.parameters()])
        del on_gpu, optimizers, optimizer, q, kept
        gc.collect()
        assert not gpu.pinned  # memory that is used again can be page-locked again
        gpu.refuses_to_pin = 1
        with torch.device("meta"):
            on_gpu = Aquila(small)
        with pytest.raises(InputError, match=r"page-locks no .* \(CUDA error 1\); .*ulimit"):
            split_weights(on_gpu.to_empty(device=CUDA), "split_host")


def test_gradients_are_summed_in_float32(small):
    """Of several rows; each is what the bfloat16 model gives."""
    model, plain = halves(small), Aquila(small).bfloat16()
    plain.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    sums = [torch.zeros(p.shape) for p in plain.parameters()]
    for row in (row_from([range(40)]), row_from([range(7), range(30)]), row_from([range(9)])):
        model(row).nll.sum().backward()
        plain(row).nll.sum().backward()
        for total, p in zip(sums, plain.parameters(), strict=True):
            total += p.grad
            p.grad = None
    for p, total in zip(model.parameters(), sums, strict=True):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, total)


def test_its_weights_are_known_again_under_fsdp(world, small):
    """By the fingerprint that DPO's reference is kept under."""
    found = [fingerprint(m) for m in (halves(small), sharded(world, small, dtype=torch.bfloat16))]
    assert found[0] == found[1] != fingerprint(halves(small, seed=1))


# ---------------------------------------------------------------- whole runs


def run(world, config, out, way: str, **changes) -> tuple[Aquila, list[dict]]:
    c = settings(batch_size=16, micro_tokens=256, epochs=20, lr=1e-3, out=str(out), save="blocking")
    c = dataclasses.replace(c, dtype="bf16", **changes)
    if way.startswith("split"):
        model = halves(config, way)
    else:
        model = sharded(world, config, dtype=torch.bfloat16)
    folder = RunFolder(c, world)
    fit(c, model, loader_of(world, 61, c, max_steps=c.steps), next_token_loss, folder)
    folder.close()
    return model, metrics_of(out)


def test_a_run_is_fsdps(world, small, tmp_path):
    """Clipping and validation included. At a tie, one weight in 65,536, a cast rounds otherwise."""
    _, ours = run(world, small, tmp_path / "a", "split", steps=12, grad_clip=0.5)
    _, theirs = run(world, small, tmp_path / "b", "fsdp", steps=12, grad_clip=0.5)
    assert len(ours) == len(theirs)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(wanted, rel=2e-3)


def test_moments_in_bfloat16_learn_as_well(world, shallow, tmp_path):
    found = []
    for way in ("split", "split_bf16"):
        _, metrics = run(world, shallow, tmp_path / way, way, steps=20, eval_every=20)
        found.append([m.get("loss", m.get("val_loss")) for m in metrics])
    assert found[0] == pytest.approx(found[1], rel=0.005) and len(found[0]) == 22


@pytest.mark.parametrize("first, second", [("split", "fsdp"), ("fsdp", "split")])
def test_either_reads_the_others_checkpoint(world, small, tmp_path, first, second):
    """The same masters and moments, bit for bit; and it goes on."""
    kept = {"steps": 8, "save_every": 4, "eval_every": 4}
    _, straight = run(world, small, tmp_path / "x", first, **kept)
    checkpoint.delete(tmp_path / "x/checkpoints/step-000008")
    saved = tmp_path / "x/checkpoints/step-000004"
    found = []
    for way in (first, second):
        split = way == "split"
        model = halves(small, seed=9) if split else sharded(world, small, 9, dtype=torch.bfloat16)
        optimizer = adamw(model, 0.1)
        assert checkpoint.load(saved, model, optimizer)["step"] == 4
        masters = [
            join(p.detach(), p.low) if split else p.full_tensor() for p in model.parameters()
        ]
        states = [optimizer.state[p] for p in model.parameters()]
        moments = [state[n] for state in states for n in ("step", "exp_avg", "exp_avg_sq")]
        found.append([*masters, *(getattr(x, "full_tensor", lambda x=x: x)() for x in moments)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    _, resumed = run(world, small, tmp_path / "x", second, resume="latest", **kept)
    for mine, wanted in zip(resumed, straight, strict=True):
        assert mine == pytest.approx(wanted, rel=2e-3)


def test_bf16_moments_are_read_by_fsdp(world, small, tmp_path):
    model, _ = run(world, small, tmp_path / "x", "split_bf16", steps=4)
    other = sharded(world, small, 9, dtype=torch.bfloat16)
    optimizer = adamw(other, 0.1)
    checkpoint.load(tmp_path / "x/checkpoints/latest", other, optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(join(p.detach(), p.low), q.full_tensor())
        assert optimizer.state[q]["exp_avg"].full_tensor().dtype == torch.float32


def test_a_resume_is_bitwise(world, small, tmp_path):
    kept = {"steps": 8, "save_every": 4, "eval_every": 4, "dropout": 0.0}
    wanted, straight = run(world, small, tmp_path / "x", "split_bf16", **kept)
    wanted = copy.deepcopy([(p.detach(), p.low) for p in wanted.parameters()])
    checkpoint.delete(tmp_path / "x/checkpoints/step-000008")
    model, again = run(world, small, tmp_path / "x", "split_bf16", resume="latest", **kept)
    assert json.dumps(again) == json.dumps(straight)
    for p, (upper, low) in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(p, upper) and torch.equal(p.low, low)


# ---------------------------------------------------------------- the choice


def optimizer_of(c: SFT, config: ModelConfig, world: World) -> str:
    return stage.decided_here(c, config, world.device, hardware.this_machine(c, world)).optimizer


def test_who_trains_without_fsdp(world, small):
    cpu = World(0, 1, torch.device("cpu"))
    for c, wanted in (
        (SFT(dtype="bf16", optimizer="split"), "split"),
        (SFT(dtype="bf16", optimizer="split_bf16"), "split_bf16"),
        (SFT(dtype="bf16", optimizer="split_host"), "split_host"),
        (SFT(dtype="bf16"), "fsdp"),  # a CPU
        (SFT(dtype="bf16", optimizer="fsdp"), "fsdp"),
    ):
        assert optimizer_of(c, small, cpu) == wanted
        model = stage.build_model(c, small, dataclasses.replace(world, mesh=world.mesh))
        assert hasattr(model.norm.weight, "low") == (wanted != "fsdp")
    with pytest.raises(InputError, match=r"is for one process .* here are 1 in float32"):
        optimizer_of(SFT(dtype="fp32", optimizer="split"), small, cpu)
    with pytest.raises(InputError, match=r"is for one process .* here are 2"):
        two = World(0, 2, torch.device("cpu"))
        optimizer_of(SFT(dtype="bf16", optimizer="split"), small, two)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_one_gpu_takes_what_fits_it(monkeypatch, capsys):
    """The whole AquilaMed: an H200 has room for all, an 80 GB GPU if the host has 107.2 GiB, the
    float32 weights of a checkpoint among them. --dry_run says the same."""
    c, config = SFT(dtype="bf16", recompute="full"), MODELS["aquilamed-7b"]
    one, gpu = World(0, 1, CUDA), mock.Mock()
    with pretended():
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
        for gpu_gib, host_gib, wanted in (
            (140, 0, "split"),
            (80, 108, "split_host"),
            (80, 107, "fsdp"),
        ):
            gpu.total_memory = gpu_gib * memory.GIB
            monkeypatch.setattr(hardware, "host_room", lambda gib=host_gib: gib * memory.GIB)
            assert optimizer_of(c, config, one) == wanted
            said = "by FSDP; split_host takes 107.2" if wanted == "fsdp" else f"{wanted}, without"
            assert said in capsys.readouterr().out
            planned = link.decided(config, c, Hardware(1, gpu_gib, 1.0, 1.0)).optimizer
            assert planned == ("split" if wanted == "split" else "split_host")
        gpu.total_memory = 140 * memory.GIB
        monkeypatch.setattr(hardware, "host_room", lambda: 108 * memory.GIB)
        assert optimizer_of(dataclasses.replace(c, recompute="none"), config, one) == "split_host"
        assert "split_host, without FSDP; --recompute lean would fit" in capsys.readouterr().out
        monkeypatch.setattr(hardware, "host_room", lambda: 107 * memory.GIB)
        with pytest.raises(
            InputError, match=r"split_host takes 107\.2 GiB of the host's memory, 107"
        ):
            optimizer_of(dataclasses.replace(c, optimizer="split_host"), config, one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_gradients_are_summed_by_their_matmuls(small):
    """Of three rows, each no further from those of float32 than twice what sums of bfloat16
    gradients are. The linear layers and the head go past autograd."""
    config = dataclasses.replace(small, vocab_size=1003)
    exact, usual, ours = (Aquila(config).to("cuda") for _ in range(3))
    init_weights(ours)
    split_weights(ours, "split")
    usual.bfloat16()
    for p, *others in zip(ours.parameters(), exact.parameters(), usual.parameters(), strict=True):
        for other in others:
            other.data.copy_(p.detach())
    sums = [torch.zeros_like(p) for p in exact.parameters()]
    for lengths in ([40], [7, 30], [9]):
        row = row_from([range(n) for n in lengths]).to(torch.device("cuda"))
        for model in (exact, usual, ours):
            model(row).nll.sum().backward()
        for total, p in zip(sums, usual.parameters(), strict=True):
            total += p.grad
            p.grad = None
    for (name, p), q, total in zip(ours.named_parameters(), exact.parameters(), sums, strict=True):
        assert p.grad.dtype == torch.float32
        off, allowed = (p.grad - q.grad).norm(), 2 * (total - q.grad).norm()
        assert off <= allowed + 1e-6 * q.grad.norm(), name
