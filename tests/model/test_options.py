"""Every option of a model's shape is counted in its parameters and its memory, and is exported.

An option that is new in ModelConfig turns the first test red; listed in OPTIONS, it has to pass the
others."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from nanomed.batches.packing import row_from
from nanomed.config import MODELS, SFT, InputError, ModelConfig
from nanomed.hf import export
from nanomed.hf.config import unsaid
from nanomed.model import recompute
from nanomed.model.decoder import Aquila, Layer
from nanomed.stages import memory, stage
from tests.model.test_recompute import kept_bytes, like_a_gpu

SHAPE = dataclasses.replace(
    MODELS["tiny"], n_layers=2, d_model=256, n_heads=4, n_kv_heads=2, d_ff=384
)
# Each field of ModelConfig with another value than SHAPE's.
OPTIONS = {
    "vocab_size": 300, "n_layers": 3, "d_model": 128, "n_heads": 8, "n_kv_heads": 4, "d_ff": 200,
    "max_seq_len": 512, "rope_theta": 1e4, "norm_eps": 1e-6, "qkv_bias": False, "head_dim": 96,
    "qk_norm": True, "o_bias": True, "rope_scaling": (8.0, 1.0, 4.0, 8192.0),
}  # fmt: skip


def test_every_option_is_listed_here():
    assert {f.name for f in dataclasses.fields(ModelConfig)} == set(OPTIONS)
    for name, value in OPTIONS.items():
        assert getattr(SHAPE, name) != value, name


@pytest.fixture(params=OPTIONS)
def config(request) -> ModelConfig:
    return dataclasses.replace(SHAPE, **{request.param: OPTIONS[request.param]})


def test_its_parameters_are_counted(config):
    with torch.device("meta"):
        model = Aquila(config)
    assert config.n_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_its_memory_is_counted(config, choice, monkeypatch):
    """What a layer keeps of a token for backward, to the byte, under every policy."""
    like_a_gpu(monkeypatch, plain=choice == "reference")
    row, layer = row_from([range(64)]), Layer(config).to(torch.bfloat16)
    x = torch.randn(64, config.d_model, dtype=torch.bfloat16, requires_grad=True)
    for policy in recompute.POLICIES:
        c = SFT(recompute=policy, dtype="bf16", kernels=choice, dropout=0.0)
        recompute.set_layer(layer, policy)
        kept = kept_bytes(layer, x, row, monkeypatch)
        assert kept == 64 * sum(memory.kept_per_token(config, c, policy).values()), policy


# Options that config.json has no word for. A run says so at its start and has no export.
NO_WORD: set[str] = set()


def test_config_json_says_it(config, request):
    """tests/hf/test_shapes.py compares the tensors; here is what config.json says."""
    name = request.node.callspec.params["config"]
    assert unsaid(config) == [name] * (name in NO_WORD)


def test_an_option_without_a_word_is_seen_and_not_exported(encoder, tmp_path):
    """One that exists only here. A run ends without an export, and says so."""
    new = dataclasses.make_dataclass(
        "New", [("new", bool, True)], bases=(ModelConfig,), frozen=True
    )
    model = Aquila(new(**dataclasses.asdict(SHAPE)))
    assert unsaid(model.config) == ["new"]
    with pytest.raises(InputError, match="has no word for new"):
        export(model, encoder.tokenizer, tmp_path / "x")
    said = []
    world = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(path=tmp_path / "run", print=said.append, world=world)
    stage.export(SFT(), model, encoder, run)
    assert said == [f"not exported; run folder: {tmp_path / 'run'}"] and not list(
        tmp_path.iterdir()
    )
