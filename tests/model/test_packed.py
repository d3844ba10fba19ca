"""Linear layers in oneDNN's layout: the same products, in a model that is only run."""

import pytest
import torch
from torch import nn

from nanomed.batches.packing import row_from
from nanomed.model import packed
from nanomed.model.decoder import Aquila
from nanomed.model.packed import PackedLinear, pack_linears


def packed_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.fixture(scope="module")
def model(small) -> Aquila:
    return Aquila(small)


pytestmark = pytest.mark.skipif(
    not all(hasattr(torch.ops.mkldnn, name) for name in packed.OPS), reason="no oneDNN"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 7, 130])
def test_the_products_are_those_of_float64(n_tokens, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    x = torch.randn(n_tokens, 96)
    wanted = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    with torch.no_grad():
        error = (PackedLinear(linear)(x) - wanted).norm() / wanted.norm()
        own = (linear(x) - wanted).norm() / wanted.norm()
    assert error < max(3 * own, 1e-6)


def test_a_packed_models_scores_are_the_models(model, small):
    row = row_from([list(range(1, 40)), list(range(5, 20))])
    with torch.no_grad():
        wanted = model(row).nll
        other = Aquila(small)
        other.load_state_dict(model.state_dict())
        linears = [n for n, module in other.named_modules() if isinstance(module, nn.Linear)]
        pack_linears(other)
        assert packed_layers(other) == linears and len(linears) == 7 * small.n_layers
        assert (other(row).nll - wanted).abs().max() < 1e-5
        assert wanted.abs().max() > 1  # there is something to be equal to


def test_what_does_not_fit_is_left_alone(model, small, monkeypatch):
    half = Aquila(small).to(torch.bfloat16)
    pack_linears(half)
    assert packed_layers(half) == []
    with torch.device("meta"):
        unmade = Aquila(small)
    pack_linears(unmade)
    assert packed_layers(unmade) == []
    monkeypatch.setattr(packed, "OPS", ("_no_such_op",))
    pack_linears(model)
    assert packed_layers(model) == []
