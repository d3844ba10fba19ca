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
    def shapes(self) -> dict[str, int]:
        return {"T": sum(self.lengths), "documents": len(self.lengths)}

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
    c, t = s.config, sum(lengths)
    borders = torch.tensor([0, *lengths], device=s.device).cumsum(0, dtype=torch.int32)
    position = torch.cat([torch.arange(n, device=s.device) for n in lengths])
    label = torch.randint(c.vocab_size, (t,), device=s.device)
    q, kv = (t, c.n_heads, c.head_size), (t, c.n_kv_heads, c.head_size)
    shapes, others = {
        "rmsnorm": ([(t, c.d_model), (c.d_model,)], (1e-5,)),
        "rope": ([q, kv], (position, c.rope_theta)),
        "swiglu": ([(t, c.d_ff), (t, c.d_ff)], ()),
        "attention": ([q, kv, kv], (borders, max(lengths))),
        "linear_nll": ([(t, c.d_model), (c.vocab_size, c.d_model)], (label,)),
    }[op]
    inputs = [s.randn(*shape) for shape in shapes]
    if op == "linear_nll":  # logits of about the size that a trained model has
        inputs[1] *= 2 * c.d_model**-0.5

    def bound(function: Callable) -> Callable:
        """A function of the inputs alone; of linear_nll the nll alone: rivals give nothing else."""

        def work(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
            out = function(*x, *others)
            return out[0] if op == "linear_nll" and isinstance(out, tuple) else out

        return work

    ours = bound(getattr(kernels, op))
    works = {"triton": under("triton", ours)} if triton else {}
    works |= {"definition": under("reference", ours)}
    works |= {name: bound(rival) for name, rival in getattr(rivals, op)(s, *others).items()}
    return Case(op, lengths, inputs, works, bound(getattr(oracles, op)))


def under(kernels_name: str, function: Callable) -> Callable:
    """The function with these versions of the ops (kernels.use)."""

    def work(*x: Tensor) -> Tensor | tuple[Tensor, ...]:
        kernels.use(kernels_name)
        return function(*x)

    return work


def _layer(s: Setting, lengths: list[int], triton: bool) -> Case:
    """A layer with random weights, which are inputs like x[T,D]: their gradients are compared and
    timed too. Thirty-two times the layer is most of a step."""
    with torch.device("meta"):
        layer = Layer(s.config)
    params = dict(layer.named_parameters())
    row = row_from([[0] * n for n in lengths]).to(s.device)
    x = s.randn(sum(lengths), s.config.d_model)
    weights = [
        x.new_empty(p.shape).normal_(float("norm" in name), 0.02) for name, p in params.items()
    ]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(params, weights, strict=True)), (x, row))

    definition = under("reference", run)
    works = {name: under(name, run) for name in OURS} if triton else {}
    works |= {"definition": definition}
    if s.on_gpu:
        works["torch.compile"] = under("reference", torch.compile(run, dynamic=False))
    return Case("layer", lengths, [x, *weights], works, definition)
