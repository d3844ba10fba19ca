"""What bench/kernels.py measures: each op, and a layer of the model, on a row of documents.

A case has inputs, the versions that take part, and the formulas that say what is right."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor
from torch.func import functional_call

import kernels
from bench import oracles, rivals
from bench.setting import Setting
from nanomed.batches.packing import row_from
from nanomed.model.decoder import Layer

# Twenty quantiles of the length, in tokens of the published Aquila tokenizer, of 1,520 real medical
# chats (MedicalGPT's single-turn and CMtMedQA's multi-turn samples, without the template's tokens).
CHATS = [10, 377, 229, 15, 19, 148, 58, 111, 30, 492]
CHATS += [93, 333, 126, 13, 285, 261, 181, 410, 355, 309]
OURS = ("triton", "auto")  # auto: what a run has unless told otherwise, with torch's attention


@dataclass
class Case:
    """One op on one row. `works` are its versions, functions of `inputs`; ours come first."""

    op: str
    lengths: list[int]
    inputs: list[Tensor]
    works: rivals.Works
    oracle: Callable

    @property
    def ours(self) -> list[str]:
        """The versions to judge: on a CPU, where no Triton runs, the definition."""
        return [name for name in self.works if name in OURS] or ["definition"]

    @property
    def held_against(self) -> str:
        """The first that is not ours; a definition that stands alone is held against itself."""
        return next((name for name in self.works if name not in self.ours), "definition")


def documents(t: int, kind: str) -> list[int]:
    """Lengths of a row of t tokens: `one` document, or `chats` packed until it is full."""
    if kind == "one":
        return [t]
    lengths = []
    for length in cycle(CHATS):
        lengths.append(min(length, t - sum(lengths)))
        if sum(lengths) == t:
            return lengths


def build(s: Setting, op: str, lengths: list[int], triton: bool = False) -> Case:
    """Random inputs, never zeros. `triton` has our kernels take part."""
    torch.compiler.reset()  # else the ninth shape of a function would silently not be compiled
    if op == "layer":
        return _layer(s, lengths, triton)
    c, t = s.model, sum(lengths)
    borders = torch.tensor([0, *lengths], device=s.device).cumsum(0, dtype=torch.int32)
    position = torch.arange(t, device=s.device)
    position -= borders[:-1].long().repeat_interleave(borders.diff().long())
    label = torch.randint(c.vocab_size, (t,), device=s.device)
    q, kv = (t, c.n_heads, c.head_size), (t, c.n_kv_heads, c.head_size)
    inputs, extra, truth, others = {
        "rmsnorm": lambda: (
            [s.randn(t, c.d_model), s.randn(c.d_model)], (1e-5,), (1e-5,),
            rivals.rmsnorm(s.on_gpu),
        ),
        "rope": lambda: (
            [s.randn(*q), s.randn(*kv)], (position, c.rope_theta), (position, c.rope_theta),
            rivals.rope(position, c.rope_theta, c.head_size, s.dtype, s.on_gpu),
        ),
        "swiglu": lambda: (
            [s.randn(t, c.d_ff), s.randn(t, c.d_ff)], (), (), rivals.swiglu(s.on_gpu),
        ),
        "attention": lambda: (
            [s.randn(*q), s.randn(*kv), s.randn(*kv)], (borders, max(lengths)), (lengths,),
            rivals.attention(borders, max(lengths), s.dtype, s.on_gpu),
        ),
        "linear_nll": lambda: (  # logits of about the size that a trained model has
            [s.randn(t, c.d_model), s.randn(c.vocab_size, c.d_model) * 2 * c.d_model**-0.5],
            (label,), (label,), rivals.linear_nll(label, s.on_gpu),
        ),
    }[op]()  # fmt: skip

    def compared(out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Of linear_nll the nll alone: rivals give nothing else."""
        return out[0] if op == "linear_nll" and isinstance(out, tuple) else out

    def version(name: str) -> Callable:
        def work(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
            kernels.use(name)
            return compared(getattr(kernels, op)(*x, *extra))

        return work

    works = {"definition": version("reference"), **others}
    if triton:
        works = {"triton": version("triton"), **works}
    return Case(op, lengths, inputs, works, lambda *x: getattr(oracles, op)(*x, *truth))


def _layer(s: Setting, lengths: list[int], triton: bool) -> Case:
    """A layer with random weights, which are inputs like x[T,D]: their gradients are compared and
    timed too. Thirty-two times the layer is most of a step."""
    with torch.device("meta"):
        layer = Layer(s.model)
    params = dict(layer.named_parameters())
    row = row_from([[0] * n for n in lengths]).to(s.device)
    x = s.randn(sum(lengths), s.model.d_model)
    weights = [
        x.new_empty(p.shape).normal_(float("norm" in name), 0.02) for name, p in params.items()
    ]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(params, weights, strict=True)), (x, row))

    def with_kernels(name: str, run: Callable = run) -> Callable:
        def work(*inputs: Tensor) -> Tensor:
            kernels.use(name)
            return run(*inputs)

        return work

    works = {"definition": with_kernels("reference")}
    if triton:
        works = {name: with_kernels(name) for name in OURS} | works
    if s.on_gpu:
        works["torch.compile"] = with_kernels("reference", torch.compile(run, dynamic=False))
    return Case("layer", lengths, [x, *weights], works, with_kernels("reference"))
