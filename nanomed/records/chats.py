"""Records of the chat formats, each turned into a Chat. Adding a format is a function here and a
line in nanomed/records/__init__.py."""

from itertools import cycle
from typing import Any

from nanomed.config import nearest
from nanomed.records.shapes import (
    BadField,
    Chat,
    Turns,
    excerpt,
    group_of,
    source_of,
    text_of,
    texts_of,
)

# A tool's result is read by the model like a user's turn; calling the tool is the model's turn.
ROLES = {
    "user": "user",
    "human": "user",
    "observation": "user",
    "tool": "user",
    "function": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",
}
TOOL_ROLES = ("observation", "tool", "function", "function_call")
NO_TEXT = ("", "无", "無")  # what Toyhom's forms hold where a patient wrote nothing


def messages(record: dict) -> list[Chat]:
    """OpenAI: {"messages": [{"role": ..., "content": text or parts}, ...]}."""
    return [_whole(record, "messages", "system")]


def sharegpt(record: dict) -> list[Chat]:
    """ShareGPT: {"conversations": [{"from": "human", "value": ...}, ...], "system": ...}; in
    Aquila2's own files the system text is called `instruction`."""
    return [_whole(record, "conversations", "system" if record.get("system") else "instruction")]


def alpaca(record: dict) -> list[Chat]:
    """Alpaca with optional history; question and answer may be lists (Huatuo): every wording of
    the question with the first answer."""
    before = history(record)
    extra = text_of(record.get("input") or "", "input")
    answer = texts_of(record["output"], "output")[0]
    system = text_of(record.get("system") or "", "system")
    return [
        Chat([*before, ("user", joined(question, extra)), ("assistant", answer)], system)
        for question in texts_of(record["instruction"], "instruction")
    ]


def question_answer(record: dict) -> list[Chat]:
    """Huatuo and its relatives: one text or a list under any of the names of QUESTION and ANSWER;
    every wording of the question with the first answer."""
    question, answer = (
        next(name for name in names if record.get(name) is not None) for names in (QUESTION, ANSWER)
    )
    first = texts_of(record[answer], answer)[0]
    wordings = texts_of(record[question], question)
    return [Chat([("user", wording), ("assistant", first)]) for wording in wordings]


QUESTION, ANSWER = ("questions", "question", "问"), ("answers", "answer", "答")


def toyhom(record: dict) -> list[Chat]:
    """Chinese-medical-dialogue-data: department, title, ask, answer. The title is often the
    question itself and `ask` only its background, so both are the user's turn."""
    title, ask = (text_of(record.get(name), name).strip() for name in ("title", "ask"))
    parts = [part for part in (title, ask) if part not in NO_TEXT]
    if len(parts) == 2 and title in ask:
        parts = [ask]
    answer = text_of(record["answer"], "answer")
    return [Chat([("user", "\n".join(parts)), ("assistant", answer)])]


def question_list(record: dict) -> list[Chat]:
    """HuatuoGPT: {"data": ["问：...", "答：...", ...]}; the marks are its roles, not its text."""
    turns = []
    for i, text in enumerate(texts_of(record["data"], "data")):
        role = {"问": "user", "答": "assistant"}.get(text[:1])
        if role is None or text[1:2] not in ("：", ":"):
            raise BadField(f"data[{i}]", f"expected 问：... or 答：..., found {excerpt(text)}")
        turns.append((role, text[2:]))
    return [Chat(turns)]


def prompt_completion(record: dict) -> list[Chat]:
    """TRL: texts are continued as they stand; lists of turns go through the template. Only the
    completion is learned."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        answer = text_of(completion, "completion")
        return [Chat([("user", text_of(prompt, "prompt")), ("assistant", answer)], raw=True)]
    chat = Chat([])
    add_turns(chat, as_turns(prompt, "user"), "prompt")
    chat.context = len(chat.turns)
    add_turns(chat, as_turns(completion, "assistant"), "completion")
    if not any(role == "assistant" for role, _ in chat.turns[chat.context :]):
        raise BadField("completion", "no assistant turn, so there is nothing to train on")
    return [chat]


# ---------------------------------------------------------------- turns


def history(record: dict) -> Turns:
    """Alpaca's `history`: [[question, answer], ...], null, empty or absent."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list):
        raise BadField("history", f"expected a list of pairs, found {excerpt(pairs)}")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadField(f"history[{i}]", f"expected [question, answer], found {excerpt(pair)}")
    texts = [text_of(text, f"history[{i}]") for i, pair in enumerate(pairs) for text in pair]
    return list(zip(cycle(("user", "assistant")), texts, strict=False))


def joined(question: str, extra: str) -> str:
    return f"{question}\n{extra}" if question and extra else question or extra


def as_turns(value: Any, role: str) -> Any:
    """A list of turns as it is; one turn or one text as a list of it."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _whole(record: dict, name: str, system: str) -> Chat:
    chat = Chat([], text_of(record.get(system) or "", system))
    add_turns(chat, record[name], name)
    if record.get("tools"):
        chat.notes.append("list of tools left out")
    return chat


def add_turns(chat: Chat, entries: Any, name: str) -> None:
    """Appends a list of {role, content} or {from, value} to a chat. Raises BadField."""
    if not isinstance(entries, list):
        raise BadField(name, f"expected a list of turns, found {excerpt(entries)}")
    for i, entry in enumerate(entries):
        role_key, text_key = ("from", "value") if _has(entry, "from") else ("role", "content")
        where = f"{name}[{i}]"
        calls = _has(entry, "tool_calls")
        if not _has(entry, role_key) or not (calls or _has(entry, text_key)):
            raise BadField(where, f"expected {role_key!r} and {text_key!r}, found {excerpt(entry)}")
        role = _role(entry[role_key], f"{where}.{role_key}")
        text = text_of(entry.get(text_key), f"{where}.{text_key}")
        if entry[role_key] in TOOL_ROLES:
            chat.notes.append(f"{entry[role_key]} turn read as the {role}'s")
        if calls and entry["tool_calls"]:
            chat.notes.append("tool_calls of a turn left out")
        if role != "system":
            chat.turns.append((role, text))
        elif not chat.turns:
            chat.system = text
        else:
            chat.dropped = "system turn in the middle"


def _has(entry: Any, name: str) -> bool:
    return isinstance(entry, dict) and name in entry


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value not in ROLES:
        raise BadField(
            where,
            f"unknown role {excerpt(value)}; known: {', '.join(ROLES)}" + nearest(value, ROLES),
        )
    return ROLES[value]


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
            raise BadField("(turns)", "no answer follows a question")
    empty = {role for role, text in chat.turns if not text.strip()}
    if not chat.dropped:
        chat.dropped = "empty answer" if "assistant" in empty else "empty question" * bool(empty)
    question, answer = chat.turns[0][1], chat.turns[-1][1]
    if question.startswith(("问：", "问:")) or answer.startswith(("答：", "答:")):
        chat.notes.append("text begins with 问： or 答：, kept")
    chat.group = group_of(record, question)
    chat.source = source_of(record)
    return chat


def drop_leading_answers(chat: Chat) -> None:
    while chat.turns[0][0] == "assistant":
        chat.turns.pop(0)
        chat.context = max(0, chat.context - 1)
        chat.notes.append("assistant turn before the first question dropped")
        if not chat.turns:
            raise BadField("(turns)", "no user turn, so there is nothing to answer")
