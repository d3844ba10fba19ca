"""What train_sft.py counts on the sample world, with models whose knowledge is known."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanomed.model.decoder import Scores
from nanomed.records.exams import exam_of, render
from nanomed.stages import world
from tests.stages.test_samples import EXAM, QUESTIONS

SAMPLES = SimpleNamespace(data=SimpleNamespace(meta={"files": [str(world.EXAM)]}))  # a loader


class Run(SimpleNamespace):
    def print(self, text=""):
        self.lines.append(text)

    def write_json(self, name, value):
        self.files[name] = json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A. 眼科，不是。B. 骨科，是。选B。", "B"),
        ("B。骨科。", "B"),
        ("维生素A缺乏，选C。", "C"),
        ("Vitamin D: C.", "C"),
        ("骨科。", ""),
        ("", ""),
    ],
)
def test_the_letter_that_concludes_an_answer(answer, letter):
    assert world.letter_in(answer) == letter


class Favourite(torch.nn.Module):
    """Finds one kind of tokens likely, whatever is asked: a model that knows no fact."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, row):
        nll = torch.where(row.labels >= 0, (row.labels % 97).float(), 0.0)
        return Scores(nll, nll, nll > 0)


def results(encoder, monkeypatch, answer) -> tuple[dict, list[str]]:
    """Of a run whose greedy answer to a question is `answer(question)`."""
    prefix = encoder.tokenizer.decode(encoder.prompt(world.Chat([("user", "问题")]))).split("问题")

    def greedy(model, prompts, stop, max_new):
        texts = [encoder.tokenizer.decode(prompt) for prompt in prompts]
        asked = [text.removeprefix(prefix[0]).removesuffix(prefix[1]) for text in texts]
        return [encoder.tokenizer.encode(answer(question)) for question in asked]

    monkeypatch.setattr(world, "greedy_in_lockstep", greedy)
    run = Run(lines=[], files={})
    world.show_results(Favourite(), encoder, SAMPLES, run)
    return run.files["results.json"], run.lines


def test_who_knows_nothing_is_at_chance(encoder, monkeypatch):
    """Whatever text one prefers, it is right for one of the four facts that share the options."""
    counts, lines = results(encoder, monkeypatch, lambda question: "选B。")
    of = {"chats": 64, "documents": 48, "nowhere": 48}
    names = "option_", "documents_", "never_stated_"
    for name, (stated, n) in zip(names, of.items(), strict=True):
        letters = [r["answer"] for r in EXAM if (r["stated"], r["lang"]) == (stated, "zh")]
        assert counts[f"{name}letters"] == {"right": letters.count("B"), "of": n}
        assert counts[f"{name}texts"]["of"] == n + 16 * (stated == "chats")
    assert counts["held_out_answers"] == {"right": 0, "of": 80}
    told = [counts[f"{name}texts"]["right"] for name in names]
    assert abs(sum(told) - 44) < 14  # a quarter of 176
    assert sum("chance is 25%" in line for line in lines) == 6


def test_who_knows_what_chats_state(encoder, monkeypatch):
    known = {q["question"]: q["answer"] for q in QUESTIONS if q["stated"] == "chats"}
    exam = {render(exam_of(r)).turns[0][1]: r for r in EXAM if r["stated"] == "chats"}

    def answer(question):
        if question in exam:
            return f"A. 什么，不是。选{exam[question]['answer']}。"
        return f"答案是{known.get(question, '不知道')}。"

    counts, lines = results(encoder, monkeypatch, answer)
    assert counts["held_out_answers"] == {"right": 80, "of": 80}
    assert counts["option_letters"] == {"right": 64, "of": 64}
    assert counts["never_stated_answers"] == {"right": 0, "of": 48}
    assert counts["never_stated_letters"]["right"] < counts["never_stated_letters"]["of"] / 2
    assert any("80 of  80 = 100%" in line for line in lines)


def test_the_likeliest_sentence_is_found(encoder):
    """Of each of three questions, one of which has an option less. A model that finds the right
    sentences likely, and no other, picks their letters."""

    class Knows(Favourite):
        def __init__(self, wanted):
            super().__init__()
            self.wanted = wanted

        def forward(self, row):
            text = [
                encoder.tokenizer.decode(part.tolist())
                for part in row.tokens.split(row.cu_seqlens.diff().tolist())
            ]
            costs = torch.tensor([0.0 if any(w in t for w in self.wanted) else 1.0 for t in text])
            nll = costs.repeat_interleave(row.cu_seqlens.diff().long()) * (row.labels >= 0)
            return Scores(nll, nll, nll > 0)

    items = [item | {"sentence": "{}。"} for item in EXAM[:96:32]]
    items[1]["options"] = {letter: items[1]["options"][letter] for letter in "ABC"}
    assert len({text for item in items for text in item["options"].values()}) == 11
    for letters in ("ABC", "CAD", "DCA", "BBB"):
        texts = [item["options"][letter] for item, letter in zip(items, letters, strict=True)]
        wanted = [f"assistant\n{text}。" for text in texts]
        assert world._likeliest(Knows(wanted), encoder, items) == list(letters)
        right = [item["answer"] == letter for item, letter in zip(items, letters, strict=True)]
        assert world.right_texts(Knows(wanted), encoder, items) == right
