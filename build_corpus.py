"""A medical corpus out of a general one, on one page.

    python build_corpus.py                                     a demonstration on samples/raw
    python build_corpus.py --data RAW/*.jsonl.gz --out corpus  all cores of this machine
    torchrun --nproc_per_node 16 build_corpus.py ...           or a Slurm array: ranks share shards
    python build_corpus.py --engine ray ...                    a cluster (needs ray[default])

Every stage keeps a document or drops it with a reason, a value and a limit (OUT/report.html). The
same command goes on after a kill, and its result does not depend on who did the work. docs/data.md
explains the stages.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from nanomed import arguments
from nanomed.build import classifier, decontaminate, duplicates, labels, report, rules
from nanomed.build.labeller import Endpoint
from nanomed.build.pipeline import Build, Prepare, run
from nanomed.build.runner import ENGINES, Runner, mark, script
from nanomed.build.settings import Paid, files_of, flag, weight_files
from nanomed.build.shards import Judge, Tally
from nanomed.config import InputError, beside_the_scripts, check_limits, nearest


@dataclass(frozen=True)
class Corpus(Paid):
    """The settings. Those without a mark below decide what the result is; a folder has one set."""

    script: ClassVar[str] = "build_corpus.py"

    data: list[str] = flag((), "files or folders of documents; default: samples/raw")
    out: str = flag("", "the build's folder; the demonstration's is runs/corpus")
    fields: list[str] = flag((), "other names of fields, as KNOWN=THEIRS: text=body")
    min_tokens: int = flag(20, "rule: fewest tokens (Chinese characters, words)", "unpublished")
    max_special: float = flag(
        0.2, "rule: largest share of characters that are no letters and no common punctuation",
        "unpublished",
    )  # fmt: skip
    max_repetition: float = flag(0.3, "rule: largest share of 10-token runs that come again")
    max_toxic: float = flag(5.0, "rule: most toxic words per 1,000 characters", "unpublished")
    toxic_words: str = flag("", "file of toxic words, one a line; default: ours")
    private: str = flag(
        "drop", "rule: documents with private data", "drops them", ("drop", "mask", "keep")
    )
    labels: list[str] = flag((), "files of labelled documents: text, and domain or quality")
    labeller: str = flag("", "endpoint that labels documents of the pool: http://HOST/v1")
    labeller_model: str = flag("", "the model it is asked for", "GPT-4")
    classifier: str = flag("", "decoder that learns from them: Hugging Face folder or run folder; "
                               "default: a linear model", "multilingual BERT")  # fmt: skip
    label_documents: int = flag(20_000, "documents it is asked about, twice each", "20,000")
    min_domain: float = flag(0.5, "least probability of medicine where no label chooses a limit")
    min_quality: float = flag(3.0, "least quality, of 0 to 6, for stage 2", "unpublished")
    general: float = flag(0.02, "share of the other documents that is put aside for stage 1")
    near_dup_jaccard: float = flag(0.8, "least share of 5-token runs that near duplicates share")
    decontaminate: list[str] = flag((), "files of benchmarks whose questions must not be learned")
    shard_chars: int = flag(32 << 20, "characters in a shard, what one process works at")
    # These change nothing in the result.
    stop_after: str = flag("", "the last stage to run; default: all")
    engine: str = flag("auto", "who works; auto: ranks under a launcher, else this machine",
                        choices=ENGINES)  # fmt: skip
    workers: int = flag(0, "processes of this machine; 0: one per core")
    show_text: bool = flag(False, "texts of dropped documents in the lists and the report")

    def __post_init__(self) -> None:
        shares = ("max_special", "max_repetition", "min_domain", "general")
        limits = [(0 <= getattr(self, name) <= 1, name, "between 0 and 1") for name in shares]
        limits.append((0 < self.near_dup_jaccard <= 1, "near_dup_jaccard", "above 0, at most 1"))
        check_limits(self, limits)
        if self.stop_after and self.stop_after not in (names := stages(self)):
            hint = nearest(self.stop_after, names)
            raise InputError(f"--stop_after {self.stop_after}: stages are {', '.join(names)}{hint}")


CHANGE_NOTHING = (
    *("config", "out", "data", "stop_after", "engine", "workers", "max_cost", "price_in"),
    *("price_out", "send_texts_to", "retry_failed", "show_text"),
)
DEMONSTRATION = {
    "data": ["samples/raw"],
    "labels": ["samples/raw_labels.jsonl.gz"],
    "decontaminate": ["samples/exam.jsonl"],
    "general": 0.5,
    "show_text": True,
}


# ---------------------------------------------------------------- the stages


def stages(c: Corpus) -> dict[str, Prepare]:
    """In their order. What is below the limit of `domain` or `quality` is put aside, of other
    documents a share, for stage 1 of the training."""
    limits = (c.min_tokens, c.max_special, c.max_repetition, c.max_toxic)
    words = Path(c.toxic_words or rules.WORDS)
    return {
        "exact": duplicates.find,
        "rules": lambda *_: rules.Limits(*limits, c.private, words).judge,
        "domain": partial(scored, c, "domain", limit=c.min_domain, aside=c.general),
        "near": partial(duplicates.find, least=c.near_dup_jaccard),
        "quality": partial(scored, c, "quality", limit=c.min_quality, aside=1.0),
        "decontaminate": lambda *_: decontaminate.judge_of(c.decontaminate),
    }


def scored(
    c: Corpus, kind: str, build: Build, folder: Path, shards: list[Path], tally: Tally, *,
    limit: float, aside: float,
) -> Judge | str:  # fmt: skip
    """A model is trained on labelled documents, and its score has a limit."""
    known = labels.read_labels(kind, c.labels, c.fields)
    if not known and not c.labeller:
        return f"no labels with {kind!r}: give --labels FILE or --labeller URL"
    chosen = labels.sample(build, folder, shards, tally, c.label_documents) if c.labeller else []

    def all_labels() -> list[labels.Label]:
        return known + (labels.ask(endpoint_of(c), kind, chosen, c.retry_failed) if chosen else [])

    model = folder / "model/model.safetensors"
    how = {"kind": kind, "labels": all_labels, "limit": limit, "init": c.classifier}
    task = partial(classifier.write_model, path=model, **how)
    (facts,) = build.runner.run(model.parent, task, 1)
    return classifier.Scorer(kind, model, c.classifier, facts["limits"], aside).judge


def endpoint_of(c: Corpus) -> Endpoint:
    return c.endpoint(c.labeller, c.labeller_model, Path(c.out) / "answers.jsonl")


# ---------------------------------------------------------------- a run


def settings() -> Corpus:
    c = arguments.parse(Corpus, base={})
    if not c.data:
        c = replace(c, **{k: v for k, v in DEMONSTRATION.items() if not getattr(c, k)})
        c = replace(c, out=c.out or "runs/corpus", general=DEMONSTRATION["general"])
    if not c.out:
        raise InputError("give --out, the folder of the build")
    lists = ("data", "labels", "decontaminate")
    return replace(c, **{n: list(map(beside_the_scripts, getattr(c, n))) for n in lists})


def deciding(c: Corpus) -> dict[str, Any]:
    """The settings that the result depends on. Where a labeller is to be found is none of them."""
    named = {name: value for name, value in vars(c).items() if name not in CHANGE_NOTHING}
    return named | {"labeller": bool(c.labeller)}


def facts(c: Corpus, build: Build, found: list[tuple[str, Tally]]) -> dict[str, Any]:
    """What the report says beside the tallies."""
    tallies = {name: tally for name, tally in found if not tally.not_run}
    more: dict[str, Any] = {
        "settings": deciding(c),
        "files": build.files,
        "models": {},
        "duplicates": {},
    }
    for number, name in enumerate(stages(c), 1):
        folder = build.out / f"{number}-{name}"
        for part, key, place in (("gone", "duplicates", "largest"), ("model", "models", "")):
            if name in tallies and (said := mark(folder / part, 0)).exists():
                content = json.loads(said.read_text("utf-8"))
                more[key][name] = content[place] if place else content
    if "decontaminate" in tallies:
        index = decontaminate.index_of(tuple(c.decontaminate))
        asked, missed = Counter(item.file for item in index.items), index.unprotected()
        more["benchmarks"] = {
            path: dict(
                zip(
                    ("touched", "dropped"),
                    tallies["decontaminate"].touched.get(path, [0, 0]),
                    strict=True,
                )
            )
            | {"items": n, "unprotected": missed[path]}
            for path, n in asked.items()
        }
    return more


def main() -> None:
    c = settings()
    out, files = Path(c.out), files_of(c.data)
    chosen = [*stages(c).items()]
    names = [name for name, _ in chosen]
    chosen = chosen[: names.index(c.stop_after) + 1 if c.stop_after else None]
    with Runner(c.engine, c.workers) as runner:
        build = Build(out, files, list(c.fields), c.show_text, c.shard_chars, runner)
        others = [*c.labels, *c.decontaminate, *filter(None, [c.toxic_words])]
        if c.classifier:
            others += map(str, weight_files(c.classifier))
            from nanomed.distributed import pick_device  # here, because torch is slow to import

            pick_device("auto")  # a launcher's process without a GPU is refused now
        build.begin(deciding(c), others)
        # What cannot be read stops the run now.
        decontaminate.index_of(tuple(c.decontaminate))
        rules.words_in(Path(c.toxic_words or rules.WORDS))
        known = [labels.read_labels(kind, c.labels, c.fields) for kind in ("domain", "quality")]
        if c.labels and not any(known):
            raise InputError(f"--labels {c.labels[0]}: no record has a domain or a quality")
        if c.labeller and runner.is_main:
            endpoint_of(c).cache.file.close()
        found = run(build, chosen)
        if runner.is_main:
            report.write(out, found, facts(c, build, found))
            print(
                f"{out}/report.html says what became of every document; {out}/final has the corpus"
            )


if __name__ == "__main__":
    script(main)
