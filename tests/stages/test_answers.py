import json
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from nanomed import store
from nanomed.batches.loader import Loader, split
from nanomed.config import SFT
from nanomed.records import Chat, read_chats
from nanomed.run.log import RunFolder
from nanomed.stages import answers, exam
from tests.conftest import ROOT

QUESTION = "下列哪项正确？\nA. 甲\nB. 乙\nC. 丙\nD. 丁"


@pytest.mark.parametrize(
    "question, answer, letter",
    [
        (QUESTION, "B。乙。", "B"),
        (QUESTION, "D", "D"),
        (QUESTION, "C. 丙", "C"),
        (QUESTION, "A fever is common", None),  # an article, not a letter
        (QUESTION, "乙", None),
        ("头痛怎么办？", "B。", None),
    ],
)
def test_what_is_an_exam_question(question, answer, letter):
    item = exam.as_item(Chat([("user", question), ("assistant", answer)]))
    assert (item.letter if item else None) == letter
    if item:
        assert item.n_options == 4 and item.chat.turns == [("user", question)]


class Screen:
    def __init__(self):
        self.lines = []

    def print(self, text=""):
        self.lines.append(text)


def test_shares_stand_beside_chance(encoder, monkeypatch, tmp_path):
    """Of held-out option questions: whoever always says B is right where B is."""
    letters = "BBCABDACBD"
    records = [{"messages": [{"role": "user", "content": f"{i}: {QUESTION}"},
                             {"role": "assistant", "content": f"{letter}。"}]}
               for i, letter in enumerate(letters)]  # fmt: skip
    lines = [json.dumps(record) for record in records]
    (tmp_path / "exam.jsonl").write_text("\n".join(lines))
    data = store.chats([str(tmp_path / "exam.jsonl")], encoder, 512, 0.0)
    loader = Loader(SFT(), data, *split(data, 0.6))

    def always_b(model, prompts, stop, max_new):
        assert max_new == 1 and all("assistant\n" in encoder.tokenizer.decode(p) for p in prompts)
        return [encoder.tokenizer.encode("B") for _ in prompts]

    monkeypatch.setattr(answers, "greedy_in_lockstep", always_b)
    screen = Screen()
    exam.show_exam(None, encoder, loader, screen)
    held_out = [letters[data.where(int(i))[1] - 1] for i in loader.val]
    assert f"  {held_out.count('B')} of {len(held_out)} = " in screen.lines[1]
    assert "chance is 25%" in screen.lines[1]


def test_a_run_shows_one_example_with_its_mask(encoder, monkeypatch):
    """Each run prints one sample with its targets marked."""
    monkeypatch.chdir(ROOT)
    data = store.chats(["samples/sft.jsonl"], encoder, 512, 0.0)
    loader = Loader(SFT(), data, np.arange(5, 9), np.arange(3))
    screen = Screen()
    answers.show_example(encoder, loader, screen)
    ((_, chat, _),) = islice(read_chats("samples/sft.jsonl"), 5, 6)
    text = "\n".join(screen.lines)
    for role, said in chat.turns:
        assert (f"⟦{said}<|im_end|>⟧" in text) == (role == "assistant")
        assert said.splitlines()[0] in text
    assert text.count("⟦") == 1 + sum(role == "assistant" for role, _ in chat.turns)


def test_answers_are_kept_for_the_report(encoder, monkeypatch, tmp_path):
    """Beside those of another model, word for word."""
    monkeypatch.chdir(ROOT)
    data = store.chats(["samples/sft.jsonl"], encoder, 512, 0.0)
    loader = Loader(SFT(), data, np.arange(5, 9), np.arange(3))

    def parrot(model, prompts, stop, max_new):
        return [encoder.tokenizer.encode(f"回答{i}") for i in range(len(prompts))]

    monkeypatch.setattr(answers, "greedy_in_lockstep", parrot)
    run = Screen()
    run.path, run.world = tmp_path, SimpleNamespace(is_main=True)
    run.write_json = partial(RunFolder.write_json, run)
    answers.show_answers(None, encoder, loader, run, "the model as it starts")
    answers.show_answers(None, encoder, loader, run)
    lines = "\n".join(run.lines).splitlines()
    options = [line for line in lines if line.lstrip().startswith(("A. ", "B. ", "C. ", "D. "))]
    assert options and all(line.startswith(" " * 13) for line in options)
    kept = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert list(kept) == ["the model as it starts", "the best checkpoint"]
    chats = [chat for chat, _ in answers.pick_questions(loader)]
    for i, (one, chat) in enumerate(zip(kept["the best checkpoint"], chats, strict=True)):
        assert one["answer"] == f"回答{i}" and f"  answer     回答{i}" in run.lines
        turns = [*one["history"], ["user", one["question"]], ["assistant", one["reference"]]]
        assert [*map(tuple, turns)] == chat.turns
