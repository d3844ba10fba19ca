"""Complexity and quality of a chat, as Deita scores them (Liu et al. 2023, arXiv 2312.15685).

A model is asked for a digit from 1 to 6: how complex is the question, how good is the answer. The
score is not the digit that it would write but the expected one: the sum of 1 to 6, each times its
probability among the six. Each round of a chat (what the user says and what is answered) is scored
by itself; the chat's score is the mean over its rounds of complexity times quality (Aquila-Med), or
their sum (Deita).

The prompts are data (prompts.toml). They may be asked of any model in a folder, which gives the
digits' logits, or of an endpoint, whose digit is taken as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanomed.build.labeller import Request, quoted
from nanomed.build.labels import prompts
from nanomed.config import InputError
from nanomed.model.scoring import Encoded
from nanomed.records import Chat
from nanomed.records.shapes import language
from nanomed.text.template import Encoder

DIGITS = "123456"
ASKED = ("complexity", "answer_quality")
SHORTER = 0.9  # of the longer text is left, each time a prompt does not fit


def expectation(logits: Tensor) -> Tensor:
    """[n,6], of the six digits, as logits or log-probabilities -> [n] float32 between 1 and 6."""
    values = torch.arange(1, 7, dtype=torch.float32, device=logits.device)
    return (logits.float().softmax(-1) * values).sum(-1)


def rounds(turns: Sequence[tuple[str, Any]]) -> list[range]:
    """Of turns that begin with their roles, those of a chat as the paper counts them: what the user
    says and what is answered."""
    starts = [
        i
        for i, (role, _) in enumerate(turns)
        if role == "user" and (i == 0 or turns[i - 1][0] == "assistant")
    ]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(turns)], strict=True)]


def exchanges(chat: Chat) -> list[tuple[str, str]]:
    """(question, answer) of each round."""
    said = lambda part, who: "\n".join(  # noqa: E731
        chat.turns[i][1] for i in part if chat.turns[i][0] == who
    )
    return [(said(part, "user"), said(part, "assistant")) for part in rounds(chat.turns)]


def score_of(scored: Sequence[tuple[float, float]], how: str = "mean") -> float:
    """scored: (complexity, quality) of each round; how: `mean` or `sum` of their products."""
    products = [complexity * quality for complexity, quality in scored]
    return sum(products) / (len(products) if how == "mean" else 1)


def chat_asked(
    kind: str, question: str, answer: str, mark: Callable[[str], str] = str
) -> tuple[str, Chat]:
    """(language, the chat that ends with the prompt)."""
    lang = "zh" if language(question) == "zh" else "en"
    words = prompts()[kind][lang]
    text = words["user"].format(question=mark(question), answer=mark(answer))
    return lang, Chat([("user", text)], words["system"])


def request_of(kind: str, question: str, answer: str) -> Request:
    """What an endpoint is asked: the same, with texts between marks that they cannot know."""
    _, chat = chat_asked(kind, question, answer, quoted)
    messages = [{"role": "system", "content": chat.system}]
    messages.append({"role": "user", "content": chat.turns[0][1]})
    return Request(messages, prompts()[kind]["max_tokens"])


def parse_digit(text: str) -> float | None:
    """The answer's one digit; never a default."""
    return float(text.strip()) if text.strip() in [*DIGITS] else None


@dataclass
class Asker:
    """Prompts as token ids that end where the digit comes next."""

    encoder: Encoder
    longest: int  # tokens that the model reads
    shortened: int = 0  # prompts whose texts had to be cut at their end
    digits: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.digits = digit_ids(self.encoder)

    def encode(self, kind: str, question: str, answer: str) -> tuple[str, Encoded]:
        """(which prompt it is, its six continuations)"""
        texts, cut = [question, answer], False
        while True:
            lang, chat = chat_asked(kind, *texts)
            ids = tuple(self.encoder.prompt(chat))
            if len(ids) < self.longest:
                break
            longer = max((0, 1), key=lambda i: len(texts[i]) * (i <= ASKED.index(kind)))
            if len(texts[longer]) < 10:
                raise InputError(f"a model that reads {self.longest} tokens has no room to score")
            texts[longer], cut = texts[longer][: int(SHORTER * len(texts[longer]))], True
        self.shortened += cut
        reads = [[(0, len(ids) - 1, digit)] for digit in self.digits]
        return f"{kind}.{lang}", Encoded([ids], reads, 0)


def digit_ids(encoder: Encoder) -> list[int]:
    """The token of each digit as it stands at the beginning of an answer. Raises InputError unless
    it is one token, and another one for each."""
    found = []
    for digit in DIGITS:
        whole, trained, _ = encoder.chat(Chat([("user", "?"), ("assistant", digit)]), 1 << 20)
        prompt = encoder.prompt(Chat([("user", "?")]))
        ids = [i for i, learned in zip(whole, trained, strict=True) if learned]
        ids = ids[: ids.index(encoder.turn_end)]
        if len(ids) != 1 or whole[: len(prompt) + 1] != [*prompt, *ids]:
            raise InputError(
                f"the digit {digit} is not one token of {encoder.tokenizer.path}: {ids}; such a "
                "model cannot score chats"
            )
        found += ids
    if len(set(found)) < len(DIGITS):
        raise InputError(f"{encoder.tokenizer.path} has one token for several digits: {found}")
    return found
