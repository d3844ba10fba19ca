"""What a run on the sample world has learned: its questions and its exam, counted."""

import math
import re

import torch

from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import ROOT
from nanomed.distributed import from_main
from nanomed.model.decoder import Aquila
from nanomed.model.generation import greedy_in_lockstep
from nanomed.records import Chat, read_json
from nanomed.records.exams import exam_of, render
from nanomed.run.log import RunFolder
from nanomed.run.progress import progress
from nanomed.stages.answers import on_samples
from nanomed.text.template import Encoder
from nanomed.training.losses import segment_logps

QUESTIONS, EXAM = ROOT / "samples/questions.jsonl", ROOT / "samples/exam.jsonl"
# Where its facts are stated -> what the counts are called in results.json and on the screen.
STATED = {
    "chats": ("", "stated in chats"),
    "documents": ("documents_", "stated in documents alone"),
    "nowhere": ("never_stated_", "stated nowhere"),
}
# What is counted: how the screen names it, and who knows nothing is right in this share.
COUNTED = {
    "answers": ("the answer has it", 0.0),
    "texts": ("the likeliest option has it", 0.25),
    "letters": ("the answer's letter", 0.25),
}
AT_ONCE, LONGEST = 32, 48  # questions in one batch, tokens of an answer


def show_results(model: Aquila, encoder: Encoder, loader: Loader, run: RunFolder) -> None:
    """After training on the samples: prints what is right of the questions and of the exam, beside
    chance, and writes it to results.json. Every rank calls it."""
    if not on_samples(loader):
        return
    results = counted(model, encoder)
    run.print("asked in words in which training does not ask (greedy answers):")
    for line in table(results):
        run.print(line)
    run.print()
    run.write_json("results.json", results)


def counted(model: Aquila, encoder: Encoder) -> dict[str, dict[str, int]]:
    """Name -> {"right", "of"}. Every rank calls it."""
    questions, items = ([record for _, record, _ in read_json(str(f))] for f in (QUESTIONS, EXAM))
    found = {
        "answers": (right_answers(model, encoder, questions), questions),
        "texts": (right_texts(model, encoder, items), items),
        "letters": (right_letters(model, encoder, items), items),
    }
    return {
        name_of(stated, what): _count(right, records, stated, what)
        for stated in STATED
        for what, (right, records) in found.items()
    }


def name_of(stated: str, what: str) -> str:
    """held_out_answers, option_letters, never_stated_letters, ..."""
    return (STATED[stated][0] or ("held_out_" if what == "answers" else "option_")) + what


def _count(right: list[bool], records: list[dict], stated: str, what: str) -> dict[str, int]:
    languages = ["zh"] if what == "letters" else ["zh", "en"]  # options are taught in Chinese
    counted = [r for r, record in zip(right, records, strict=True)
               if record["stated"] == stated and record["lang"] in languages]  # fmt: skip
    return {"right": sum(counted), "of": len(counted)}


def table(results: dict[str, dict[str, int]]) -> list[str]:
    lines = []
    for stated, (_, words) in STATED.items():
        lines.append(f"  facts {words}")
        for what, (does, chance) in COUNTED.items():
            lines.append(f"    {does:<30}{share(**results[name_of(stated, what)], chance=chance)}")
    return lines


def share(right: int, of: int, chance: float) -> str:
    error = math.sqrt(chance * (1 - chance) / of)
    beside = f"   chance is {chance:.0%}, give or take {error:.0%}" if chance else ""
    return f"{right:>4} of {of:>3} = {right / of:>4.0%}{beside}"


def right_answers(model: Aquila, encoder: Encoder, questions: list[dict]) -> list[bool]:
    """Whether each greedy answer holds the fact's value."""
    answers = answers_to(model, encoder, [q["question"] for q in questions])
    return [q["answer"].lower() in text.lower() for q, text in zip(questions, answers, strict=True)]


def right_letters(model: Aquila, encoder: Encoder, items: list[dict]) -> list[bool]:
    """Whether each greedy answer ends with the right letter."""
    asked = [render(exam_of(item)).turns[0][1] for item in items]
    answers = answers_to(model, encoder, asked)
    return [item["answer"] == letter_in(text) for item, text in zip(items, answers, strict=True)]


def letter_in(answer: str) -> str:
    """The last letter A to D that stands alone: it concludes the answer; "" if there is none."""
    return next(reversed(re.findall(r"(?<![A-Za-z])[A-D](?![A-Za-z])", answer)), "")


def answers_to(model: Aquila, encoder: Encoder, questions: list[str]) -> list[str]:
    """The most likely ones."""
    stop = {encoder.turn_end, encoder.document_end}
    prompts = [encoder.prompt(Chat([("user", question)])) for question in questions]
    answers: list[list[int]] = []
    with progress(len(prompts), "question", "answers") as bar:
        for start in range(0, len(prompts), AT_ONCE):
            batch = prompts[start : start + AT_ONCE]
            answers += greedy_in_lockstep(model, batch, stop, LONGEST)
            bar.update(len(batch))
    return [encoder.tokenizer.decode(ids) for ids in answers]


@torch.no_grad()
def right_texts(model: Aquila, encoder: Encoder, items: list[dict]) -> list[bool]:
    """Whether, of the sentences with each option's text, the right one is the likeliest answer to
    the question without its options."""
    model.eval()
    found = []
    for start in range(0, len(items), AT_ONCE):
        found += _likeliest(model, encoder, items[start : start + AT_ONCE])
    # Every rank computes; a tie may fall the other way on another device, so rank 0 decides.
    return from_main([item["answer"] == letter for item, letter in zip(items, found, strict=True)])


def _likeliest(model: Aquila, encoder: Encoder, items: list[dict]) -> list[str]:
    """The letter of each item's likeliest sentence; all sentences go through the model at once."""
    segments, trained = [], []
    for item in items:
        prompt = encoder.prompt(Chat([("user", item["question"])]))
        for text in item["options"].values():
            answer = encoder.tokenizer.encode(item["sentence"].format(text))
            segments.append(prompt + answer)
            trained.append([False] * len(prompt) + [True] * len(answer))
    row = row_from(segments, trained).to(next(model.parameters()).device)
    letters = [list(item["options"]) for item in items]
    logps = segment_logps(model(row).nll, row).split([*map(len, letters)])
    return [of[int(part.argmax())] for of, part in zip(letters, logps, strict=True)]
