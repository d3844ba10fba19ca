"""A folder with a model in it, whatever kind of folder: Hugging Face's, a run's, a checkpoint's.

--init, generation, chat and the export command all read a model through here, so that weights,
tokenizer and template come from one place and fit one another.
"""

import json
import warnings
from pathlib import Path

import torch
from torch import nn

from nanomed.config import InputError, ModelConfig
from nanomed.hf.chat_template import difference, like, renderer
from nanomed.hf.reading import load_weights as load_hf_weights
from nanomed.hf.reading import read_config
from nanomed.hf.tensors import stored
from nanomed.model.decoder import Aquila
from nanomed.processes import rank_from_env
from nanomed.run import checkpoint
from nanomed.text import template, tokenizer


def describe(
    folder: str | Path, tokenizer_path: str = "", template_name: str = ""
) -> tuple[ModelConfig, template.Encoder]:
    """The model's shape, and its tokenizer with its template. Allocates nothing. The last two may
    be named apart; a tokenizer that gives other ids than the folder's own is an InputError."""
    config = config_of(folder)
    tok = tokenizer_of(folder, tokenizer_path)
    tokenizer.check_rows(tok, config.vocab_size)
    return config, template.Encoder(_template_of(folder, tok, template_name), tok)


def _template_of(folder: str | Path, tok: tokenizer.Tokenizer, named: str) -> template.Template:
    """The one named, the one stored with a run or export, one that renders as the folder's own
    chat template does, or one that fits the tokenizer. Says so if the folder's renders otherwise.
    """
    if named:
        return template.load(named)
    home = _home(folder)
    render = renderer(home)
    if (stored := home / "template.json").exists():
        chosen = template.load(str(stored))
    else:
        chosen = (render and like(render, tok)) or template.fitting(tok)
    if render and (other := difference(render, chosen)) and rank_from_env()[0] == 0:
        print(
            f"WARNING: {folder}: its own chat template is not followed: {other}. Give --template a "
            "JSON file that renders as it does (docs/aquilamed.md shows one), or one of "
            f"{', '.join(template.TEMPLATES)} to say that this is meant",
            flush=True,
        )
    return chosen


def config_of(folder: str | Path) -> ModelConfig:
    saved = _home(folder) / "model.json"
    if not saved.exists():
        return read_config(folder)
    try:
        raw = json.loads(saved.read_text("utf-8"))
        raw.pop("dropout", None)  # runs up to November 2026 wrote it here; it is the run's alone
        return ModelConfig(**raw | {"rope_scaling": tuple(raw.get("rope_scaling", ()))})
    except (TypeError, ValueError) as error:
        raise InputError(f"{saved}: {error}") from None


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills a model, sharded or not."""
    if (_home(folder) / "model.json").exists():
        with warnings.catch_warnings():  # that one process loads what several have saved
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            checkpoint.load_weights(_checkpoint(folder), model)
    else:
        load_hf_weights(model, folder)


def load(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Aquila:
    """The model on one device, in evaluation mode."""
    config = config_of(folder)
    with torch.device("meta"):
        model = Aquila(config)
    model = model.to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model.eval()


def dtype_of(folder: str | Path) -> torch.dtype:
    """What an export has by default: what most tensors of a Hugging Face folder have, bfloat16 of a
    run's masters."""
    if (_home(folder) / "model.json").exists():
        return torch.bfloat16
    dtypes = [spec.dtype for _, spec in stored(folder).values()]
    return max(set(dtypes), key=dtypes.count)


def settings_of(folder: str | Path) -> dict:
    """The configuration of the run that made a checkpoint; nothing for other folders."""
    home = _home(folder)
    if not (home / "model.json").exists():
        return {"init": str(folder)}
    path = home / "config.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _home(folder: str | Path) -> Path:
    """Where model.json, template.json and the tokenizer stand: a checkpoint's are its run's."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return folder.resolve().parents[1] if (folder / "state.json").exists() else folder


def _checkpoint(folder: str | Path) -> Path:
    folder = Path(folder)
    if (folder / "state.json").exists():
        return folder
    for name in ("best", "latest"):
        if (path := folder / "checkpoints" / name).exists():
            return path
    raise InputError(f"{folder} is a run without a checkpoint")


def tokenizer_of(folder: str | Path, named: str = "") -> tokenizer.Tokenizer:
    """The folder's own, or the one that is named if it gives the same ids."""
    home = _home(folder)
    if not named:
        return tokenizer.load(home)
    chosen = tokenizer.load(named)
    try:
        own = tokenizer.load(home)
    except InputError:  # the folder has none of its own
        return chosen
    if not tokenizer.same(chosen, own):
        raise InputError(
            f"--tokenizer {named} gives other ids than {own.path}, with which the weights in "
            f"{folder} were trained; leave it out"
        )
    return chosen
