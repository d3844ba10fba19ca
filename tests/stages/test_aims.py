"""docs/aims.md says what the formulas give."""

import re

from nanomed.config import CPT, MODELS
from nanomed.model.recompute import POLICIES
from nanomed.run.log import flops_of
from nanomed.stages import memory
from tests.conftest import ROOT

TEXT = " ".join((ROOT / "docs/aims.md").read_text("utf-8").split())
MATMUL = 790e12  # FLOP/s, as the page says


def test_what_fits_an_h200_and_what_bounds_it():
    model, n = MODELS["aquilamed-7b"], 4096
    flops = flops_of(model, n, n * n) / n
    again = flops / 3 - 2 * model.vocab_size * model.d_model  # a layer's forward, for all of them
    gib = {}
    for recompute in POLICIES:
        c = CPT(micro_tokens=n, recompute=recompute, dropout=0.0, kernels="triton", dtype="bf16")
        gib[recompute] = sum(memory.memory(model, c, 1).values())
        most = MATMUL / (flops + again * (recompute == "full"))
        assert f"| {recompute} | {gib[recompute]:.1f} | {most:,.0f} |" in TEXT
    assert f"{sum(memory.states(model, 1).values()) / memory.GIB:.1f} GiB of about 140" in TEXT
    assert f"frees {4 * model.n_params() / memory.GIB:.1f} GiB" in TEXT


def test_what_it_calls_measured_stands_in_the_results():
    results = (ROOT / "docs/results.md").read_text("utf-8")
    h200, h100 = re.findall(r"\*\*Measured\*\*(.*?)##", TEXT)
    rates = re.findall(r"\| (\d\d,\d{3}) ", h200) + re.findall(r"at (\d,\d{3}) tokens", h100)
    assert len(rates) == 6
    for rate in rates:
        assert re.search(rf"\| AquilaMed .* {rate} \|", results), rate
