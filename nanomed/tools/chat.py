"""Talk to a model in the terminal.

    python -m nanomed.tools.chat --model DIR

Answers appear as they are made, and the turns are kept: /reset forgets them, /system TEXT sets the
system text, /save FILE appends the chat to a JSONL file that train_sft.py reads, /quit leaves.
Ctrl-C ends an answer, not the program. The template is the one stored with the model.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanomed.distributed import launch
from nanomed.model.decoder import Aquila
from nanomed.model.generation import CHAT, Sampling, stream
from nanomed.records import Chat
from nanomed.text.template import Encoder
from nanomed.tools.generate import add_arguments, open_model

SAFETY = (
    "The answers can be wrong and are no medical advice; in an emergency call for help. "
    "回答可能有误，不能代替医生；如遇紧急情况请立即就医。"
)
HELP = "/reset  /system TEXT  /save FILE  /help  /quit; Ctrl-C ends an answer"


def talk(
    model: Aquila,
    encoder: Encoder,
    sampling: Sampling,
    lines: Iterable[str],
    write: Callable[[str], None],
) -> None:
    """Answers each line, in one conversation, until the lines end or one is /quit."""
    write(f"{SAFETY}\n{HELP}\n")
    chat = Chat([])
    for number, line in enumerate(lines):
        if line.startswith("/"):
            if line.split()[0] == "/quit":
                return
            write(command(chat, line) + "\n")
        elif line.strip():
            try:
                _take_turn(model, encoder, sampling, chat, line, number, write)
            except KeyboardInterrupt:  # before or after the answer
                write("[interrupted]\n")


def command(chat: Chat, line: str) -> str:
    """Does what a line that begins with / asks for; returns what to say."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        chat.turns.clear()
        return "[the conversation starts anew]"
    if name == "/system":
        chat.system = rest
        chat.turns.clear()
        return "[system text " + ("set" if rest else "back to the template's") + "; starts anew]"
    if name == "/save":
        return _save(chat, rest)
    return HELP if name == "/help" else f"[{name} is no command; {HELP}]"


def _save(chat: Chat, path: str) -> str:
    if not path or not chat.turns:
        return "[nothing to save yet]" if path else "[/save needs a file]"
    messages = [{"role": role, "content": text} for role, text in chat.turns]
    if chat.system:
        messages.insert(0, {"role": "system", "content": chat.system})
    try:
        # Only for its owner: what is said here may be about a patient.
        fd = os.open(Path(path).expanduser(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"[not saved: {error}]"
    return f"[{len(chat.turns)} turns appended to {path}]"


def _take_turn(
    model: Aquila,
    encoder: Encoder,
    sampling: Sampling,
    chat: Chat,
    line: str,
    number: int,
    write: Callable[[str], None],
) -> None:
    chat.turns.append(("user", line))
    prompt, dropped = _fitting_prompt(encoder, chat, model.config.max_seq_len, sampling.max_new)
    if not prompt:
        chat.turns.pop()
        write(f"[too long for a model that reads {model.config.max_seq_len} tokens]\n")
        return
    if dropped:
        write(f"[the oldest {dropped} turns no longer fit and are left out]\n")
    text = ""
    try:
        for piece in pieces(model, encoder, sampling, prompt, number):
            text += piece
            write(piece)
    except KeyboardInterrupt:
        write(" [interrupted]")
    write("\n")
    if text.strip():
        chat.turns.append(("assistant", text))
    else:
        chat.turns.pop()


def _fitting_prompt(
    encoder: Encoder, chat: Chat, max_seq_len: int, max_new: int
) -> tuple[list[int], int]:
    """(ids, turns left out): as many of the last turns as leave room for an answer; no ids if
    even the last one does not fit. The chat itself keeps all."""
    room = max_seq_len - min(max_new, max_seq_len // 2)
    users = [i for i, (role, _) in enumerate(chat.turns) if role == "user"]
    for start in users:
        ids = encoder.prompt(Chat(chat.turns[start:], chat.system))
        if len(ids) <= room:
            return ids, start
    return [], 0


def pieces(
    model: Aquila, encoder: Encoder, sampling: Sampling, prompt: list[int], number: int
) -> Iterator[str]:
    """The answer's text as it grows. A token may end inside a character: what is not yet whole
    waits for the next one."""
    stop = {encoder.turn_end, encoder.document_end}
    ids: list[int] = []
    shown = ""
    for _, token, _ in stream(model, [prompt], stop, sampling, first=number):
        if token not in stop:
            ids.append(token)
        text = encoder.tokenizer.decode(ids)
        if not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    yield encoder.tokenizer.decode(ids)[len(shown) :]


def typed_lines() -> Iterator[str]:
    """What is typed, line by line; Ctrl-C there clears the line, Ctrl-D ends."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit leaves]")
        except EOFError:
            return


def main() -> None:
    parser = argparse.ArgumentParser(prog="nanomed.tools.chat", description=__doc__.split("\n")[0])
    add_arguments(parser, CHAT)
    model, encoder, sampling = open_model(parser.parse_args())
    talk(model, encoder, sampling, typed_lines(), lambda text: print(text, end="", flush=True))


if __name__ == "__main__":
    launch(main)
