"""Records of the chat formats, each turned into a Chat. Adding a format is a function here and a
line in nanomed/records/__init__.py."""

import re
from typing import Any

from nanomed.records.exams import BARE, KEYS, exam_of, render
from nanomed.records.fields import filled, given
from nanomed.records.shapes import (
    BadField,
    Chat,
    blank,
    excerpt,
    group_of,
    json_of,
    source_of,
    text_of,
    texts_of,
)
from nanomed.records.turns import add_system, add_turns, as_turns, main_question, opening, user_text

ADDRESS = re.compile(r"\s*(https?://|www\.)\S+\s*")
ADDRESS_NOTE = "answer is a web address alone, kept"
NO_TEXT = ("", "无", "無")  # what Toyhom's forms hold where a patient wrote nothing
ANSWER_FIRST = "assistant turn before the first question dropped"


def dialogue(record: dict) -> list[Chat]:
    """OpenAI, ShareGPT, DISC-MedLLM, Firefly: a list of turns. In Aquila2's own files the system
    text is called `instruction`."""
    chat = opening(record)
    add_system(chat, text_of(record.get("instruction"), "instruction"))
    add_turns(chat, record["messages"], "messages")
    return [chat]


def question_answer(record: dict, answers: tuple[str, ...] = ("answer", "output")) -> list[Chat]:
    """Alpaca, Huatuo and their relatives. Question and answer may be lists: a chat for each
    wording of the question."""
    main, answer = main_question(record), given(record, answers)
    pairs, n_left = _paired(record[main], record[answer], (main, answer))
    chats = []
    for wording, text in pairs:
        chats.append(opening(record))
        chats[-1].turns += [("user", user_text(record, main, wording)), ("assistant", text)]
        if "options" in record and BARE.fullmatch(text):
            chats[-1].dropped = "exam question without options"
    chats[0].notes += ["further answer to the same question left out"] * n_left
    return chats


def _paired(
    questions: Any, answers: Any, names: tuple[str, str], depth: int = 0
) -> tuple[list[tuple[str, str]], int]:
    """(question, answer) of each wording, and how many answers are left out. Lists of one length
    belong together; else every wording has the first answer. Several letters are one answer: those
    of a question with several right options."""
    both = depth < 2 and isinstance(questions, list) and isinstance(answers, list)
    if both and questions and len(questions) == len(answers):
        parts = [_paired(*two, names, depth + 1) for two in zip(questions, answers, strict=True)]
        return [pair for pairs, _ in parts for pair in pairs], sum(left for _, left in parts)
    wordings, texts = texts_of(questions, names[0]), texts_of(answers, names[1])
    if all(re.fullmatch("[A-J]", text) for text in texts):
        texts = ["、".join(texts)]
    return [(wording, texts[0]) for wording in wordings], len(texts) - 1


def exam(record: dict) -> list[Chat]:
    """CMB, C-Eval, CMExam, MMLU and others: the options are asked with the question."""
    if not filled(record[given(record, KEYS)]) or not (item := exam_of(record)):
        return question_answer(record, KEYS)  # and it is dropped, or read as what it is
    chat = opening(record)
    chat.turns += render(item).turns
    chat.group = item.question  # the options may stand in another order
    chat.dropped = "empty question" * blank(item.question)
    return [chat]


def toyhom(record: dict) -> list[Chat]:
    """Chinese-medical-dialogue-data: department, title, ask, answer. The title is often the
    question itself and `ask` only its background, so both are the user's turn."""
    title, ask = (text_of(record.get(name), name).strip() for name in ("title", "ask"))
    parts = [part for part in (title, ask) if part not in NO_TEXT]
    if len(parts) == 2 and title in ask:
        parts = [ask]
    chat = opening(record)
    chat.turns += [("user", "\n".join(parts)), ("assistant", text_of(record["answer"], "answer"))]
    return [chat]


def question_list(record: dict) -> list[Chat]:
    """HuatuoGPT: {"data": ["问：...", "答：...", ...]}; the marks are its roles, not its text."""
    chat = opening(record)
    for i, entry in enumerate(record["data"]):
        if isinstance(entry, dict):
            raise BadField(
                "data", "a list of records; jq -c '.data[]' FILE writes one on each line"
            )
        for text in texts_of(entry, f"data[{i}]"):
            role = {"问": "user", "答": "assistant"}.get(text[:1])
            if role is None or text[1:2] not in ("：", ":"):
                raise BadField(f"data[{i}]", f"expected 问：... or 答：..., found {excerpt(text)}")
            chat.turns.append((role, text[2:]))
    return [chat]


def prompt_completion(record: dict) -> list[Chat]:
    """TRL: two texts are continued as they stand; lists of turns, and what has a system text or
    a history, go through the template. Only the completion is learned."""
    chat = opening(record)
    prompt, completion = (json_of(record[name]) for name in ("prompt", "completion"))
    if all(isinstance(text, str) for text in (prompt, completion)) and chat == Chat([]):
        texts = text_of(prompt, "prompt"), text_of(completion, "completion")
        chat.turns = list(zip(("user", "assistant"), texts, strict=True))
        chat.raw, chat.notes = True, ["text continued without a template"]
        return [chat]
    add_turns(chat, as_turns(prompt, "user"), "prompt")
    n_given = len(chat.turns)
    add_turns(chat, as_turns(completion, "assistant"), "completion")
    chat.untrained |= {*range(n_given)}
    if not any(role == "assistant" for role, _ in chat.turns[n_given:]):
        raise BadField("completion", "no assistant turn, so there is nothing to train on")
    return [chat]


# ---------------------------------------------------------------- checks


def checked(chat: Chat, record: dict) -> Chat:
    """Drops what frames no answer, and says so; decides whether the chat can be trained on."""
    if not any(role == "assistant" for role, _ in chat.turns):
        hint = "; a preference pair is read by train_dpo.py" if "chosen" in record else ""
        raise BadField("(turns)", "no assistant turn, so there is nothing to train on" + hint)
    drop_leading_answers(chat)
    while chat.turns[-1][0] == "user":
        chat.turns.pop()
        chat.notes.append("user turn after the last answer dropped")
        if not chat.turns:
            swapped = ", as if the roles were swapped" if ANSWER_FIRST in chat.notes else ""
            raise BadField("(turns)", "no answer follows a question" + swapped)
    answers = [i for i, (role, _) in enumerate(chat.turns) if role == "assistant"]
    empty = {role for role, text in chat.turns if blank(text)}
    if not chat.dropped and empty:
        chat.dropped = "empty answer" if "assistant" in empty else "empty question"
    elif not chat.dropped and chat.untrained.issuperset(answers):
        chat.dropped = "no turn is to be learned"
    question, answer = chat.turns[0][1], chat.turns[-1][1]
    if question.startswith(("问：", "问:")) or answer.startswith(("答：", "答:")):
        chat.notes.append("text begins with 问： or 答：, kept")
    if any(ADDRESS.fullmatch(chat.turns[i][1]) for i in answers):
        chat.notes.append(ADDRESS_NOTE)
    questions = chat.group or "\n".join(text for role, text in chat.turns if role == "user")
    chat.group, chat.source = group_of(record, questions), source_of(record)
    return chat


def drop_leading_answers(chat: Chat) -> None:
    note = ANSWER_FIRST
    while chat.turns[0][0] == "assistant":
        chat.turns.pop(0)
        chat.untrained = {i - 1 for i in chat.untrained if i}
        chat.notes.append(note)
        note = "another " + ANSWER_FIRST
        if not chat.turns:
            raise BadField("(turns)", "no user turn, so there is nothing to answer")
