"""nanomed/stages/link.py: what it counts is what ranks hand to torch.distributed in a step; and the
advice that follows."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanomed.config import CPT, DPO, MODELS, SFT, InputError, ModelConfig
from nanomed.distributed import Sharing
from nanomed.model.recompute import POLICIES
from nanomed.run.log import Meter
from nanomed.stages import link, memory
from nanomed.stages.hardware import KINDS, PER_NODE, Hardware, host_room, parse_hardware
from nanomed.training.step import train_step
from tests.training.test_exactness import Recorder, loader_of, next_token_loss, settings, sharded

# Every dimension divides by 4: FSDP would fill up what does not.
EVEN = ModelConfig(100, 2, 128, 4, 2, 96, 512, 1e6, 1e-5, True)
MED = MODELS["aquilamed-7b"]


# ---------------------------------------------------------------- counted


class Sent(TorchDispatchMode):
    """Bytes that this rank sends for weights and gradients, if each collective goes round a ring:
    (all, those of groups whose ranks are on several nodes of two)."""

    def __init__(self):
        super().__init__()
        self.all = self.far = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("c10d::"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            tensors += [x for xs in args if isinstance(xs, list) for x in xs]
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            n, size = len(ranks), max(x.nbytes for x in tensors)
            # Norm and loss are a few numbers.
            if size > 64 and ("allgather" in name or "reduce_scatter" in name):
                self.all += size * (n - 1) / n
            elif size > 64 and "allreduce" in name:
                self.all += 2 * size * (n - 1) / n
                self.far += 2 * size * (n - 1) / n
        return func(*args, **(kwargs or {}))


def step_counted(world, n_chats, sharing) -> tuple[float, float, int, dict[str, int]]:
    """Of one step as fit() takes it: what is sent, the number of rows, torch's own tally."""
    c = settings(batch_size=n_chats, micro_tokens=64, grad_clip=0.0)
    model, loader = sharded(world, EVEN, sharing=sharing), loader_of(world, n_chats, c)
    recorder, meter = Recorder(model), Meter(EVEN, world.size)
    recorder.step = lambda: None  # it would gather whole gradients
    tally = CommDebugMode()
    # Which module it was is not asked; torch's way of finding out fails at the second row.
    tally.advanced_module_tracker = SimpleNamespace(
        name="Global", is_bw=False, activation_checkpointing=False,
        module_parents_dict={"Global": set()},
        __enter__=lambda: None, __exit__=lambda *_: None,
    )  # fmt: skip
    with tally, Sent() as sent:
        train_step(c, model, recorder, loader, next_token_loss, 0, 1e-3, meter)
    counts = {str(op).rsplit(".")[-1]: n for op, n in tally.get_comm_counts().items()}
    return sent.all, sent.far, len(loader.step(0)), counts


@pytest.mark.parametrize("sums", ["row", "step"])
@pytest.mark.parametrize("n_ranks, per_node", [(2, 2), (4, 4), (4, 2)])
def test_bytes_of_a_step_are_those_that_ranks_exchange(pool, n_ranks, per_node, sums):
    hw = Hardware(n_ranks, 1.0, 1e12, 1e9, per_node=per_node)
    c = SFT(dtype="fp32", sum_gradients=sums, nodes_share="replicate")
    sharing = Sharing(hw.n_nodes, once=sums == "step")
    units = EVEN.n_layers + 3
    for sent, far, n_rows, counts in pool(n_ranks, step_counted, 16, sharing):
        assert n_rows > 1
        assert (sent, far) == pytest.approx(link.sent(EVEN, c, hw, n_rows))
        found = {name: n for name, n in counts.items() if "gather" in name or "scatter" in name}
        gathers = sum(n for name, n in found.items() if "gather" in name)
        assert gathers == n_rows * (2 * units - 4)
        assert sum(found.values()) - gathers == units * (1 if sums == "step" else n_rows)


