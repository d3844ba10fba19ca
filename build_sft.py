"""Chats for fine-tuning, chosen out of many, on one page.

    python build_sft.py                                  a demonstration on samples/
    torchrun --nproc_per_node 8 build_sft.py --data chats/*.json --scorer MODEL --out selected

Each round gets a complexity and a quality (Deita), each dialogue its Context Relevance; then
limits, diversity and proportions decide. Scores are computed once: the same command with other
limits takes a moment, and goes on after a kill. docs/data.md explains it, and `python -m
nanomed.tools.show FILE --init MODEL --cr` shows a dialogue round by round.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from nanomed import arguments
from nanomed.build import (
    context,
    decontaminate,
    deita,
    duplicates,
    report,
    scores,
    selection,
)
from nanomed.build import scorer as teaching
from nanomed.build.labels import prompts
from nanomed.build.pipeline import Build, described, facts_of, run
from nanomed.build.runner import Runner
from nanomed.build.settings import Paid, files_of, flag, weight_files
from nanomed.build.shards import read_shard
from nanomed.config import InputError, beside_the_scripts, check_limits
from nanomed.distributed import alone_or_start, launch, pick_device
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer
from nanomed.processes import rank_from_env
from nanomed.stages import stage


@dataclass(frozen=True)
class Chats(Paid):
    """The settings."""

    script: ClassVar[str] = "build_sft.py"

    data: list[str] = flag((), "files or folders of chats; default: samples/sft.jsonl")
    out: str = flag("", "folder of the scores and of what is selected; default: runs/selected")
    fields: list[str] = flag((), "other names of fields, as KNOWN=THEIRS: question=query")
    scorer: str = flag("", "model that scores: Hugging Face folder or run folder", "unpublished")
    cr_model: str = flag("", "model of Context Relevance; default: --scorer", "unpublished")
    template: str = flag("", "name or JSON file; default: the model's")
    labels: list[str] = flag((), "labelled chats, to train a scorer on, from --scorer or fresh")
    labeller: str = flag("", "endpoint that gives the digits instead: http://HOST/v1")
    labeller_model: str = flag("", "the model it is asked for")
    turns: str = flag("mean", "a chat's score: mean or sum (Deita) over its rounds", "mean",
                      ("mean", "sum"))  # fmt: skip
    targets: str = flag("turn", "Context Relevance of whole rounds, or of the assistant's tokens",
                        choices=context.TARGETS)  # fmt: skip
    min_score: float = flag(0.0, "least score, complexity x quality (1 to 36)", "unpublished")
    min_cr: float = flag(0.0, "least Context Relevance; below it rounds repeat", "unpublished")
    max_cr: float = flag(
        selection.NO_LIMIT, "largest; above 1 the history only hurts", "unpublished"
    )
    max_answer_loss: float = flag(
        selection.NO_LIMIT, "largest mean loss of the answers, nats per token; wrong ones have more"
    )
    max_similarity: float = flag(0.9, "largest cosine with a better chat that is kept; 1: any")
    keep: int = flag(0, "most chats that are kept, the best; 0: all")
    shares: list[str] = flag((), "languages, kinds or sources as KEY=SHARE, or paper",
                             "single_turn_zh=0.272 single_turn_en=0.14 option_zh=0.248 "
                             "multi_turn_zh=0.34")  # fmt: skip
    limit: int = flag(0, "only the first records of each file, to try things; 0: all")
    near_dup_jaccard: float = flag(0.8, "least share of 5-token runs that near duplicates share")
    decontaminate: list[str] = flag((), "files of benchmarks whose questions must not be learned")
    micro_tokens: int = flag(4096, "most tokens in one packed row")
    device: str = flag("auto", "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = flag("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "bf16", "fp32"))
    workers: int = flag(0, "processes that look for duplicates; 0: one per core")
    show_text: bool = flag(False, "texts of dropped chats in the lists and the report")

    def __post_init__(self) -> None:
        shares = ("near_dup_jaccard", "max_similarity")
        limits = [(0 < getattr(self, name) <= 1, name, "above 0, at most 1") for name in shares]
        limits.append((self.min_cr <= self.max_cr, "min_cr", f"at most --max_cr {self.max_cr}"))
        check_limits(self, limits)


DEMONSTRATION = {"limit": 400, "targets": "assistant", "keep": 200, "show_text": True}
TUNED = {  # Deita's, but for the batch, which is 512 there
    "epochs": 6, "batch_size": 64, "lr": 2e-5, "warmup_ratio": 0.1,
}  # fmt: skip
SMALL = {  # a scorer trained from nothing, in less than a minute
    "epochs": 2, "batch_size": 8, "lr": 2e-3, "seq_len": 512, "log_every": 20,
}  # fmt: skip


def settings() -> Chats:
    c = arguments.parse(Chats, base={})
    if not c.data:
        # A model that was trained for half a minute knows neither histories nor what is alike.
        tuned = (
            {"cr_model": "runs/sft", "max_cr": 1.0} if Path("runs/sft/checkpoints").exists() else {}
        )
        given = DEMONSTRATION | (tuned or {"max_similarity": 1.0})
        given = {k: v for k, v in given.items() if getattr(c, k) == getattr(Chats, k)}
        c = replace(c, data=["samples/sft.jsonl"], **given)
    elif not (c.scorer or c.labels or c.labeller):
        raise InputError("give --scorer MODEL, --labels FILES to train one, or --labeller URL")
    elif not (c.cr_model or c.scorer or c.labels):
        for name in ("min_cr", "max_cr", "max_answer_loss"):
            if getattr(c, name) != getattr(Chats, name):
                raise InputError(f"--{name} is of what a model reads: give --cr_model MODEL")
    lists = {n: list(map(beside_the_scripts, getattr(c, n))) for n in ("data", "decontaminate")}
    return replace(c, out=c.out or "runs/selected", **lists)


# ---------------------------------------------------------------- scores


def score(c: Chats, items: list[scores.Item], out: Path) -> tuple[dict, dict | None]:
    """(what is known of each key, the embeddings); on rank 0. Every rank calls it."""
    device = pick_device(c.device)
    digits_of = c.scorer
    if c.labels or not (c.scorer or c.labeller):
        digits_of = trained(c, items, out, device)
    lines, vectors = {}, None
    context_of = c.cr_model or c.scorer or digits_of
    for folder in dict.fromkeys(filter(None, (digits_of, context_of))):
        parts = [p for p, f in (("digits", digits_of), ("context", context_of)) if f == folder]
        if c.labeller and "digits" in parts:
            parts.remove("digits")
        if parts:
            vectors = measured(c, items, out, folder, parts, device, lines) or vectors
    if c.labeller and rank_from_env()[0] == 0:
        asked(c, items, out, lines)
    return lines, vectors


def trained(c: Chats, items: list[scores.Item], out: Path, device: torch.device) -> str:
    """A small scorer's folder: of labelled chats, in the demonstration of ladders."""
    chats = teaching.labelled(c.labels) if c.labels else [*teaching.ladders(items)]
    if c.scorer:
        longest = pretrained.config_of(c.scorer).max_seq_len
        start = TUNED | {"init": c.scorer, "seq_len": min(2048, longest)}
    else:
        chats += teaching.plain(items)
        start = SMALL
    settings = start | {"device": c.device, "dtype": c.dtype, "template": c.template}
    return str(teaching.train(chats, out / "scorer", device, **settings))


