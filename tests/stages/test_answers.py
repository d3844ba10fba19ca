"""What a run shows of its text: an example with its mask, and answers to held-out questions."""

import json
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np

from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.config import SFT
from nanomed.records import read_chats
from nanomed.run.log import RunFolder
from nanomed.stages import answers
from tests.conftest import ROOT


class Screen:
    def __init__(self):
        self.lines = []

    def print(self, text=""):
        self.lines.append(text)


def test_a_run_shows_one_example_with_its_mask(encoder, monkeypatch):
    """Each run prints one sample with its targets marked."""
    monkeypatch.chdir(ROOT)
    data = store.chats(["samples/sft.jsonl"], encoder, 512, 0.0)
    loader = Loader(SFT(), data, parts=(np.arange(5, 9), np.arange(3)))
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
    loader = Loader(SFT(), data, parts=(np.arange(5, 9), np.arange(3)))

    def parrot(model, prompts, stop, max_new):
        return [encoder.tokenizer.encode(f"回答{i}") for i in range(len(prompts))]

    monkeypatch.setattr(answers, "greedy_in_lockstep", parrot)
    run = Screen()
    run.path, run.world = tmp_path, SimpleNamespace(is_main=True)
    run.write_json = partial(RunFolder.write_json, run)
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=512))
    answers.show_answers(model, encoder, loader, run, "the model as it starts")
    answers.show_answers(model, encoder, loader, run)
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


def prompts_of(encoder, monkeypatch, folder, records: list[dict], longest: int) -> list[list[int]]:
    """What a model that reads `longest` tokens is asked of these records, all held out."""
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "chats.jsonl").write_text(lines, encoding="utf-8")
    data, asked = store.chats([str(folder / "chats.jsonl")], encoder, 400, 0.0), []

    def parrot(model, prompts, stop, max_new):
        asked.extend(prompts)
        return [[] for _ in prompts]

    monkeypatch.setattr(answers, "greedy_in_lockstep", parrot)
    run = Screen()
    run.path, run.world = folder, SimpleNamespace(is_main=True)
    run.write_json = partial(RunFolder.write_json, run)
    model = SimpleNamespace(config=SimpleNamespace(max_seq_len=longest))
    loader = Loader(SFT(), data, parts=(range(0), range(len(records))))
    answers.show_answers(model, encoder, loader, run)
    return asked


def test_a_chat_that_leaves_no_room_is_not_asked(encoder, monkeypatch, tmp_path):
    """Training drops the oldest turns of a long chat. Asked with all of them it would end the run
    after its training, and before its export."""
    turns = [{"role": role, "content": "头痛怎么办？" * 9} for role in ("user", "assistant") * 9]
    records = [{"messages": turns[:2]}, {"messages": turns}]
    for longest, n in ((400, 1), (10_000, 2), (20, 0)):
        assert len(prompts_of(encoder, monkeypatch, tmp_path, records, longest)) == n


def test_a_text_is_continued_as_it_was_trained(encoder, monkeypatch, tmp_path):
    """With no template around it."""
    records = [{"prompt": "天是", "completion": "蓝的"}]
    (prompt,) = prompts_of(encoder, monkeypatch, tmp_path, records, 400)
    assert prompt == encoder.tokenizer.encode("天是")