def test_a_model_over_two_nodes_sends_more_between_them_than_two_copies():
    c, hw = SFT(micro_tokens=4096), parse_hardware("16xA100-80G")
    over_both = dataclasses.replace(c, nodes_share="shard", sum_gradients="row")
    of_each = dataclasses.replace(over_both, nodes_share="replicate")
    (_, far), (_, little) = (link.sent(MED, way, hw, 4) for way in (over_both, of_each))
    assert far > 3 * little > 0
    assert link.sent(MED, of_each, hw, 4)[1] == link.sent(MED, of_each, hw, 1)[1]  # once a step


# ---------------------------------------------------------------- what follows


def test_the_review_of_eight_a100():
    """Its table, counted by hand: 57.6 GB a row, and a link five times as slow as the computing."""
    c, step = (
        SFT(recompute="lean", micro_tokens=2048, sum_gradients="row"),
        link.Step(45e3, 45e3 * 350),
    )
    hw = parse_hardware("8xA100-40G-PCIe")
    a_row = link.sent(MED, c, hw, 1)[0]
    # Head, embedding and last layer are gathered once, not twice, in 2 bytes for each parameter.
    once = 2 * (2 * 151_851 * 4096 + memory.layer_params(MED))
    assert a_row + once * 7 / 8 == pytest.approx(57.6e9, rel=0.001)
    assert link.rules(MED, c, hw, step) == "link"
    fast = dataclasses.replace(hw, link=300e9)
    assert link.rules(MED, c, fast, step) == "matmuls"
    best = link.advice(MED, c, hw, step)
    slow, quick = (max(link.seconds(MED, way, hw, step)) for way in (c, best))
    assert best.micro_tokens > 4096 and slow / quick > 2


@pytest.mark.parametrize("text", ["8xA100-40G", "8x4090", "16xH800", "1xH200", "1xH100", "24xA800"])
@pytest.mark.parametrize("cls", [CPT, SFT, DPO])
def test_no_setting_that_fits_is_faster_than_the_advice(text, cls):
    """By its own bounds; and what it advises uses the memory: one layer less would not fit."""
    hw, c = parse_hardware(text), cls(dtype="bf16", kernels="triton", seq_len=2048)
    step = link.Step(2048.0 * c.batch_size, 2048.0**2 * c.batch_size)
    best = link.advice(MED, c, hw, step)
    if best is None and hw.n_gpus == 1:
        assert link.remedy(MED, c, hw, step).endswith("--optimizer split_host fits")
        c = dataclasses.replace(c, optimizer="split_host")
        best = link.advice(MED, c, hw, step)
    if best is None:
        assert "more GPUs" in link.remedy(MED, c, hw, step) and hw.gib * hw.n_gpus < 200
        return
    assert link.fits(MED, best, hw)
    took = max(link.seconds(MED, best, hw, step))
    for policy in POLICIES:
        for size in (4096, 8192, 16_384):
            for share in ("shard", "replicate"):
                other = dataclasses.replace(
                    best, recompute=policy, micro_tokens=size, nodes_share=share
                )
                if link.fits(MED, other, hw):
                    assert took <= 1.06 * max(link.seconds(MED, other, hw, step))
    name, _, n = best.recompute.partition(":")
    if n:
        less = dataclasses.replace(best, recompute=f"full:{int(n) - 1}")
        assert name == "full" and not link.fits(MED, less, hw)


def test_split_weights_are_for_one_process_in_bfloat16():
    """A plan says what the run would."""
    for text, dtype, said in (("8xA100-40G", "bf16", "8"), ("1xH100", "fp32", "1 in float32")):
        c = SFT(optimizer="split_host", dtype=dtype)
        with pytest.raises(InputError, match=f"for one process .* here are {said}"):
            link.decided(MED, c, parse_hardware(text))
    plain = link.decided(MED, SFT(dtype="fp32"), parse_hardware("1xH100"))
    assert plain.optimizer == "fsdp" and "more GPUs" in link.remedy(
        MED, plain, parse_hardware("1xH100"), link.Step(4096.0, 4096.0**2)
    )