def measured(
    c: Chats, items: list[scores.Item], out: Path, folder: str, parts: list[str],
    device: torch.device, lines: dict,
) -> tuple | None:  # fmt: skip
    """Adds what one model says to `lines`; its embeddings."""
    config, encoder = pretrained.describe(folder, template_name=c.template)
    dtype = stage.compute_dtype(c, device)
    identity = {
        "parts": parts,
        "files": {p.name: facts_of(p) for p in weight_files(folder)},
        "config": vars(config),
        "dtype": str(dtype),
        "tokenizer": encoder.tokenizer.fingerprint(),
        "template": encoder.template.to_json(),
        "prompts": {kind: prompts()[kind] for kind in deita.ASKED} if "digits" in parts else {},
        "targets": c.targets,
        "numbers": scores.NUMBERS,
    }
    with alone_or_start(device) as world:
        width = config.d_model if "context" in parts else 0
        kept = scores.Kept(out / "cache", identity, width) if world.is_main else None
        if todo := scores.missing(items, kept):  # else no model is even read
            model = pretrained.load(folder, device, dtype)
            pack_linears(model)
            scorer = Scorer(model, world)
            scores.Measure(scorer, encoder, c.targets, parts, c.micro_tokens).fill(todo, kept)
    if kept is None:
        return None
    for key, line in kept.lines.items():
        lines[key] = lines.get(key, {}) | line
    return kept.vectors() if "context" in parts else None


