"""What every stage does before and after fit(): settings into a model, and a word on the screen."""

import dataclasses
import hashlib
import os
import timeit
from pathlib import Path

import numpy as np
import torch

import kernels
from nanomed import hf
from nanomed.batches.loader import Loader
from nanomed.config import MODELS, ROOT, InputError, ModelConfig, Run, beside_the_scripts
from nanomed.distributed import Sharing, World, from_main, shard
from nanomed.hf import pretrained
from nanomed.hf.config import unsaid
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.recompute import set_recompute
from nanomed.processes import rank_from_env
from nanomed.run import checkpoint, tensorboard
from nanomed.run.log import RunFolder, peak_flops
from nanomed.stages import data_report, link, memory
from nanomed.stages.hardware import Hardware, this_machine
from nanomed.text import template, tokenizer
from nanomed.training.alone import split_weights
from nanomed.training.optim import lr_at


def model_and_encoder(c: Run) -> tuple[ModelConfig, template.Encoder]:
    """The model's shape, tokenizer and template, checked against one another. Allocates nothing."""
    if c.tensorboard:
        tensorboard.check()
    if c.init and c.model:
        raise InputError(f"--init {c.init} fixes the model; leave out --model {c.model}")
    if c.init:
        config, encoder = pretrained.describe(c.init, c.tokenizer, c.template)
    else:
        config, encoder = _fresh(c)
    if c.seq_len > config.max_seq_len:
        raise InputError(f"--seq_len {c.seq_len} is over the model's maximum {config.max_seq_len}")
    return config, encoder


def _fresh(c: Run) -> tuple[ModelConfig, template.Encoder]:
    tok = tokenizer.load(c.tokenizer or beside_the_scripts("samples/tokenizer.model"))
    encoder = template.Encoder(template.load(c.template or "chatml"), tok)
    config = MODELS[c.model or "tiny"]
    if config is MODELS["tiny"]:
        config = dataclasses.replace(config, vocab_size=tok.vocab_size)  # it has none of its own
    tokenizer.check_rows(tok, config.vocab_size)
    return config, encoder


# What may change when a run goes on: where it reads and writes, what it shows and keeps, its speed
# and memory. All else decides what is trained and must be as it was. Files may move: their content
# is compared. (--steps and --epochs are compared as the number of steps they come to.)
MAY_CHANGE = {
    *("config", "model", "tokenizer", "template", "data", "val_data", "fields", "out", "resume"),
    *("steps", "epochs", "micro_tokens", "recompute", "kernels", "device", "allow_drop"),
    *("nodes_share", "sum_gradients", "optimizer"),
    *("log_every", "eval_every", "save_every", "save", "keep_last", "max_bad", "show_text"),
    *("tensorboard", "dry_run", "hardware", "mfu", "examples", "repeat"),
}


def identity(c: Run, config: ModelConfig, encoder: template.Encoder, loader: Loader) -> dict:
    """What the run trains, by name: what every checkpoint keeps and a resume compares."""
    settings = {k: v for k, v in dataclasses.asdict(c).items() if k not in MAY_CHANGE}
    shape = {f"model's {name}": value for name, value in dataclasses.asdict(config).items()}
    shape["model's dropout"] = c.dropout  # its name in checkpoints since the first of them
    return {
        "stage": c.stage,
        **settings,
        "number of steps": loader.n_steps,
        **shape,
        "tokenizer": encoder.tokenizer.fingerprint(),
        "template": encoder.template.to_json(),
        "content of the data": loader.data.meta["sha256"],
        "weights of the data": loader.mixture and loader.mixture.weights,
        "held-out examples": len(loader.val),
        # Groups decide which they are, and are no part of the content that is hashed.
        "which are held out": hashlib.sha256(np.asarray(loader.val).tobytes()).hexdigest(),
    }


def compute_dtype(c: Run, device: torch.device) -> torch.dtype:
    named = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return named[c.dtype if c.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"]


def bf16_takes() -> float:
    """How many times as long as in float32 this CPU takes for a matmul in bfloat16. Measured, in a
    fifth of a second at most: many CPUs have no instructions for bfloat16."""
    n_threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)  # two would wait for each other on a busy machine
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(256, 256).to(dtype)
        seconds.append(min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=4)))
    torch.set_num_threads(n_threads)
    return seconds[0] / seconds[1]


def bf16_warning(c: Run, device: torch.device) -> str:
    """A warning where --dtype bf16 is slower on this CPU than the default, else nothing."""
    times = bf16_takes() if c.dtype == "bf16" and device.type == "cpu" else 0
    if times <= 1:
        return ""
    return (
        f"WARNING: --dtype bf16: a matmul takes this CPU {times:.1f} times as long as in float32 "
        "(measured now), which is the default here: leave --dtype out"
    )


