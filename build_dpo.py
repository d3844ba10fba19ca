"""Preference pairs for DPO, on one page.

    python build_dpo.py                                  a demonstration: option chats of samples/
    python build_dpo.py --data selected --exam EXAM.jsonl --model runs/sft \\
        --judge http://127.0.0.1:8000/v1

Objective pairs come from questions with known answers, in --exam and among the chats of --data.
Subjective ones are a model's answer against the chat's own, judged in both orders. The answers may
be shared by several processes (torchrun); the same command goes on after a kill. docs/data.md.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from nanomed import arguments
from nanomed.build import decontaminate, preferences
from nanomed.build.files import line_of, make_private, whole
from nanomed.build.settings import Paid, files_of, flag
from nanomed.build.shards import lottery
from nanomed.config import InputError, beside_the_scripts
from nanomed.distributed import alone_or_start, launch, pick_device
from nanomed.evals import answers, judge
from nanomed.evals.folder import short_hash
from nanomed.hf import pretrained
from nanomed.processes import rank_from_env
from nanomed.records import Chat, read_chats
from nanomed.stages import stage


@dataclass(frozen=True)
class Pairs(Paid):
    """The settings."""

    script: ClassVar[str] = "build_dpo.py"

    data: list[str] = flag((), "files of chats, or the folder of build_sft.py; default: "
                               "samples/sft.jsonl")  # fmt: skip
    exam: list[str] = flag((), "files of questions with known answers")
    out: str = flag("runs/pairs", "folder of the pairs")
    fields: list[str] = flag((), "other names of fields, as KNOWN=THEIRS: question=query")
    model: str = flag("", "whose answers stand against the chats' own", "GPT-4")
    template: str = flag("", "name or JSON file; default: the model's")
    judge: str = flag("", "endpoint that compares both: http://HOST/v1", "GPT-4")
    judge_model: str = flag("judge", "the name that the endpoint knows")
    subjective: int = flag(0, "most chats that are answered, by lot; 0: all", "9,019 pairs")
    objective: int = flag(0, "most questions that become pairs, by lot; 0: all", "3,708 pairs")
    seed: int = flag(0, "number that decides which wrong option is taken, and the lot")
    decontaminate: list[str] = flag((), "files of benchmarks whose questions must not be learned")
    max_new: int = flag(512, "most tokens of an answer")
    batch_size: int = flag(16, "answers at a time")
    device: str = flag("auto", "auto: the GPU if there is one", choices=("auto", "cuda", "cpu"))
    dtype: str = flag("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "bf16", "fp32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) != bool(self.judge):
            raise InputError("subjective pairs need both: --model, that answers, and --judge URL")


def settings() -> Pairs:
    c = arguments.parse(Pairs, base={})
    if not c.data and not c.exam:
        c = replace(c, data=["samples/sft.jsonl"])
    lists = {
        n: list(map(beside_the_scripts, getattr(c, n))) for n in ("data", "exam", "decontaminate")
    }
    return replace(c, **lists)


class Kept:
    """The pairs, and a line for each question or chat that gives none."""

    def __init__(self, c: Pairs):
        self.c, self.pairs, self.dropped = c, [], []
        self.read = 0  # as many as pairs and dropped together
        self.index = decontaminate.index_of(tuple(c.decontaminate))

    def drop(self, file: str, record: int, reason: str, value: Any = 0, limit: Any = 0) -> None:
        line = {"file": file, "record": record, "reason": reason, "value": value, "limit": limit}
        self.dropped.append(line)

    def add(self, pair: dict[str, Any], file: str, record: int, group: str) -> bool:
        text = "\n".join([*(turn["content"] for turn in pair["prompt"]), pair["chosen"]])
        for goes, part, needed, _ in self.index.hits([text]).values():
            if goes:
                self.drop(file, record, "contaminated", round(part, 4), needed)
                return False
        self.pairs.append(pair | {"group": group, "id": f"{file}:{record}"})
        return True

    def counts(self) -> dict[str, Any]:
        """Of the pairs by kind, and of what gives none by reason."""
        reasons = Counter(line["reason"] for line in self.dropped)
        kinds = Counter(pair["kind"] for pair in self.pairs)
        return {"read": self.read, "pairs": kinds, "dropped": reasons}

    def write(self, out: Path, found: dict[str, Any]) -> None:
        report = found | {"settings": vars(self.c)}
        contents = {
            "pairs.jsonl": b"".join(map(line_of, self.pairs)),
            "dropped.jsonl": b"".join(map(line_of, self.dropped)),
            "report.json": json.dumps(report, ensure_ascii=False, indent=1).encode(),
        }
        for name, content in contents.items():
            with whole(out / name) as file:
                file.write(content)


# ---------------------------------------------------------------- objective


def objective(c: Pairs, files: list[str], kept: Kept) -> dict[str, Any]:
    """How many questions there were, and which letters came of them."""
    found = [*preferences.exams_in(c.exam, c.fields, True)]
    found += preferences.exams_in(files, c.fields, False)
    chosen = set(by_lot(c, [place[:2] for place in found if not place[-1]], c.objective))
    letters, places = [], Counter()
    kept.read += len(found)
    for file, record, exam, group, why in found:
        if why:
            kept.drop(file, record, why, value=2, limit=1)
        elif (file, record) not in chosen:
            kept.drop(file, record, "not_drawn")
        else:
            n = len(exam.options)
            pair, both = preferences.objective(exam, places[n], c.seed)
            if kept.add(pair, file, record, group):
                places[n] += 1
                letters.append(both)
    return {"questions": len(found), "letters": preferences.letters_table(letters)}


def by_lot(c: Pairs, places: list[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    """`most` of them, 0 for all, in the order that they came in."""
    drawn = sorted(range(len(places)), key=lambda i: lottery(c.seed << 32 | i))
    return [places[i] for i in sorted(drawn[: most or None])]


# ---------------------------------------------------------------- subjective


def subjective(c: Pairs, files: list[str], kept: Kept, out: Path) -> dict[str, Any]:
    """What the judge said, on rank 0. Every rank calls it."""
    chats = chats_to_answer(c, files, kept)
    lines = answered(c, {name: chat for name, (chat, *_) in chats.items()}, out)
    if rank_from_env()[0] != 0:
        return {}
    read = {line["id"] for line in lines}
    for name, (_, file, record) in chats.items():
        if name not in read:
            kept.drop(file, record, "question_too_long")
    asked = []
    for line in lines:
        _, file, record = chats[line["id"]]
        if line["end"] == "length":
            kept.drop(file, record, "answer_cut_off", c.max_new, c.max_new)
        elif not line["answer"].strip() or line["answer"].strip() == line["reference"].strip():
            kept.drop(file, record, "same_or_empty_answer")
        else:
            said = judge.conversation(line["history"], line["question"])
            asked.append(line | {"question": said, "history": []})
    requests = judge.pairs(asked, judge.REFERENCE, "preference")
    endpoint = c.endpoint(c.judge, c.judge_model, out / "judge.jsonl")
    endpoint.ask_parsed([one.request for one in requests], judge.parse_verdict, c.retry_failed)
    judged = judge.judged(requests, c.judge_model, endpoint.cache.answers, judge.parse_verdict)
    said = judge.both_orders(judged)
    for line in asked:
        chat, file, record = chats[line["id"]]
        verdict = judge.verdict(*said[line["id"], line["round"]])
        if isinstance(verdict, str):
            kept.drop(file, record, verdict)
            continue
        sides = [line["answer"], line["reference"]][::verdict]
        prompt = Chat(chat.turns[:-1], chat.system)
        kept.add(preferences.pair_of(prompt, *sides, "subjective"), file, record, chat.group)
    return judge.pair_results(judged) if judged else {"n": 0}


def chats_to_answer(c: Pairs, files: list[str], kept: Kept) -> dict[str, tuple[Chat, str, int]]:
    """By their number: chats that end with an answer and are no option questions."""
    options = {place[:2] for place in preferences.exams_in(files, c.fields, False)}
    found = {}
    for file in files:
        for record, chat, _ in read_chats(file, c.fields):
            if (file, record) not in options:
                found.setdefault((file, record), chat)
    kept.read += len(found)
    for place, chat in [*found.items()]:
        roles = [role for role, _ in chat.turns]
        regular = roles == ["user", "assistant"] * (len(roles) // 2)
        why = chat.dropped.replace(" ", "_") or "no_template" * chat.raw
        if why or not regular:
            kept.drop(*place, why or "turns_do_not_alternate")
            del found[place]
    chosen = by_lot(c, [*found], c.subjective)
    drawn = {*chosen}
    for place in found:
        if place not in drawn:
            kept.drop(*place, "not_drawn")
    return {str(i): (found[place], *place) for i, place in enumerate(chosen)}


def answered(c: Pairs, chats: dict[str, Chat], out: Path) -> list[dict]:
    """The model's answer to the last question of each chat, if it can read that question."""
    device = pick_device(c.device)
    config, encoder = pretrained.describe(c.model, template_name=c.template)
    asked = [
        answers.Dialogue(name, list(zip(texts[::2], texts[1::2], strict=True)), chat.system)
        for name, chat in chats.items() if (texts := chat.texts())
        if answers.prompt_of(encoder, Chat(chat.turns[-2:-1]), config.max_seq_len)[0]
    ]  # fmt: skip
    if not asked:
        return []
    model = pretrained.load(c.model, device, stage.compute_dtype(c, device))
    about = {"questions": short_hash(repr(asked).encode()), "files": {}}
    answerer = answers.Answerer(model, encoder, c.max_new, c.batch_size, only_last=True)
    with alone_or_start(device) as world:
        return answerer.run(asked, out / "answers", about, world)


# ---------------------------------------------------------------- a run


def main() -> None:
    c = settings()
    out, files = Path(c.out), files_of(c.data, "selected.jsonl") if c.data else []
    kept = Kept(c)
    make_private(out)
    is_main = rank_from_env()[0] == 0
    found: dict[str, Any] = {"objective": objective(c, files, kept)} if is_main else {}
    if c.judge:
        found["subjective"] = subjective(c, files, kept, out)
    if not is_main:
        return
    found |= kept.counts()
    kept.write(out, found)
    print(json.dumps(found, ensure_ascii=False, indent=1))
    if (found.get("subjective", {}).get("longer_wins") or 0) > preferences.LONGER_WINS:
        print(
            f"WARNING: the longer answer wins {found['subjective']['longer_wins']:.0%} of what is "
            "decided: the judge may like length, and a model learns to write more"
        )
    if not c.judge:
        print("no subjective pairs: they need --model FOLDER and --judge http://HOST/v1")
    print(f"{len(kept.pairs):,} pairs in {out}/pairs.jsonl: train_dpo.py --data reads them")


if __name__ == "__main__":
    launch(main)
