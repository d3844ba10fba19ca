"""A model out into a Hugging Face folder, tensor by tensor."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nanomed.config import InputError
from nanomed.distributed import from_main, is_sharded
from nanomed.hf.card import model_card
from nanomed.hf.config import render, unsaid
from nanomed.hf.reading import hf_name
from nanomed.hf.tensors import Spec, plan, write_file, write_index, write_json
from nanomed.hf.tokenizer import is_qwen, write_tokenizer
from nanomed.model.decoder import Aquila
from nanomed.model.generation import CHAT
from nanomed.run.checkpoint import free_space
from nanomed.run.progress import progress
from nanomed.text.template import Template, fitting
from nanomed.text.tokenizer import Tokenizer, check_rows


def export(
    model: Aquila,
    tokenizer: Tokenizer,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    template: Template | None = None,
    replace: bool = False,
    about: dict | None = None,
) -> None:
    """Writes the model to a new folder, tensor by tensor: no rank ever holds all of it. Every
    rank of a sharded model calls it.

    `template` defaults to the one that fits the tokenizer's special tokens; `about` is the run's
    configuration, for the model card. Raises InputError before anything is written: if the folder
    is not empty (unless `replace` says that it is an older export of the same run), the disk is
    too full, the tokenizer does not belong to the model, or config.json cannot say its shape."""
    folder, template = Path(folder), template or fitting(tokenizer)
    specs = _specs(model, dtype, _is_qwen2(model, tokenizer))
    main = not dist.is_initialized() or dist.get_rank() == 0
    # Rank 0 looks for all: another copy's ranks may come when the folder is already written.
    n_bytes = sum(spec.n_bytes for spec in specs)
    if problem := from_main(_problem(model, tokenizer, folder, n_bytes, replace) if main else ""):
        raise InputError(problem)
    unfinished = folder.with_name(folder.name + ".unfinished")
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _write_small_files(unfinished, model, tokenizer, template, dtype, about)
    shards = plan(specs)
    with progress(len(specs), "tensor", "writing weights") as bar:
        for name, members in shards:
            if main:
                write_file(unfinished / name, members, _pieces(model, members, bar))
            else:  # takes part, keeps nothing
                for _ in _pieces(model, members, bar):
                    pass
    if main:
        if len(shards) > 1:
            write_index(unfinished, shards)
        _put_in_place(unfinished, folder)
    if dist.is_initialized():
        dist.barrier()


def _is_qwen2(model: Aquila, tokenizer: Tokenizer) -> bool:
    c = model.config
    return is_qwen(tokenizer) and c.qkv_bias and not (c.o_bias or c.qk_norm)


def _specs(model: Aquila, dtype: torch.dtype, is_qwen2: bool) -> list[Spec]:
    """What will be written, in the model's order. Where q, k and v have a bias, transformers wants
    one in o_proj, too, except in a Qwen2: ours has the value 0."""
    specs = []
    for name, param in model.named_parameters():
        specs.append(Spec(hf_name(name), dtype, tuple(param.shape)))
        if name.endswith("v_proj.bias") and not (is_qwen2 or model.config.o_bias):
            o_bias = hf_name(name).replace("v_proj", "o_proj")
            specs.append(Spec(o_bias, dtype, (model.config.d_model,)))
    return specs


def _pieces(model: Aquila, specs: list[Spec], bar: tqdm) -> Iterator[tuple[Spec, Tensor]]:
    """The tensors' values in order, a piece at a time: the rows of one rank, on every rank. Every
    rank must ask for all of them."""
    params = {hf_name(name): param.detach() for name, param in model.named_parameters()}
    for spec in specs:
        bar.update()
        param = params.get(spec.name)
        if param is None:
            yield spec, torch.zeros(spec.shape, dtype=spec.dtype)
        elif is_sharded(param):
            yield from ((spec, rows) for rows in _rows_of_each_rank(param, spec.dtype))
        else:
            yield spec, param.to(spec.dtype)


def _rows_of_each_rank(param: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """full_tensor() was seen to need the tensor three times at a peak, on every rank."""
    (sharded,) = [i for i, p in enumerate(param.placements) if p.is_shard()]
    group = param.device_mesh.get_group(sharded)
    size = dist.get_world_size(group)
    for rank, like in enumerate(torch.empty(len(param), device="meta").chunk(size)):
        if rank == dist.get_rank(group):
            rows = param.to_local().to(dtype).contiguous()
        else:
            rows = torch.empty(len(like), *param.shape[1:], dtype=dtype, device=param.device)
        dist.broadcast(rows, group=group, group_src=rank)
        yield rows


def _problem(model: Aquila, tokenizer: Tokenizer, folder: Path, n_bytes: int, replace: bool) -> str:
    """Why there can be no export; "" if there can."""
    if not replace and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        return f"{folder} is not empty; export to a new folder"
    if names := unsaid(model.config):
        return f"config.json has no word for {', '.join(names)}: this cannot be exported"
    try:
        check_rows(tokenizer, model.config.vocab_size)
    except InputError as error:
        return str(error)
    if (free := free_space(folder)) < n_bytes + 2**27:  # tokenizer files are small
        return f"{folder} needs {n_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free"
    return ""


def _write_small_files(
    folder: Path,
    model: Aquila,
    tokenizer: Tokenizer,
    template: Template,
    dtype: torch.dtype,
    about: dict | None,
) -> None:
    turn_end = tokenizer.special[template.turn_end]
    document_end = tokenizer.special[template.document_end]
    # Whoever serves the model stops at the end of a turn, and of a document.
    stop = list(dict.fromkeys((turn_end, document_end)))
    is_qwen2 = _is_qwen2(model, tokenizer)
    config = render(model.config, dtype, is_qwen2, stop, document_end)
    write_json(folder / "config.json", config)
    # Without the penalty on repetition: greedy answers, an evaluation's too, would have it as well.
    sampling = {"do_sample": True, "temperature": CHAT.temperature, "top_p": CHAT.top_p}
    generation = {"eos_token_id": stop, "pad_token_id": document_end} | sampling
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(folder, tokenizer, template, model.config.max_seq_len, is_qwen2)
    card = model_card(model.config, dtype, config["architectures"][0], about or {})
    (folder / "README.md").write_text(card, encoding="utf-8")


def _put_in_place(unfinished: Path, folder: Path) -> None:
    """At no moment is there neither the older export nor this one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
