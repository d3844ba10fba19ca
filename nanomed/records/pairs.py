"""Records of the preference formats, each turned into a PreferencePair."""

from collections.abc import Iterator
from typing import Any

from nanomed.records.chats import ADDRESS, ADDRESS_NOTE, drop_leading_answers
from nanomed.records.fields import filled, given
from nanomed.records.shapes import (
    BadField,
    Chat,
    PreferencePair,
    Turns,
    blank,
    excerpt,
    group_of,
    json_of,
    label_of,
    source_of,
    text_of,
    words_of,
)
from nanomed.records.turns import (
    QUESTION,
    add_system,
    add_turns,
    as_turns,
    main_question,
    opening,
    user_text,
)

PROMPTS = ("messages", *QUESTION)
NO_PROMPT = (
    "none is given, and two texts do not say where a shared prompt ends; give `prompt`, or "
    "`chosen` and `rejected` as lists of turns"
)


def chosen_rejected(record: dict, chosen: str = "chosen") -> list[PreferencePair]:
    """TRL, MedicalGPT, LLaMA-Factory: both answers are texts, single turns or lists of turns. What
    both lists begin with is (the rest of) the prompt, compared turn by turn and never within a
    text."""
    answers = {name: json_of(record[name]) for name in (chosen, "rejected")}
    rest = {name: value for name, value in record.items() if name not in answers}
    before, prompt = opening(record), _prompt(rest)
    if all(isinstance(answer, str | None) for answer in answers.values()):
        texts = [text_of(answer, name) for name, answer in answers.items()]
        return [_of_texts(record, before, prompt, texts)]
    if not prompt.turns and not all(isinstance(answer, list) for answer in answers.values()):
        raise BadField("prompt", NO_PROMPT)
    sides = [_side(answer, name) for name, answer in answers.items()]
    shared = _shared(*(side.turns for side in sides))
    rest = [side.turns[len(shared) :] for side in sides]
    # Sides that begin with a question hold the whole prompt, and another one is not put in front.
    whole = bool(shared) and shared[0][0] == "user"
    first = before.turns if whole else before.turns + prompt.turns
    turns = shared if first == shared[: len(first)] else first + shared
    pair = PreferencePair(turns)
    pair.chosen, pair.rejected = map(_answer, rest)
    for part in (before, prompt, *sides):
        _take_over(pair, part)
    if max(map(len, rest)) > 1:
        pair.dropped = "answers of several turns"
    elif len({side.system for side in sides if side.system}) > 1:
        pair.dropped = "the two sides have different system texts"
    elif any(len(side.turns) - 1 in side.untrained for side in sides):
        pair.dropped = "an answer is not to be learned"
    return [pair]


def rejected_beside(record: dict) -> list[PreferencePair]:
    """ms-swift: the chosen answer is `response` or ends the dialogue; the rejected one is a text
    in place of the dialogue's last turn, or a dialogue of its own."""
    name = given(record, ("messages", "answer"))
    chosen, rejected = json_of(record[name]), json_of(record["rejected"])
    if isinstance(chosen, list) and isinstance(rejected, str):
        rejected = [*chosen[:-1], {"role": "assistant", "content": rejected}]
    return chosen_rejected(record | {name: chosen, "rejected": rejected}, name)


def output_pair(record: dict) -> list[PreferencePair]:
    """AquilaMed-RL: instruction and input as in Alpaca, `output` is [chosen, rejected]."""
    output = record["output"]
    if len(output) != 2:
        raise BadField("output", f"expected [chosen, rejected], found {len(output)} entries")
    answers = [text_of(text, f"output[{i}]") for i, text in enumerate(output)]
    return [_of_texts(record, opening(record), _prompt(record), answers)]


def checked(pair: PreferencePair, record: dict) -> PreferencePair:
    """Decides whether the pair can be trained on; accounts for the prompt's fields."""
    if pair.turns:
        drop_leading_answers(pair)
    questions = [text for role, text in pair.turns if role == "user"]
    if not questions:
        raise BadField("prompt", "no user turn, so there is nothing to answer")
    why = [
        (pair.turns[-1][0] != "user", "the turn before the answers is no question"),
        (any(map(blank, questions)), "empty question"),
        (blank(pair.chosen) or blank(pair.rejected), "empty answer"),
        (pair.chosen.strip() == pair.rejected.strip(), "chosen and rejected are the same"),
    ]
    pair.dropped = pair.dropped or next((cause for holds, cause in why if holds), "")
    if any(map(ADDRESS.fullmatch, (pair.chosen, pair.rejected))):
        pair.notes.append(ADDRESS_NOTE)
    said = words_of("".join([pair.system, *pair.texts()]))
    for name in PROMPTS:
        if any(words_of(text) not in said for text in _texts_in(json_of(record.get(name)))):
            pair.unread.append(name)
    pair.group = group_of(record, "\n".join(questions))
    pair.source, pair.kind = source_of(record), label_of(record, "kind")
    return pair


# ---------------------------------------------------------------- parts


def _of_texts(record: dict, before: Chat, prompt: Chat, answers: list[str]) -> PreferencePair:
    """TRL's three texts are continued as they stand; with anything else, and in other formats,
    they go through the template."""
    pair = PreferencePair(before.turns + prompt.turns)
    for part in (before, prompt):
        _take_over(pair, part)
    if not pair.turns:
        raise BadField("prompt", NO_PROMPT)
    only_texts = pair.turns == [("user", record.get("prompt"))] and not pair.system
    pair.raw = "chosen" in record and only_texts
    question = pair.turns[-1][1]
    for i, answer in enumerate(answers):
        rest = answer.removeprefix(question)
        if rest and rest != answer and (pair.raw or rest[0].isspace()):
            answers[i] = rest
            pair.notes.append("prompt that an answer repeats cut off")
    if pair.raw:
        pair.notes.append("text continued without a template")
    pair.chosen, pair.rejected = answers
    return pair


def _take_over(pair: PreferencePair, part: Chat) -> None:
    """All that a part of the record says, but for its turns."""
    add_system(pair, part.system)
    pair.notes += part.notes
    pair.unread += part.unread
    pair.dropped = pair.dropped or part.dropped


def _prompt(record: dict) -> Chat:
    """The turns before the answers, without the system text and history that any record may have;
    empty if the record names none."""
    chat = Chat([])
    for name in ("messages", "prompt"):
        if filled(found := json_of(record.get(name))) and not isinstance(found, str):
            add_system(chat, text_of(record.get("instruction"), "instruction"))
            add_turns(chat, as_turns(found, "user"), name)
            return chat
    if main := main_question(record):
        chat.turns.append(("user", user_text(record, main, text_of(record[main], main))))
    return chat


def _side(value: Any, name: str) -> Chat:
    chat = Chat([])
    add_turns(chat, as_turns(value, "assistant"), name)
    if not chat.turns:
        raise BadField(name, f"no turn: {excerpt(value)}")
    return chat


def _shared(chosen: Turns, rejected: Turns) -> Turns:
    """The turns that both begin with, without the last one of either: that is the answer."""
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    return chosen[:n]


def _answer(turns: Turns) -> str:
    role, text = turns[-1]
    return text if role == "assistant" else ""


def _texts_in(value: Any) -> Iterator[str]:
    """The texts of a prompt of any form; of an object that is no turn, all that it holds."""
    if isinstance(value, dict):
        value = [value[k] for k in ("content", "value", "text") if k in value] or [*value.values()]
    if isinstance(value, list):
        for part in value:
            yield from _texts_in(part)
    elif isinstance(value, str):
        yield value
