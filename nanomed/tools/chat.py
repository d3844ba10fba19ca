"""Talk to a model in the terminal.

    python -m nanomed.tools.chat --model DIR

Answers appear as they are made, and the turns are kept: /reset forgets them, /system TEXT sets the
system text, /save FILE appends the chat to a JSONL file that train_sft.py reads, /quit leaves.
Ctrl-C ends an answer, not the program. The template is the one stored with the model.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanomed.arguments import command_line
from nanomed.distributed import launch
from nanomed.evals.answers import prompt_of
from nanomed.model.decoder import Aquila
from nanomed.model.generation import CHAT, Sampling, stream
from nanomed.records import Chat
from nanomed.text.template import Encoder
from nanomed.tools.generate import add_arguments, open_model
from nanomed.tools.serve_jobs import Answer, Job

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
    longest = model.config.max_seq_len
    room = min(sampling.max_new, longest // 2)  # for the answer
    prompt, dropped = prompt_of(encoder, chat, longest - room + 1)
    if not prompt:
        chat.turns.pop()
        write(f"[too long for a model that reads {longest} tokens]\n")
        return
    if dropped:
        write(f"[the oldest {dropped} turns no longer fit and are left out]\n")
    stop = {encoder.turn_end, encoder.document_end}
    answer = Answer(Job(prompt, sampling, lambda piece: write(piece.text)), encoder, stop)
    try:
        for _, token, logits in stream(model, [prompt], stop, sampling, first=number):
            if answer.add(token, logits):
                break
        else:  # the model reads no more
            answer.end("length")
    except KeyboardInterrupt:
        write(" [interrupted]")
    write("\n")
    text = answer.text[: answer.shown]
    if text.strip():
        chat.turns.append(("assistant", text))
    else:
        chat.turns.pop()


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
    parser = command_line("python -m nanomed.tools.chat", __doc__)
    add_arguments(parser, CHAT)
    model, encoder, sampling = open_model(parser.parse_args())
    talk(model, encoder, sampling, typed_lines(), lambda text: print(text, end="", flush=True))


if __name__ == "__main__":
    launch(main)
