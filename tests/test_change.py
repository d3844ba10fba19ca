"""docs/change.md: each of its changes fits the code as it is, and does what the page says."""

import dataclasses
import json
import re
import subprocess
import sys
import types
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT
from tests.loss_oracle import check_loss
from tests.training import test_loss_oracle as oracle
from tests.training.test_dpo import random_reference

PAGE = (ROOT / "docs/change.md").read_text("utf-8")
RECIPES = dict(re.findall(r"^## \d\. (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def changed(recipe: str) -> dict[str, str]:
    """Path -> the file's text after a recipe's blocks. Each hunk is looked for by its lines, not by
    their numbers, and must stand in the file exactly once."""
    texts = {}
    for path, hunks in re.findall(r"```diff\n--- (.*?)\n@@\n(.*?)```", RECIPES[recipe], re.DOTALL):
        text = texts.get(path) or (ROOT / path).read_text("utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(x[1:] or x for x in lines if x[0] not in a) for a in "+-")
            assert text.count(old) == 1, f"{recipe}, {path}: the page has\n{old}"
            text = text.replace(old, new)
        texts[path] = text
    return texts


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_the_code(recipe, tmp_path):
    texts = changed(recipe)
    for path, text in texts.items():
        (tmp_path / path.replace("/", "_")).write_text(text, "utf-8")
    for command in (["check", "--select", "E,F"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *command, "--line-length", "100", str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
    assert (
        any(path.startswith("tests/") for path in texts) and "beginner's error" in RECIPES[recipe]
    )


def test_the_page_says_how_long_each_change_is():
    rows = re.findall(r"^\| \[(.*?)\].*\| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(RECIPES) == 6
    for (_, said), text in zip(rows, RECIPES.values(), strict=True):
        blocks = re.findall(r"```diff\n--- (?!tests/)(.*?)```", text, re.DOTALL)
        signs = [line[0] for block in blocks for line in block.splitlines()[1:] if line]
        minus = f" -{signs.count('-')}" if "-" in signs else ""
        assert said == f"+{signs.count('+')}{minus}"


# ---------------------------------------------------------------- run


def loaded(source: str) -> types.ModuleType:
    """A file's changed text as a module."""
    module = types.ModuleType("changed")
    module.__file__ = str(ROOT / "nanomed/changed.py")
    exec(compile(source, "a change of docs/change.md", "exec"), module.__dict__)
    return module


def of_page(source: str, name: str, make):
    """The function of that name in a script's changed text, for the oracle: in each process."""
    return make(getattr(loaded(source), name))


def with_z(next_token_loss):
    return partial(next_token_loss, z_loss=oracle.Z)


def with_simpo(preference_loss):
    c = SimpleNamespace(beta=1.0, label_smoothing=0.0, sft_weight=0.0)
    c.simpo_beta, c.simpo_gamma = oracle.BETA, oracle.GAMMA
    n = len(oracle.PAIRS)
    return preference_loss(random_reference(n), torch.zeros(n), [], c)


def test_simpo_and_its_beginners_error(pool, small):
    source = changed("SimPO")["train_dpo.py"]
    loss = partial(of_page, source, "preference_loss", with_simpo)
    check_loss(pool, small, oracle.PAIRS, loss, oracle.simpo)
    wrong = source.replace("c.simpo_beta * logps / counts", "c.simpo_beta * logps")
    loss = partial(of_page, wrong, "preference_loss", with_simpo)
    with pytest.raises(AssertionError):
        check_loss(pool, small, oracle.PAIRS, loss, oracle.simpo)


def test_z_loss(pool, small):
    loss = partial(of_page, changed("z-loss")["train_sft.py"], "next_token_loss", with_z)
    check_loss(pool, small, oracle.CHATS, loss, oracle.next_token_and_z)


def test_a_chat_format_and_its_beginners_error():
    texts = changed("A chat format")
    _, text, [(turns, _)] = loaded(texts["tests/formats.py"]).CHATS["dialog"]
    source = texts["nanomed/records/__init__.py"]
    swapped = '"patient": "assistant", "doctor": "user"'
    wrong = source.replace('"patient": "user", "doctor": "assistant"', swapped)
    right, other = (loaded(text_).chats_of(json.loads(text)) for text_ in (source, wrong))
    assert right[0].turns == turns != other[0].turns


def test_attention_and_mlp_in_parallel_and_its_beginners_error(small):
    texts = changed("Attention and MLP in parallel")
    tests = loaded(texts["tests/model/test_model.py"])
    small = loaded(texts["nanomed/config.py"]).ModelConfig(**dataclasses.asdict(small))
    source = texts["nanomed/model/decoder.py"]
    wrong = source.replace("+ self.dropout(self.mlp(h))", "+ self.mlp(self.input_layernorm(x + h))")
    tests.Layer = loaded(source).Layer
    tests.test_attention_and_mlp_in_parallel(small)
    tests.Layer = loaded(wrong).Layer
    with pytest.raises(AssertionError):
        tests.test_attention_and_mlp_in_parallel(small)


def test_wsd_and_its_beginners_error():
    texts = changed("The WSD schedule")
    tests = loaded(texts["tests/training/test_optim.py"])
    tests.SFT = SimpleNamespace
    source = texts["nanomed/training/optim.py"]
    tests.lr_at = loaded(source).lr_at
    tests.test_wsd()
    tests.lr_at = loaded(source.replace("(n_steps - step) /", "(n_steps - 1 - step) /")).lr_at
    with pytest.raises(AssertionError):
        tests.test_wsd()
