"""Chats to token ids, and which of them are trained on. The only place that knows special tokens.

A template is data: what stands before and after each role's text. Ids are built turn by turn, and
since only a template's own pieces are searched for special tokens, what a user types stays text.
What stands between two special tokens of a turn is tokenised as one text, because that is what a
program does that renders a chat first and then tokenises it. So a line break of the template and
one of the message may become one token.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from nanomed.config import InputError, nearest
from nanomed.records import Chat, PreferencePair, Turns
from nanomed.text.tokenizer import Tokenizer
from nanomed.text.tokenizer_files import SYSTEM

Encoded = tuple[list[int], list[bool]]  # ids of a turn or a segment, and which are trained on


@dataclass(frozen=True)
class Template:
    name: str
    special: tuple[str, ...]  # the special tokens that stand in the strings below
    system: str  # the system text of a chat that brings none; "" for no system turn
    before: dict[str, str]  # role -> what stands before its text
    after: dict[str, str]  # role -> what stands after it
    turn_end: str  # ends an assistant's turn; trained on, and generation stops at it
    document_end: str  # ends a document; generation stops at it too

    def missing(self, tokenizer: Tokenizer) -> list[str]:
        """The special tokens that it needs and the tokenizer does not have."""
        used = (*self.special, self.turn_end, self.document_end)
        return [name for name in used if name not in tokenizer.special]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2)


# As AquilaMed was trained and is served (its model card).
CHATML = Template(
    name="chatml",
    special=("<|im_start|>", "<|im_end|>"),
    system=SYSTEM,
    before={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
    after=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>\n"),
    turn_end="<|im_end|>",
    document_end="<|endoftext|>",
)
# As AquilaChat2-7B is served (FlagAI, flagai/model/aquila2/conversation.py): no begin token, no
# line breaks, the system text as plain words in front. FlagScale's Aquila ends a document so too.
AQUILA_V1 = Template(
    name="aquila-v1",
    special=("<|startofpiece|>", "<|endofpiece|>", "</s>"),
    system="",
    before={"system": "", "user": "<|startofpiece|>", "assistant": "<|endofpiece|>"},
    after={"system": "", "user": "", "assistant": "</s>"},
    turn_end="</s>",
    document_end="</s>",
)
TEMPLATES = {t.name: t for t in (CHATML, AQUILA_V1)}


def load(name: str) -> Template:
    """A template by name, or from the JSON file that a run or an export keeps."""
    if not name.endswith(".json"):
        if name not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise InputError(f"--template {name!r}: known are {known}{nearest(name, TEMPLATES)}")
        return TEMPLATES[name]
    try:
        with open(name, encoding="utf-8") as file:
            template = Template(**json.load(file))
        _check(template)
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"--template {name}: {error}") from None
    return dataclasses.replace(template, special=tuple(template.special))


def _check(template: Template) -> None:
    """Raises ValueError naming a field that no template can have."""
    for name, good in json.loads(CHATML.to_json()).items():
        value = getattr(template, name)
        parts = value.values() if isinstance(value, dict) else value
        same = type(value) is type(good) and all(isinstance(part, str) for part in parts)
        if not same or (isinstance(good, dict) and value.keys() != good.keys()):
            raise ValueError(f"{name} is {value!r}; chatml's is {good!r}")
    answer_ends = template.after["assistant"]
    if template.turn_end not in template.special or template.turn_end not in answer_ends:
        raise ValueError(
            f"turn_end {template.turn_end!r} must stand in special and in the "
            f"assistant's after, {answer_ends!r}"
        )


def fitting(tokenizer: Tokenizer) -> Template:
    """The first of TEMPLATES whose special tokens the tokenizer has: which template a folder that
    names none was made for. Raises InputError if there is none."""
    for template in TEMPLATES.values():
        if not template.missing(tokenizer):
            return template
    raise InputError(
        f"no template for {tokenizer.path}: its special tokens are {_few(tokenizer.special)}, and "
        + "; ".join(f"{t.name} needs {', '.join(t.special)}" for t in TEMPLATES.values())
        + "; give --template a JSON file (docs/aquilamed.md shows one)"
    )


def _few(names, n: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class Encoder:
    """A template with a tokenizer: chat -> (ids, trained)."""

    def __init__(self, template: Template, tokenizer: Tokenizer):
        self.template, self.tokenizer = template, tokenizer
        if missing := template.missing(tokenizer):
            raise InputError(
                f"template {template.name!r} needs the special tokens {', '.join(missing)}, which "
                f"{tokenizer.path} does not have; it has {_few(tokenizer.special)}"
            )
        self._names = {*template.special, template.turn_end, template.document_end}
        self.turn_end = tokenizer.special[template.turn_end]
        self.document_end = tokenizer.special[template.document_end]
        before = {role: self._cut(text) for role, text in template.before.items()}
        after = {role: self._cut(text) for role, text in template.after.items()}
        # Ids up to the last special token, the text after it and its ids; the text before the first
        # special token, ids from there on.
        self._before = {
            role: (self._ids(parts[:-1]), parts[-1], tokenizer.encode(parts[-1]))
            for role, parts in before.items()
        }
        self._after = {role: (parts[0], self._ids(parts[1:])) for role, parts in after.items()}

    def chat(self, chat: Chat, max_tokens: int) -> tuple[list[int], list[bool], int]:
        """(ids, trained, turns dropped): the whole chat, or without its oldest turns, as many as
        it takes to fit max_tokens. Empty if even its last question and answer do not fit."""
        system = self._system(chat)
        turns = [self._turn(role, text, raw=chat.raw) for role, text in chat.turns]
        for i in chat.untrained:
            turns[i] = turns[i][0], [False] * len(turns[i][1])
        first = self._first_kept(chat.turns, turns, max_tokens - len(system[0]))
        if first == len(turns):
            return [], [], first
        ids, trained = zip(system, *turns[first:], strict=True)
        return [*chain(*ids)], [*chain(*trained)], first

    def pair(self, pair: PreferencePair, max_tokens: int) -> tuple[list[Encoded], int]:
        """([chosen, rejected], turns dropped): the prompt, then one of its answers, of which alone
        is trained on. Prompt and answers are tokenised apart, and the prompt is the same in both:
        it loses its oldest whole turns until the longer answer fits max_tokens. No segment if even
        its last question leaves no room."""
        system = self._system(pair)[0]
        turns = [self._turn(role, text, raw=pair.raw) for role, text in pair.turns]
        answers = [
            self._turn("assistant", text, apart=True, raw=pair.raw)
            for text in (pair.chosen, pair.rejected)
        ]
        longest = max(len(ids) for ids, _ in answers)
        first = self._first_kept(pair.turns, turns, max_tokens - len(system) - longest)
        if first == len(turns):
            return [], first
        prompt = [*chain(system, *(ids for ids, _ in turns[first:]))]
        untrained = [False] * len(prompt)
        return [(prompt + ids, untrained + trained) for ids, trained in answers], first

    def notes(self, texts: Iterable[str], system: str = "") -> list[str]:
        """For the report: each of the template's special tokens that a text spells, which stays
        text; and a system text that stands in place of the template's own."""
        found = {name for text in texts for name in self._names if name in text}
        notes = [f"text spells {name}, kept as text" for name in sorted(found)]
        if system and self.template.system:
            notes.append("own system text in place of the template's")
        return notes

    @staticmethod
    def _first_kept(texts: Turns, turns: list[Encoded], room: int) -> int:
        """The first user's turn from which on the rest fits; the number of turns if none is."""
        lengths = [len(ids) for ids, _ in turns]
        asked = (i for i, (role, _) in enumerate(texts) if role == "user")
        return next((i for i in asked if sum(lengths[i:]) <= room), len(turns))

    def prompt(self, chat: Chat) -> list[int]:
        """The ids up to where the assistant's next answer starts; chat.turns ends with a user."""
        turns = [self._turn(role, text, raw=chat.raw)[0] for role, text in chat.turns]
        head, _, opening = ([], "", []) if chat.raw else self._before["assistant"]
        return [*chain(self._system(chat)[0], *turns, head, opening)]

    def borders(self, chat: Chat, first: int) -> list[tuple[str, int]]:
        """(role, tokens) of each turn that chat() renders when it drops the first `first` ones."""
        names = {"user": "text", "assistant": "continuation"} if chat.raw else {}
        turns = [
            (names.get(role, role), len(self._turn(role, text, raw=chat.raw)[0]))
            for role, text in chat.turns[first:]
        ]
        system = len(self._system(chat)[0])
        return [("system", system), *turns] if system else turns

    def _system(self, chat: Chat) -> Encoded:
        text = "" if chat.raw else chat.system or self.template.system
        return self._turn("system", text) if text else ([], [])

    def _turn(self, role: str, text: str, apart: bool = False, raw: bool = False) -> Encoded:
        """An assistant's text and its end token are trained on, nothing else is; a token that holds
        the text's beginning and something before it belongs to the text. `apart`: the text is
        tokenised by itself, so there is no such token. `raw`: no template around it, and the
        document's end after an answer."""
        if raw:
            is_answer = role == "assistant"
            ids = self.tokenizer.encode(text) + [self.document_end] * is_answer
            return ids, [is_answer] * len(ids)
        (head, tail, opening), (lead, rest) = self._before[role], self._after[role]
        encode = self.tokenizer.encode
        body = opening + encode(text + lead) if apart else encode(tail + text + lead)
        ids = head + body + rest
        if role != "assistant":
            return ids, [False] * len(ids)
        pairs = enumerate(zip(opening, body, strict=False))
        start = len(head) + next((i for i, (a, b) in pairs if a != b), min(len(opening), len(body)))
        end = len(head) + len(body) + rest.index(self.turn_end) + 1
        return ids, [start <= i < end for i in range(len(ids))]

    def _cut(self, text: str) -> list[str]:
        """Text, special token, text, ..., text."""
        return re.split(f"({'|'.join(map(re.escape, self.template.special))})", text)

    def _ids(self, parts: list[str]) -> list[int]:
        """The only place where text becomes special tokens: the template's own strings."""
        special = {name: self.tokenizer.special[name] for name in self.template.special}
        return [
            i
            for part in parts
            for i in ([special[part]] if part in special else self.tokenizer.encode(part))
        ]