def asked(c: Chats, items: list[scores.Item], out: Path, lines: dict) -> None:
    """Digits of an endpoint. What cannot be read is None, and its chat is dropped as such."""
    endpoint = c.endpoint(c.labeller, c.labeller_model, out / "answers.jsonl")
    chats = {item.key: deita.exchanges(item.chat) for item in items if not item.chat.dropped}
    requests = [
        deita.request_of(kind, *texts)
        for turns in chats.values() for texts in turns for kind in deita.ASKED
    ]  # fmt: skip
    digits = iter(endpoint.ask_parsed(requests, deita.parse_digit, c.retry_failed))
    for key, turns in chats.items():
        found = [[next(digits) for _ in deita.ASKED] for _ in turns]
        lines[key] = lines.get(key, {}) | {"rounds": found}


# ---------------------------------------------------------------- selection


def cleaned(c: Chats, files: list[str], out: Path) -> tuple[list, Path]:
    """Duplicates and benchmarks' questions, by the stages of a corpus: (what they did, their
    folder). It is named after what they depend on."""
    named = {"near_dup_jaccard": c.near_dup_jaccard, "decontaminate": c.decontaminate}
    depends = json.dumps([named, c.fields, files])
    folder = out / "clean" / hashlib.sha256(depends.encode()).hexdigest()[:8]

    stages = [
        ("exact", duplicates.find),
        ("near", partial(duplicates.find, least=c.near_dup_jaccard)),
        ("decontaminate", lambda *_: decontaminate.judge_of(c.decontaminate)),
    ]
    with Runner("local", c.workers) as runner:
        build = Build(folder, files, list(c.fields), c.show_text, 32 << 20, runner, True)
        build.begin(named, list(c.decontaminate))
        return run(build, stages), folder


def select(
    c: Chats, files: list[str], items: list[scores.Item], lines: dict, vectors: tuple | None,
    out: Path, device: torch.device,
) -> None:  # fmt: skip
    limits = selection.Limits(
        c.min_score, c.min_cr, c.max_cr, c.max_similarity, c.keep, selection.shares_of(c.shares),
        c.max_answer_loss,
    )  # fmt: skip
    written = scores.write(out / "scores.jsonl", items, lines, c.turns)
    of_id = {
        files.index(item.file) << 32 | item.record: (item, line)
        for item, line in zip(items, written, strict=True)
    }
    stages, folder = cleaned(c, files, out)
    left = (doc.id for path in selection.finals(folder) for doc in read_shard(path))
    ids = [i for i in left if i in of_id]
    mine = [of_id[i] for i in ids]
    sources = [item.chat.source or Path(item.file).name for item, _ in mine]
    table = None
    if vectors and vectors[0]:
        rows = [vectors[0].get(item.key, 0) for item, _ in mine]
        table = np.asarray(vectors[1])[rows]
    elif vectors is None and c.max_similarity < 1:
        print("--max_similarity is not applied: embeddings are a model's, --cr_model or --scorer")
    chosen = [line for _, line in mine]
    append, kept = selection.judge(ids, chosen, sources, table, limits, device)
    by_id = {i: line for i, (_, line) in of_id.items()}
    tally = selection.write(out, folder, append, by_id, files, c.show_text)
    print(described("select", tally))
    shown = {"settings": vars(c), "proportions": selection.proportions(chosen, sources, kept)}
    report.write(out, [*stages, ("select", tally)], shown)
    print("\n".join(scores.quantiles(written)))
    print(f"{out}/selected.jsonl has {tally.kept:,} chats; {out}/report.html says why")


def main() -> None:
    c = settings()
    out, files = Path(c.out), files_of(c.data)
    items = scores.read(files, c.fields, c.limit)
    selection.shares_of(c.shares)
    decontaminate.index_of(tuple(c.decontaminate))  # what cannot be read stops the run now
    lines, vectors = score(c, items, out)
    if rank_from_env()[0] == 0:
        select(c, files, items, lines, vectors, out, pick_device(c.device))


if __name__ == "__main__":
    launch(main)
