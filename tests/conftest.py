"""Fixtures that the tests share. Everything here runs on a CPU, without network.

A machine's GPU is met by the tests marked `gpu` and by those of the kernels alone.
"""

import dataclasses
import functools
import os
import sys
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest import mock

import pytest

with suppress(ImportError):  # the tests for a GPU run without it
    from hypothesis import settings

    settings.register_profile("same", derandomize=True)  # the same cases in every run
    settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Two threads wait for each other at every operation; on a busy machine one is faster. In the
# environment it holds for the scripts that tests run, too.
os.environ["OMP_NUM_THREADS"] = "1"

if sys.dont_write_bytecode:  # each process would compile all of torch's Python anew, for seconds
    compiled = str(ROOT / ".pytest_cache/compiled")  # and the next run finds it there
    sys.dont_write_bytecode, sys.pycache_prefix = False, compiled
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": compiled}

import torch  # noqa: E402

os.environ.setdefault(
    "TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1"
)  # before triton is imported

from tests import interpreter  # noqa: E402

interpreter.repair()

# transformers looks for the published package `kernels` and would import our folder of that name.
with suppress(ImportError):  # the tests for a GPU run without it
    import transformers.utils
    import transformers.utils.import_utils

    transformers.utils.is_kernels_available = lambda *_: False
    transformers.utils.import_utils.is_kernels_available = lambda *_: False

import kernels  # noqa: E402
from nanomed import distributed, store  # noqa: E402
from nanomed.config import ModelConfig  # noqa: E402
from nanomed.text import template, tokenizer  # noqa: E402
from tests.ranks import Pool  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Around a test and the fixtures that are made for it, of any scope."""
    meets_gpus = item.get_closest_marker("gpu") or item.path.parent.name == "kernels"
    with nullcontext() if meets_gpus else no_gpu():
        return (yield)


@contextmanager
def no_gpu():
    """There is no GPU for this process, nor for those that it starts."""
    hidden = mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")
    # CUDA has read that variable before, and does so once in a process.
    absent = mock.patch.multiple(torch.cuda, is_available=lambda: False, device_count=lambda: 0)
    with hidden, absent:
        yield


@pytest.fixture(autouse=True)
def _as_new(tmp_path, monkeypatch):
    """Tests write nothing into the checkout, and leave the number of threads and the choice of
    kernels as they were: a script that a test runs to its start takes all cores."""
    monkeypatch.setattr(store.cache, "CACHE", tmp_path / "cache")
    chosen = kernels._chosen
    yield
    kernels.use(chosen)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder() -> template.Encoder:
    return template.Encoder(template.CHATML, tokenizer.load(ROOT / "samples/tokenizer.model"))


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """Every feature of the real models (grouped queries, q/k/v bias), in 0.1 million parameters."""
    return ModelConfig(97, 2, 128, 2, 1, 96, 512, 1e6, 1e-5, True)


@pytest.fixture(scope="session")
def shallow(small) -> ModelConfig:
    """For whole runs on several ranks, where every layer costs as much as all else in a step."""
    return dataclasses.replace(small, n_layers=1)


@pytest.fixture(scope="module")
def world():
    """This process alone, joined to a process group as a script would; it leaves it again, so that
    the tests of scripts can join one."""
    with distributed.start(torch.device("cpu")) as joined:
        torch.set_num_threads(1)
        yield joined


@pytest.fixture(scope="session")
def pool():
    """Four processes that stay warm: pool(n, function, *arguments) runs it on n ranks."""
    with Pool(4) as joined:
        yield joined


@pytest.fixture(scope="session", autouse=True)
def _started_early(request):
    """The pool's processes import torch while the first tests run, if any test needs them."""
    if any("pool" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("pool")


@pytest.fixture(scope="session")
def undisturbed(pool, tmp_path_factory):
    """(folder, results) of the run of tests/training/test_faults.py to which nothing happens, by
    its number of ranks. Tests read it."""
    from tests.training.test_faults import train

    @functools.cache
    def of(n_ranks: int) -> tuple[Path, list[dict]]:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        return folder, pool(n_ranks, train, str(folder))

    return of


@pytest.fixture
def shared_data() -> Path:
    """The real data beside the checkout."""
    folder = ROOT.parent / "shared/data"
    if not folder.exists():
        pytest.skip("../shared/data is absent")
    return folder
