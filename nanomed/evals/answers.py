"""Answers in words: dialogues from files, and a model's greedy answer to each of their turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from nanomed.build.files import read_lines
from nanomed.config import InputError
from nanomed.distributed import World, from_all, from_main
from nanomed.evals.folder import going_on, identity, open_folder, settings_of
from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, generate
from nanomed.model.packed import pack_linears
from nanomed.records import BadField, Chat, chats_of, read_json
from nanomed.records.shapes import text_of
from nanomed.text.template import Encoder


@dataclass(frozen=True)
class Dialogue:
    id: str
    turns: list[tuple[str, str]]  # (question, reference answer), in order
    system: str = ""  # "" takes the template's own


# Where a set's file stands under --data: its published names.
SETS = {
    "huatuo": "**/*[Hh]uatuo*.json*",
    "cmtmedqa": "**/*[Cc][Mm]t[Mm]ed[Qq][Aa]*.json*",
    "cmb-clin": "**/CMB-*qa.json*",
}


def file_of(name: str, data: Path) -> Path:
    """Raises InputError unless the set has one file under --data, which may be that file itself."""
    files = [data] if data.is_file() else sorted(data.glob(SETS[name]))
    if len(files) != 1:
        found = ", ".join(map(str, files)) or "nothing"
        raise InputError(
            f"--set {name}: one file {SETS[name]} is wanted in {data}, found {found}; --data may "
            "name the file"
        )
    return files[0]


def dialogues(path: Path) -> tuple[list[Dialogue], int]:
    """The chats of a file of any format that training reads, or CMB-Clin's cases; and how many
    records were set aside: CMtMedQA's safety questions are no dialogues. A record of several chats
    makes as many dialogues. Raises InputError for a turn without its question or its reference
    answer."""
    found, aside = [], 0
    for number, record, _ in read_json(str(path)):
        if isinstance(record, dict) and "instruct" in record:
            aside += 1
            continue
        try:
            is_case = isinstance(record, dict) and "QA_pairs" in record
            chats = [(_case(record), "")] if is_case else map(_talk, chats_of(record))
            for i, (turns, system) in enumerate(chats):
                if not turns or not all(q.strip() and a.strip() for q, a in turns):
                    raise BadField("(record)", "a turn lacks its question or its reference answer")
                name = f"{number - 1}.{i}" if i else str(number - 1)
                found.append(Dialogue(name, turns, system))
        except BadField as bad:
            raise InputError(f"{path}, record {number}: {bad}") from None
    if not found:
        raise InputError(f"{path} holds no dialogue, only {aside} records that are none")
    return found, aside


def _talk(chat: Chat) -> tuple[list[tuple[str, str]], str]:
    """Its turns and its system text."""
    roles = [role for role, _ in chat.turns]
    if chat.raw:
        raise BadField("prompt", "a text that goes on without a template is no dialogue")
    if chat.dropped or roles != ["user", "assistant"] * (len(roles) // 2):
        raise BadField("(record)", chat.dropped or "questions and answers do not take turns")
    texts = chat.texts()
    return list(zip(texts[::2], texts[1::2], strict=True)), chat.system


def _case(record: dict) -> list[tuple[str, str]]:
    """CMB-Clin: the case stands before the first question. Answers are `solution` in later
    releases, `answer` in the first."""
    turns = [
        (
            text_of(pair.get("question"), "question"),
            text_of(pair.get("solution", pair.get("answer")), "solution"),
        )
        for pair in record["QA_pairs"]
    ]
    case = f"以下是一位病人的病例：\n{text_of(record.get('description'), 'description')}\n"
    return [
        (case + question if i == 0 else question, answer)
        for i, (question, answer) in enumerate(turns)
    ]


def read(folder: Path) -> list[dict]:
    """The answers in a folder. Raises InputError if it has none, or not all of them yet."""
    path = folder / "answers.jsonl"
    if not path.exists():
        raise InputError(f"{folder} holds no answers: `evaluate.py answer` writes answers.jsonl")
    lines = read_lines(path)
    n = settings_of(folder).get("answers", len(lines))
    if len(lines) < n:
        raise InputError(
            f"{folder} holds {len(lines)} of {n} answers: `evaluate.py answer` was stopped, and "
            "the same command goes on"
        )
    return lines


def set_of(folder: Path) -> str:
    """Which of SETS was answered there; "" if it is not known."""
    found = settings_of(folder).get("set")
    return found if found in SETS else ""


Turn = tuple[Dialogue, int]  # a dialogue and the number of one of its turns


@dataclass
class Answerer:
    """A model that answers greedily. With `own_history` what it sees of earlier turns is its own
    answers, else the references. `only_last`: only each dialogue's last turn."""

    model: Aquila
    encoder: Encoder
    max_new: int
    batch_size: int
    own_history: bool = False
    only_last: bool = False

    def run(
        self, asked: Sequence[Dialogue], out: Path, about: dict[str, Any], world: World
    ) -> list[dict]:
        """Every turn's answer, in OUT/answers.jsonl too: round by round, each in batches of about
        the same length, batch b by rank b % size. It goes on where an earlier call was stopped;
        `about` is what the answers depend on besides the model and the settings here. Every rank
        calls it; rank 0 gets the answers."""
        path, self.known = out / "answers.jsonl", {}  # answers by dialogue and round
        batches = self._batches(asked)
        ends = list(accumulate(map(len, batches)))
        if world.is_main:
            settings = {"max_new": self.max_new, "batch_size": self.batch_size, "answers": ends[-1]}
            by = identity(self.model, self.encoder.tokenizer, self.encoder.template)
            open_folder(out, settings | by | about)
        pack_linears(self.model)
        with going_on(path, ends, "answer", world.is_main) as (done, write):
            self._keep(from_main(read_lines(path) if world.is_main else None))
            while done < len(batches):
                # At once only batches of one round: the next may need this one's answers.
                together = [
                    b for b in batches[done : done + world.size] if b[0][1] == batches[done][0][1]
                ]
                mine = together[world.rank] if world.rank < len(together) else None
                for part in filter(None, from_all(self._answered(mine) if mine else None)):
                    self._keep(part)
                    write(part)
                done += len(together)
        return list(self.known.values()) if world.is_main else []

    def _keep(self, lines) -> None:
        self.known |= {(line["id"], line["round"]): line for line in lines}

    def _batches(self, asked: Sequence[Dialogue]) -> list[list[Turn]]:
        batches = []
        for i in range(max(len(d.turns) for d in asked)):
            turns = [(d, i) for d in asked if len(d.turns) > i]
            if self.only_last:
                turns = [(d, i) for d, i in turns if len(d.turns) == i + 1]
            turns.sort(key=lambda turn: sum(len(q) + len(a) for q, a in turn[0].turns[: i + 1]))
            size = self.batch_size
            batches += [turns[j : j + size] for j in range(0, len(turns), size)]
        return batches

    def _answered(self, batch: list[Turn]) -> list[dict]:
        lines, prompts = [], []
        for dialogue, i in batch:
            history = list(dialogue.turns[:i])
            if self.own_history:
                history = [
                    (q, self.known[dialogue.id, j + 1]["answer"])
                    for j, (q, _) in enumerate(history)
                ]
            question, reference = dialogue.turns[i]
            turns = [t for q, a in history for t in (("user", q), ("assistant", a))]
            longest = self.model.config.max_seq_len
            chat = Chat([*turns, ("user", question)], dialogue.system)
            ids, n_left_out = prompt_of(self.encoder, chat, longest)
            if not ids:
                raise InputError(
                    f"dialogue {dialogue.id}: a question leaves no room for an answer, the model "
                    f"reads {longest} tokens; take it out of the file"
                )
            prompts.append(ids)
            dropped = n_left_out // 2
            named = {
                "id": dialogue.id,
                "round": i + 1,
                "history": history[dropped:],
                "question": question,
            }
            lines.append(named | {"reference": reference, "dropped_turns": dropped})
        stop = {self.encoder.turn_end, self.encoder.document_end}
        texts = generate(self.model, prompts, stop, Sampling(max_new=self.max_new))
        decode = self.encoder.tokenizer.decode
        return [
            line | {"answer": decode(ids), "end": end}
            for line, (ids, end) in zip(lines, texts, strict=True)
        ]


def prompt_of(encoder: Encoder, chat: Chat, longest: int) -> tuple[list[int], int]:
    """Of a chat that ends with a question: (fewer than `longest` ids, how many of the oldest turns
    are left out for that); no ids if not even the question fits."""
    for start, (role, _) in enumerate(chat.turns):
        if role == "user":
            ids = encoder.prompt(Chat(chat.turns[start:], chat.system))
            if len(ids) < longest:
                return ids, start
    return [], 0
