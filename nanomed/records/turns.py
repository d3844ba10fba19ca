"""What chats and preference pairs are put together from: roles and turns, a system text, earlier
turns, and the user's question out of several fields."""

from typing import Any

from nanomed.config import nearest
from nanomed.records.fields import filled, given, unread
from nanomed.records.shapes import BadField, Chat, excerpt, json_of, text_of, texts_of

# A tool's result is read by the model like a user's turn; calling the tool is the model's turn.
SAID_BY = {
    "user": "user human observation tool function",
    "assistant": "assistant gpt chatgpt bing bot model function_call",
    "system": "system developer",
}
ROLES = {name: role for role, names in SAID_BY.items() for name in names.split()}
TOOL_ROLES = ("observation", "tool", "function", "function_call")
TURN = ("role", "from", "content", "value")
MARKS = ("weight", "loss", "train", "trainable", "loss_mask")  # of a turn: whether it is learned
NO, YES = {"0", "0.0", "false"}, {"1", "1.0", "true"}

OPENING = ("system", "history")  # what every chat and pair may have besides
QUESTION = ("instruction", "context", "question", "prompt", "input")  # as a user's turn has them


def opening(record: dict) -> Chat:
    """A chat with the record's system text and its `history`: [[question, answer], ...] or
    turns."""
    chat = Chat([], text_of(record.get("system"), "system"))
    entries = json_of(record.get("history")) or []
    if not isinstance(entries, list):
        raise BadField("history", f"expected a list of pairs, found {excerpt(entries)}")
    for i, entry in enumerate(entries):
        if isinstance(entry, dict):
            add_turns(chat, [entry], f"history[{i}]")
        elif not isinstance(entry, list) or len(entry) != 2:
            raise BadField(f"history[{i}]", f"expected [question, answer], found {excerpt(entry)}")
        else:
            question, answer = (text_of(text, f"history[{i}]") for text in entry)
            chat.turns += [("user", question), ("assistant", answer)]
    return chat


def main_question(record: dict) -> str:
    """The name of the field that holds the question itself; "" if none is there."""
    return given(record, ("question", "prompt", "instruction", "input"))


def user_text(record: dict, main: str, wording: str) -> str:
    """The user's text: the question in this wording, and around it, on lines of their own, the
    instruction and the context before it and the input after it."""
    texts: list[str] = []
    for name in QUESTION:
        if name == main:
            texts.append(wording)
        elif filled(record.get(name)) and name != "prompt":
            texts += texts_of(record[name], name)
    return "\n".join(filter(None, texts))


def add_system(chat: Chat, text: str) -> None:
    """Several system texts are joined by a blank line; one that is said twice stands once."""
    if text and text not in chat.system.split("\n\n"):
        chat.system = f"{chat.system}\n\n{text}" if chat.system else text


def as_turns(value: Any, role: str) -> Any:
    """A list of turns as it is; one turn or one text as a list of it; null as an empty text."""
    found = json_of(value)
    if found is None or isinstance(found, str):
        return [{"role": role, "content": found}]
    return [found] if isinstance(found, dict) else found


def add_turns(chat: Chat, entries: Any, name: str) -> None:
    """Appends a list of {role, content}, {from, value} or {human, assistant} to a chat. Raises
    BadField."""
    entries = json_of(entries) or []
    if not isinstance(entries, list):
        raise BadField(name, f"expected a list of turns, found {excerpt(entries)}")
    start = len(chat.turns)
    for i, entry in enumerate(entries):
        for turn in _turns_in(entry):
            _add_turn(chat, turn, f"{name}[{i}]", start)


def _turns_in(entry: Any) -> list[Any]:
    """The entry itself; of Firefly's {"human": ..., "assistant": ...} one turn for each role."""
    if not isinstance(entry, dict) or filled(entry.get("role")) or filled(entry.get("from")):
        return [entry]
    spoken = [key for key in entry if key.lower() in ROLES]
    spoken.sort(key=lambda key: ROLES[key.lower()], reverse=True)  # the assistant comes last
    rest = {key: value for key, value in entry.items() if key not in spoken}
    return [rest | {"role": key, "content": entry[key]} for key in spoken] or [entry]


def _add_turn(chat: Chat, entry: Any, where: str, start: int) -> None:
    """A system text may stand before the turn of this number."""
    keys = entry.keys() & {*TURN} if isinstance(entry, dict) else set()
    role_key = "from" if "from" in keys and entry["from"] is not None else "role"
    text_key = "value" if "value" in keys and entry["value"] is not None else "content"
    if role_key not in keys or (text_key not in keys and "tool_calls" not in entry):
        raise BadField(where, f"expected 'role' and 'content', found {excerpt(entry)}")
    named, text = entry[role_key], text_of(entry.get(text_key), f"{where}.{text_key}")
    role = _role(named, f"{where}.{role_key}")
    if named.lower() in TOOL_ROLES:
        chat.notes.append(f"{named} turn read as the {role}'s")
    marks = {str(entry[mark]).lower() for mark in MARKS if entry.get(mark) is not None}
    if role == "assistant" and marks & NO:
        chat.untrained.add(len(chat.turns))
    if marks - NO - YES:
        chat.notes.append("weight of a turn that is neither 0 nor 1 read as 1")
    for key in unread(entry, {*TURN[:2], text_key, *MARKS}):
        place = f"{where.split('[')[0]}[].{key}"
        if entry[key] != text and place not in chat.unread:
            chat.unread.append(place)
    if role != "system":
        chat.turns.append((role, text))
    elif len(chat.turns) == start:
        add_system(chat, text)
    else:
        chat.dropped = "system turn in the middle"


def _role(value: Any, where: str) -> str:
    if not isinstance(value, str) or value.lower() not in ROLES:
        known = f"known: {', '.join(ROLES)}{nearest(value, ROLES)}"
        remedy = f"; --fields user={value} names it" if isinstance(value, str) else ""
        raise BadField(where, f"unknown role {excerpt(value)}; {known}{remedy}")
    return ROLES[value.lower()]
