"""What can be set: the model's shape, and one flat dataclass per stage. Every field says what it
is, in which unit, and what the paper used. arguments.py fills them."""

import dataclasses
import difflib
import importlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent  # of the project


def beside_the_scripts(path: str) -> str:
    """A path as the documentation writes it, samples/... or configs/..., from any working folder:
    if it is not here it is the project's. Any other path is taken as it is."""
    ours = Path(path).parts[:1] in (("samples",), ("configs",))
    return str(ROOT / path) if ours and not Path(path).exists() else path


# Bytes of a parameter in training: its value and its gradient are float32, and the optimizer keeps
# AdamW's two moments of it, float32, too. What memory, checkpoints and their space are counted by.
WEIGHT_BYTES, OPTIMIZER_BYTES = 4, 8
SAVED_BYTES = WEIGHT_BYTES + OPTIMIZER_BYTES


class InputError(Exception):
    """Something that was given cannot work; the message says what, where, and the remedy."""


def optional(module: str, needed_by: str | Path) -> Any:
    """A module of a package that is not among the core ones. Raises InputError with the command
    that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise InputError(f"{needed_by} needs one more package: pip install {package}") from None


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads: grouped-query attention
    d_ff: int
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    head_dim: int = 0  # a head's width, where it is not d_model / n_heads
    qk_norm: bool = False  # each head of q and k is normalised before RoPE, as in Qwen3
    o_bias: bool = False  # the attention's last matrix has a bias, too
    # Llama 3.1's (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)
    rope_scaling: tuple[float, ...] = ()

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def q_size(self) -> int:
        return self.n_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.n_kv_heads * self.head_size

    def n_params(self) -> int:
        attention = 2 * self.d_model * (self.q_size + self.kv_size)
        bias = (self.q_size + 2 * self.kv_size) * self.qkv_bias + self.d_model * self.o_bias
        norms = 2 * self.d_model + 2 * self.head_size * self.qk_norm
        layer = attention + bias + 3 * self.d_model * self.d_ff + norms
        return 2 * self.vocab_size * self.d_model + self.n_layers * layer + self.d_model


# Three of the models called Aquila-7B, and "tiny", the small one of the demonstration.
MODELS = {
    "tiny": ModelConfig(6144, 3, 256, 4, 2, 704, 4096, 1e6, 1e-5, True),
    "aquila-7b": ModelConfig(100_008, 32, 4096, 32, 32, 11_008, 2048, 1e4, 1e-6, False),
    "aquila2-7b": ModelConfig(143_973, 32, 4096, 32, 32, 11_008, 4096, 1e6, 1e-5, False),
    "aquilamed-7b": ModelConfig(151_851, 32, 4096, 32, 8, 14_336, 4096, 1e6, 1e-5, True),
}


STAGES = ("CPT stage 1", "CPT stage 2", "SFT", "DPO")  # of the paper, and configs/ has one each
UNPUBLISHED, NOT_USED = "", None


def _flag(default: Any, help: str, paper: tuple = (), choices: tuple = ()) -> Any:
    """`paper` has the paper's value for each of STAGES, as text; it is empty for our own flags."""
    return field(default=default, metadata={"help": help, "paper": paper, "choices": choices})