def test_what_the_host_needs_is_said():
    hw, c = parse_hardware("1xH100"), SFT(optimizer="split_host", dtype="bf16", save="background")
    (line,) = (x for x in link.lines(MED, c, hw, link.Step(4096.0, 4096.0**2)) if "host:" in x)
    n = MED.n_params() / memory.GIB
    for bytes_each in (10, 4, 12, 26):  # moments and halves; a checkpoint's; the copy; all
        assert f"{bytes_each * n:.1f}" in line


@pytest.mark.parametrize("version", [1, 2])
def test_the_hosts_room_is_its_groups(tmp_path, version):
    """Of a job in a group whose parent has the limit; files that are cached count as free."""
    home = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    job = home / "slurm/job_7"
    job.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   8000 kB\n")
    line = "3:cpu,memory:/slurm/job_7\n" if version == 1 else "0::/slurm/job_7\n"
    (tmp_path / "proc/self/cgroup").write_text("7:cpuset:/other\n" * (version == 1) + line)
    assert host_room(tmp_path) == 8000 * 1024
    for folder, most in ((job, "max"), (job.parent, "5000000")):
        (folder / f"memory.{limit}").write_text(most + "\n")
        (folder / f"memory.{used}").write_text("3000000\n")
        (folder / "memory.stat").write_text("active_file 9\ninactive_file 1000000\n")
    assert host_room(tmp_path) == 3_000_000
    assert host_room() > 0 and host_room(tmp_path / "mac") == float("inf")


def test_auto_is_what_fits():
    c = SFT(recompute="lean", micro_tokens=4096, dtype="bf16", kernels="triton")
    ways = {
        text: (way.nodes_share, way.sum_gradients)
        for text in ("8xA100-40G", "8xA100-80G", "16xA100-80G", "16xA100-40G", "16x20,312,300")
        for way in [link.decided(MED, c, parse_hardware(text))]
    }
    assert ways == {
        "8xA100-40G": ("shard", "row"),
        "8xA100-80G": ("shard", "step"),
        "16xA100-80G": ("replicate", "step"),
        "16xA100-40G": ("replicate", "row"),
        "16x20,312,300": ("shard", "row"),
    }
    asked = dataclasses.replace(c, nodes_share="shard", sum_gradients="row")
    decided = link.decided(MED, asked, parse_hardware("16xA100-80G"))
    assert decided == dataclasses.replace(asked, optimizer="fsdp")


def test_nodes_of_one_gpu_are_counted_with_fsdps_copies():
    """A whole model on each of two is not what one GPU alone holds: it fits as FSDP's does."""
    c = SFT(recompute="lean", micro_tokens=4096, dtype="bf16", kernels="triton")
    copies = dataclasses.replace(c, nodes_share="replicate", sum_gradients="row")
    nodes = Hardware(2, 139.5, 1, 1, per_node=1)  # it takes 137.4 GiB alone, 142.3 with FSDP
    needed = link.gib(MED, dataclasses.replace(copies, optimizer="fsdp"), nodes)
    assert link.gib(MED, link.decided(MED, copies, nodes), nodes) == needed > nodes.gib
    assert link.decided(MED, c, nodes).nodes_share == "shard"


# ---------------------------------------------------------------- --hardware


def test_hardware_by_name_and_by_numbers():
    assert parse_hardware("8xA100-40G") == Hardware(8, 39.5, 312e12, 300e9)
    assert parse_hardware("8x80,989,450") == Hardware(8, 80.0, 989e12, 450e9)
    assert parse_hardware("16x80,989,450,50").between == 50e9
    assert parse_hardware("24xA800").n_nodes == 3 and parse_hardware("4xH20").n_nodes == 1
    for kind in ("A100-40G", "A100-80G", "A800", "H100", "H800", "H20", "H200", "4090"):
        assert kind in KINDS
    for text in ("8x", "8xB100", "8x1,2", "8x1,2,0", "8x1,2,x", "x", "-8xA100-40G"):
        with pytest.raises(InputError, match="must be like 8xA100-40G"):
            parse_hardware(text)
    with pytest.raises(InputError, match=f"nodes of {PER_NODE}"):
        parse_hardware("12xA100-40G")