def choose_kernels(c: Run, config: ModelConfig, device: torch.device) -> None:
    """--kernels, for all that follows. The Triton interpreter, on a CPU, is for tests alone."""
    if c.kernels == "triton":
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("--kernels triton needs a CUDA device; on a CPU use --kernels auto")
        if kernels.triton_error():
            raise InputError(
                f"--kernels triton: it does not import ({kernels.triton_error()}); install a torch "
                "built for CUDA, which brings it, or use --kernels reference"
            )
        if config.head_size not in kernels.triton_head_sizes():
            raise InputError(
                f"--kernels triton: its attention takes heads of {kernels.triton_head_sizes()}, "
                f"the model's are {config.head_size} wide; use --kernels auto"
            )
    kernels.use(c.kernels)


def build_model(c: Run, config: ModelConfig, world: World) -> Aquila:
    """The sharded model with its weights: no rank ever holds more than its share. Nothing has been
    written when bad weights raise InputError here."""
    choose_kernels(c, config, world.device)
    hw = this_machine(c, world)
    way = decided_here(c, config, world.device, hw)
    with torch.device("meta"):
        model = Aquila(config, c.dropout)
    model.decided = way
    set_recompute(model, c.recompute)
    if way.optimizer == "fsdp":
        sharing = Sharing(link.copies(way, hw), way.sum_gradients == "step")
        shard(model, world, compute_dtype(c, world.device), sharing)
    model.to_empty(device=world.device)
    if not c.init:
        init_weights(model, c.seed)
    else:
        if world.is_main:
            print(f"reading {c.init}", flush=True)
        pretrained.load_weights(model, c.init)
    if way.optimizer != "fsdp":
        split_weights(model, way.optimizer)
    return model


def decided_here(c: Run, config: ModelConfig, device: torch.device, hw: Hardware) -> Run:
    """The settings with every `auto` of memory and speed decided: what fits, else what takes least,
    by FSDP. Raises InputError where it cannot be."""
    bf16 = compute_dtype(c, device) == torch.bfloat16
    way = link.decided(config, dataclasses.replace(c, dtype="bf16" if bf16 else "fp32"), hw)
    needed = sum(memory.in_host(config, c).values())
    lacks = f"split_host takes {needed:.1f} GiB of the host's memory, {hw.host:.1f} are free"
    if c.optimizer == "split_host" and needed > hw.host:
        raise InputError(f"--optimizer {lacks}")
    if c.optimizer != "auto" or way.optimizer == "fsdp":
        return way
    said = f"{way.optimizer}, without FSDP"
    if not link.fits(config, way, hw):
        way = dataclasses.replace(way, optimizer="fsdp")
        said = "by FSDP" + (f"; {lacks}" if needed > hw.host else "")
    elif way.optimizer == "split_host" and (policy := link.stays_on_the_gpu(config, c, hw)):
        said += f"; --recompute {policy} would fit without the host's memory, which is faster"
    if device.type == "cuda":
        print(f"optimizer: {said}", flush=True)
    return way


def with_newest_sft(c: Run) -> Run:
    """A stage that was not told where to start goes on from the newest fine-tuning run."""
    if c.init or c.model or c.config:
        return c
    sft = Path("runs/sft")
    if (sft / "checkpoints").exists():
        return dataclasses.replace(c, init=str(sft.with_name(sft.resolve().name)))
    if rank_from_env()[0] == 0:
        print(
            "no fine-tuned model in runs/: this starts from an untrained one and shows little; run "
            "`torchrun --nproc_per_node 2 train_sft.py` first"
        )
    return c


def load_best(model: Aquila, run: RunFolder) -> None:
    """The best checkpoint's weights; the newest's if nothing was held out to judge by."""
    best, latest = (run.checkpoints / name for name in ("best", "latest"))
    if not (has_best := from_main(best.exists())) and checkpoint.is_validated(latest):
        run.print(f"WARNING: no validation loss was finite, so none is the best: {latest} is taken")
    checkpoint.load_weights(best if has_best else latest, model)