def _default(name: str, default: Any) -> Any:
    """A setting of Run with another default."""
    return field(default=default, metadata=Run.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Run:
    """The settings that every stage has. Defaults are the recipe's; FRESH holds the others that
    a model trained from nothing (no --init) starts with instead: the demonstration."""

    stage: ClassVar[str]
    FRESH: ClassVar[dict[str, Any]]

    config: str = _flag("", "TOML file with any of these settings; flags come after it and win")
    model: str = _flag("", "shape of a fresh model; default: tiny", choices=("", *MODELS))
    init: str = _flag("", "weights to begin with: a run or Hugging Face folder; default: fresh")
    tokenizer: str = _flag("", "tokenizer file or folder; default: the --init folder's, else ours")
    template: str = _flag("", "name or JSON file; default: the --init folder's, else chatml")
    data: list[str] = _flag(("samples/sft.jsonl",), "training files: JSON, JSONL, CSV; also .gz")
    val_data: list[str] = _flag((), "held-out files; default: a part of --data")
    fields: list[str] = _flag(
        (),
        "names of fields and roles in these files: question=query reads the field `query` as\n"
        "`question`; docs/formats.md has the known names; default: those alone",
    )
    val_fraction: float = _flag(
        0.1, "share of --data held out, by question", (UNPUBLISHED, UNPUBLISHED, "0.1", UNPUBLISHED)
    )
    out: str = _flag("", "run folder; default: the next free runs/STAGE-NNN")
    resume: str = _flag("", "go on from the newest checkpoint in --out; auto: or start a run there")
    steps: int = _flag(0, "optimizer steps, as many epochs as they take; 0: --epochs decides")
    epochs: int = _flag(2, "passes over the training data", ("1", "1", "2", "2"))
    batch_size: int = _flag(
        128, "examples per optimizer step, over all GPUs", ("768", "384", "128", "64")
    )
    micro_tokens: int = _flag(4096, "most tokens in one packed row, the unit of memory")
    seq_len: int = _flag(2048, "most tokens in one segment", ("4096", "4096", "2048", UNPUBLISHED))
    lr: float = _flag(
        2e-6,
        "peak learning rate; about the most that a step changes a weight",
        ("1e-4", "1e-5", "2e-6", "2e-7"),
    )
    min_lr_ratio: float = _flag(
        0.0, "learning rate at the end, as a share of the peak", (UNPUBLISHED,) * 4
    )
    warmup_ratio: float = _flag(
        0.03,
        "share of the steps with rising learning rate",
        ("0.05", "0.01", UNPUBLISHED, UNPUBLISHED),
    )
    weight_decay: float = _flag(
        0.1,
        "AdamW's decay on matrices, a share of each weight per step and unit of learning rate",
        (UNPUBLISHED, UNPUBLISHED, "0.1", UNPUBLISHED),
    )
    grad_clip: float = _flag(
        1.0, "largest global gradient norm; 0: no clipping", (UNPUBLISHED,) * 4
    )
    dropout: float = _flag(
        0.0,
        "share of each residual branch set to 0 in training; weights that were trained without it\n"
        "lose much by it: docs/recipe.md",
        (UNPUBLISHED, UNPUBLISHED, "0.1", UNPUBLISHED),
    )
    seed: int = _flag(0, "number that decides the order of examples, fresh weights and dropout")
    recompute: str = _flag(
        "none",
        "what backward computes again, to save memory. lean: norms and SwiGLU's product; full:\n"
        "whole layers; full:12: 12 whole layers, and in the others what lean does",
    )
    nodes_share: str = _flag(
        "auto", "on several nodes. shard: all together hold one model; replicate: each node holds\n"
        "one, and only gradients pass between them, once a step; auto: replicate where it fits",
        choices=("auto", "shard", "replicate"),
    )  # fmt: skip
    sum_gradients: str = _flag(
        "auto", "when the GPUs add up their gradients. row: after each row; step: once a step;\n"
        "till then each GPU keeps all of them, 4 bytes per parameter; auto: step where it fits",
        choices=("auto", "row", "step"),
    )  # fmt: skip
    optimizer: str = _flag(
        "auto", "where weights and AdamW's moments are. fsdp: in float32, shared among the GPUs.\n"
        "For a single process also split: each weight in two halves that together are float32;\n"
        "split_bf16: the same, with moments in bf16; split_host: as split, with moments and\n"
        "lower halves in the host's memory. auto: on one GPU split, or split_host if only that\n"
        "fits; else fsdp",
        choices=("auto", "fsdp", "split", "split_bf16", "split_host"),
    )  # fmt: skip
    kernels: str = _flag(
        "auto", "version of the fused ops; auto: Triton on CUDA, plain PyTorch elsewhere",
        choices=("auto", "triton", "reference"),
    )  # fmt: skip
    dtype: str = _flag(
        "auto", "of the computation; auto: bf16 on CUDA, fp32 on CPU",
        (UNPUBLISHED, UNPUBLISHED, "bf16", UNPUBLISHED), ("auto", "bf16", "fp32"),
    )  # fmt: skip
    device: str = _flag("auto", "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    allow_drop: float = _flag(0.05, "largest share of examples that may be dropped as too long")
    log_every: int = _flag(1, "steps between two logged lines")
    eval_every: int = _flag(0, "steps between two validations; 0: at each epoch's end")
    save_every: int = _flag(0, "steps between two checkpoints; 0: at each validation")
    save: str = _flag(
        "auto", "background: training goes on while a copy in the host's memory is written, as\n"
        "large as a checkpoint over all processes; blocking: training waits; auto: background on\n"
        "CPU, blocking on CUDA",
        choices=("auto", "background", "blocking"),
    )  # fmt: skip
    keep_last: int = _flag(2, "newest checkpoints kept; the best one always is")
    max_bad: int = _flag(5, "steps in a row, loss or gradient not finite, after which the run ends")
    tensorboard: bool = _flag(False, "write metrics for TensorBoard, too, into RUN/tensorboard")
    show_text: bool = _flag(False, "print text of examples of --data; of samples/ it always is")
    dry_run: bool = _flag(False, "say what the run would take (memory, time, disk), and end")
    hardware: str = _flag(
        "8xA100-40G",
        "GPUs that --dry_run plans for: number x kind; or number x GiB,TFLOP/s,GB/s, the memory,\n"
        "speed and link to the others of each",
        ("24xA100-40G", "24xA100-40G", "8xA100-40G", "8xA100"),
    )  # fmt: skip
    mfu: float = _flag(
        0.5, "share of the GPUs' bf16 peak that --dry_run assumes, for all that is computed"
    )
    examples: int = _flag(
        0, "number of examples --dry_run plans for, each of full length; 0: those of --data",
        ("60B tokens", "20B tokens", "320000", "12727"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        limits = [
            (self.seq_len >= 2, "seq_len", "at least 2 tokens"),
            (self.micro_tokens >= self.seq_len, "micro_tokens", "at least --seq_len"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.epochs >= 1, "epochs", "at least 1"),
            (self.steps >= 0, "steps", "0 or more"),
            (self.seed >= 0, "seed", "0 or more"),
            (not self.out or Path(self.resume or "auto") in map(Path, ("auto", "latest", self.out)),
             "resume", "without a folder beside --out: a run goes on in its own"),
            (self.lr > 0, "lr", "above 0"),
            (0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "between 0 and 1"),
            (0 <= self.warmup_ratio <= 1, "warmup_ratio", "between 0 and 1"),
            (self.weight_decay >= 0, "weight_decay", "0 or more"),
            (self.grad_clip >= 0, "grad_clip", "0 or more"),
            (0 <= self.dropout < 1, "dropout", "at least 0 and below 1"),
            (0 <= self.val_fraction < 1, "val_fraction", "at least 0 and below 1"),
            (0 <= self.allow_drop <= 1, "allow_drop", "between 0 and 1"),
            (self.log_every >= 1, "log_every", "at least 1"),
            (min(self.eval_every, self.save_every) >= 0, "eval_every and save_every", "0 or more"),
            (min(self.keep_last, self.max_bad) >= 1, "keep_last and max_bad", "at least 1"),
            (len(self.data) > 0, "data", "at least one file"),
            (0 < self.mfu <= 1, "mfu", "above 0, at most 1"),
            (re.fullmatch(r"none|lean|full(:\d+)?", self.recompute), "recompute",
             "none, lean, full, or full:12 (so many layers full, the others lean)"),
            (self.examples >= 0, "examples", "0 or more"),
        ]  # fmt: skip
        check_limits(self, limits)


def check_limits(settings: Any, limits: list[tuple[bool, str, str]]) -> None:
    """Raises InputError unless each setting is one of its choices, if it has any, and all limits
    hold: (whether it holds, the setting's name, the rule)."""
    for f in dataclasses.fields(settings):
        choices, value = f.metadata.get("choices"), getattr(settings, f.name)
        if choices and value not in choices:
            hint = nearest(value, choices)
            raise InputError(f"--{f.name} is {value!r}; it must be one of {choices}{hint}")
        if f.type is float and not math.isfinite(value):
            raise InputError(f"--{f.name} is {value}; it must be a finite number")
    for holds, name, rule in limits:
        if not holds:
            raise InputError(f"--{name} is {getattr(settings, name, '?')}; it must be {rule}")


@dataclass(frozen=True)
class SFT(Run):
    stage: ClassVar[str] = "sft"
    FRESH: ClassVar[dict[str, Any]] = dict(
        lr=1.5e-3, epochs=4, batch_size=8, seq_len=1024, min_lr_ratio=0.1, warmup_ratio=0.05,
        log_every=10,
    )  # fmt: skip


@dataclass(frozen=True)
class CPT(Run):
    """Continued pre-training, stage 1; configs/cpt_stage2.toml says what stage 2 does otherwise.
    An example is a slice of seq_len tokens of documents."""

    stage: ClassVar[str] = "cpt"
    FRESH: ClassVar[dict[str, Any]] = dict(
        lr=2e-3, epochs=6, batch_size=8, seq_len=256, val_fraction=0.1, min_lr_ratio=0.1,
        log_every=10,
    )  # fmt: skip
    data: list[str] = _flag(
        ("samples/cpt_medical.jsonl", "samples/cpt_general.jsonl"),
        "sources: files of documents or chats (.jsonl, .txt, ...; also .gz), or stores that\n"
        "python -m nanomed.store wrote; each may end with a weight: STORE:0.7 FILE:0.3",
    )
    repeat: bool = _flag(False, "go through a weighted source again where it runs out")
    val_fraction: float = _default("val_fraction", 0.001)
    epochs: int = _default("epochs", 1)
    batch_size: int = _default("batch_size", 768)
    seq_len: int = _default("seq_len", 4096)
    lr: float = _default("lr", 1e-4)
    warmup_ratio: float = _default("warmup_ratio", 0.05)
    hardware: str = _default("hardware", "24xA100-40G")


@dataclass(frozen=True)
class DPO(Run):
    """Direct preference optimisation. An example is a pair of two segments."""

    stage: ClassVar[str] = "dpo"
    FRESH: ClassVar[dict[str, Any]] = dict(
        lr=1e-5, epochs=3, batch_size=16, seq_len=512, log_every=5
    )
    data: list[str] = _default("data", ("samples/dpo.jsonl",))
    batch_size: int = _default("batch_size", 64)
    lr: float = _default("lr", 2e-7)
    warmup_ratio: float = _default("warmup_ratio", 0.1)
    beta: float = _flag(
        0.03, "weight of a nat of log-probability ratio in the loss", (NOT_USED,) * 3 + ("0.03",)
    )

    label_smoothing: float = _flag(
        0.0,
        "share of pairs taken to be labelled the wrong way round",
        (NOT_USED,) * 3 + (UNPUBLISHED,),
    )
    sft_weight: float = _flag(
        0.0,
        "weight of the chosen answer's own loss, in nats per token, beside the pair's",
        (NOT_USED,) * 3 + (UNPUBLISHED,),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = [
            (self.beta > 0, "beta", "above 0"),
            (0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and below 0.5"),
            (self.sft_weight >= 0, "sft_weight", "0 or more"),
            (self.dropout == 0, "dropout", "0: policy and reference would differ by it"),
        ]
        check_limits(self, limits)
        if self.micro_tokens < 2 * self.seq_len:
            raise InputError(
                f"--micro_tokens is {self.micro_tokens}; it must be at least 2 x --seq_len "
                f"({self.seq_len}): a row holds both answers of a pair"
            )


def nearest(name: str, known) -> str:
    """A hint for an unknown name: "; did you mean ...?", or nothing if none is close."""
    close = difflib.get_close_matches(str(name).split("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
