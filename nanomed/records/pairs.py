"""Records of the preference formats, each turned into a PreferencePair."""

from typing import Any

from nanomed.records.chats import add_turns, as_turns, drop_leading_answers, history, joined
from nanomed.records.shapes import (
    BadField,
    Chat,
    PreferencePair,
    Turns,
    excerpt,
    group_of,
    source_of,
    text_of,
)


def chosen_rejected(record: dict) -> PreferencePair:
    """TRL, MedicalGPT, LLaMA-Factory: `chosen` and `rejected` are texts, single turns or lists of
    turns. What both lists begin with is (the rest of) the prompt, compared turn by turn and never
    within a text."""
    given = [name for name in (*PROMPTS, *DIALOGUES) if record.get(name) is not None]
    answers = record["chosen"], record["rejected"]
    if not given and not all(isinstance(answer, list) for answer in answers):
        raise BadField(
            "prompt",
            "none is given, and two texts do not say where a shared prompt ends; give `prompt`, "
            "or `chosen` and `rejected` as lists of turns",
        )
    if all(isinstance(text, str) for text in (*answers, record.get("prompt"))):
        texts = {name: text_of(record[name], name) for name in ("prompt", "chosen", "rejected")}
        turns = [("user", texts["prompt"])]
        return PreferencePair(turns, texts["chosen"], texts["rejected"], raw=True)
    chosen, rejected = (_side(record[name], name) for name in ("chosen", "rejected"))
    shared = _shared(chosen.turns, rejected.turns)
    rest = [side.turns[len(shared) :] for side in (chosen, rejected)]
    prompt = _prompt(record, whole_sides=bool(shared) and shared[0][0] == "user")
    if prompt.turns != shared[: len(prompt.turns)]:  # else the answers' lists repeat it
        shared = prompt.turns + shared
    systems = [chat.system for chat in (prompt, chosen, rejected) if chat.system]
    pair = PreferencePair(shared, *map(_answer, rest), systems[0] if systems else "")
    pair.notes = [note for chat in (prompt, chosen, rejected) for note in chat.notes]
    if max(map(len, rest)) > 1:
        pair.dropped = "answers of several turns"
    elif len(set(systems)) > 1:
        pair.dropped = "two system texts"
    else:
        pair.dropped = prompt.dropped or chosen.dropped or rejected.dropped
    return pair


def response_pair(record: dict) -> PreferencePair:
    """MedicalGPT's older files: system, history, question, response_chosen, response_rejected."""
    chosen, rejected = (
        text_of(record[name], name) for name in ("response_chosen", "response_rejected")
    )
    prompt = _prompt(record)
    return PreferencePair(prompt.turns, chosen, rejected, prompt.system)


def output_pair(record: dict) -> PreferencePair:
    """AquilaMed-RL: instruction and input as in Alpaca, `output` is [chosen, rejected]."""
    output = record["output"]
    if len(output) != 2:
        raise BadField("output", f"expected [chosen, rejected], found {len(output)} entries")
    chosen, rejected = (text_of(text, f"output[{i}]") for i, text in enumerate(output))
    prompt = _prompt(record)
    return PreferencePair(prompt.turns, chosen, rejected, prompt.system)


def checked(pair: PreferencePair, record: dict) -> PreferencePair:
    """Decides whether the pair can be trained on."""
    prompt = Chat(pair.turns, notes=pair.notes)
    if prompt.turns:
        drop_leading_answers(prompt)
    questions = [text for role, text in prompt.turns if role == "user"]
    if not questions:
        raise BadField("prompt", "no user turn, so there is nothing to answer")
    why = [
        (pair.turns[-1][0] != "user", "the turn before the answers is no question"),
        (not all(text.strip() for text in questions), "empty question"),
        (not (pair.chosen.strip() and pair.rejected.strip()), "empty answer"),
        (pair.chosen.strip() == pair.rejected.strip(), "chosen and rejected are the same"),
    ]
    pair.dropped = pair.dropped or next((cause for holds, cause in why if holds), "")
    pair.group = group_of(record, questions[0])
    pair.source = source_of(record)
    pair.kind = text_of(record.get("kind"), "kind")
    return pair


# ---------------------------------------------------------------- parts


PROMPTS = ("prompt", "question", "instruction", "input")
DIALOGUES = ("conversations", "messages")


def _prompt(record: dict, whole_sides: bool = False) -> Chat:
    """The turns before the answers. `whole_sides` says that the answers' lists hold the whole
    dialogue: then `messages` repeats one of them."""
    chat = Chat(history(record), text_of(record.get("system") or "", "system"))
    for name in DIALOGUES:
        if record.get(name) is not None and not (whole_sides and name == "messages"):
            add_turns(chat, record[name], name)
            return chat
    if isinstance(record.get("prompt"), list | dict):
        add_turns(chat, as_turns(record["prompt"], "user"), "prompt")
        return chat
    first = next((name for name in PROMPTS if record.get(name)), "")
    question = text_of(record.get(first), first)
    if first == "instruction":
        question = joined(question, text_of(record.get("input") or "", "input"))
    if question or not whole_sides:
        chat.turns.append(("user", question))
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