def export(c: Run, model: Aquila, encoder: template.Encoder, run: RunFolder) -> None:
    """The Hugging Face folder of the weights that the model now has; the last line says where."""
    if run.world.device.type == "cuda":
        copies = getattr(model, "sharing", Sharing()).copies
        run.print(memory.compared(model.config, model.decided, run.world.size // copies))
    if unsaid(model.config):  # announce() has warned
        return run.print(f"not exported; run folder: {run.path.absolute()}")
    folder, dtype = run.path / "export", compute_dtype(c, run.world.device)
    about = {"stage": c.stage} | dataclasses.asdict(c)
    hf.export(model, encoder.tokenizer, folder, dtype, encoder.template, replace=True, about=about)
    run.print(f"exported to {folder} ({dtype}), for transformers and vLLM".replace("torch.", ""))
    run.print(f"run folder: {run.path.absolute()}")


# Of the demonstration: a tenth of stage 1's learning rate, as in the paper, and chats among the
# documents.
SECOND = (
    "--data samples/cpt_medical.jsonl:0.5 samples/sft.jsonl:0.3 samples/cpt_general.jsonl:0.2 "
    "--lr 2e-4 --warmup_ratio 0.01 --batch_size 8 --seq_len 256 --val_fraction 0.1 --steps 60 "
    "--repeat --log_every 10"
)


def second_stage(c: Run, run: RunFolder) -> str:
    """The command that goes on after stage 1 of pre-training; "" if this was stage 2."""
    if c.init and pretrained.settings_of(c.init).get("stage") == c.stage:
        return ""
    launcher = f"torchrun --nproc_per_node {run.world.size}" if run.world.size > 1 else "python"
    flags = SECOND if _on_samples(c) else "--config configs/cpt_stage2.toml --data FILES"
    return f"{launcher} train_cpt.py {flags} --init {run.path}"


def may_show_text(c: Run) -> bool:
    """Real records may be patients'; they stay off the screen unless asked for."""
    return c.show_text or _on_samples(c)


def _on_samples(c: Run) -> bool:
    return all(Path(path).resolve().is_relative_to(ROOT / "samples") for path in c.data)


def announce(
    c: Run, model: Aquila, encoder: template.Encoder, loader: Loader, run: RunFolder
) -> None:
    """Keeps in the run folder what a later --init needs, and says what is about to happen."""
    config, device = model.config, run.world.device
    is_there = run.resume_from and (run.path / "model.json").exists()  # the same, so it stays
    if run.world.is_main and not is_there:
        (run.path / "template.json").write_text(encoder.template.to_json() + "\n", "utf-8")
        tokenizer.copy(encoder.tokenizer, run.path)
        run.write_json("model.json", dataclasses.asdict(config))
    report = data_report.report(loader)
    run.write_json("data_report.json", report)
    paper = "cpt_stage1" if c.stage == "cpt" else c.stage
    start = f"from {c.init}" if c.init else "from nothing"
    run.print(
        f"{c.stage} of {c.model or 'tiny' if not c.init else 'the model'} {start} on "
        f"{' '.join(c.data)}; the paper's setting: --config configs/{paper}.toml --init FOLDER"
    )
    name = f"cpu (threads: {torch.get_num_threads()} each)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    dtype = str(compute_dtype(c, device)).removeprefix("torch.")
    run.print(
        f"model: {config.n_params():,} parameters, masters and gradient sums in float32, "
        f"computing in {dtype} on {run.world.size} x {name}"
        + (f" (MFU: of {peak / 1e12:.0f} TFLOP/s, causal count)" if (peak := peak_flops()) else "")
    )
    kept = getattr(model, "sharing", None)  # none without FSDP
    if kept and (run.world.size > 1 or kept.once):
        run.print(link.sharing_line(kept, run.world.size))
    if run.world.is_main and (warning := bf16_warning(c, device)):
        run.print(warning)
    if names := unsaid(config):
        run.print(
            f"WARNING: Hugging Face's config.json has no word for {', '.join(names)}: this model "
            "can be trained and talked to here, and there will be no export/"
        )
    kind = device, compute_dtype(c, device), config.head_size
    reasons = kernels.reasons(*kind)
    run.print(f"kernels: {kernels.in_force(*kind)}" + (f" ({reasons})" if reasons else ""))
    spare = config.vocab_size - encoder.tokenizer.vocab_size
    run.print(
        f"vocabulary: {encoder.tokenizer.vocab_size:,} ids of {encoder.tokenizer.path}"
        + (f", {spare:,} spare rows in the model" if spare else "")
        + f"; template {encoder.template.name}"
    )
    for line in data_report.lines(c, loader, report):
        run.print(f"data: {line}")
    n = loader.n_steps
    points = [min(n - 1, round(share * n)) for share in (0, 0.25, 0.5, 0.75, 1)]
    lrs = [lr_at(c, k, n) for k in points]
    run.print(
        f"plan: {n:,} steps of {c.batch_size} examples, {loader.steps_per_epoch:,} per epoch; "
        f"lr at 0, 25, 50, 75, 100%: {', '.join(f'{lr:.1e}' for lr in lrs)}; "
        f"into {run.path.absolute()}"
    )
