"""Answers to a file of prompts.

    python -m nanomed.tools.generate --model DIR --prompts FILE --out FILE

A prompt is a JSON record: {"messages": [...]} ending with a user's turn, or {"prompt": "..."}. It
comes out with its "answer" and why it ended ("stop" or "length"). Started again, it goes on where
it stopped.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from nanomed.config import InputError
from nanomed.distributed import launch, pick_device
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, generate, limits_of
from nanomed.records import Chat, read_json
from nanomed.records.turns import ROLES
from nanomed.stages import stage
from nanomed.text.template import Encoder


def add_arguments(parser: argparse.ArgumentParser, defaults: Sampling) -> None:
    """What generation and chat both ask for."""
    parser.add_argument("--model", required=True, help="Hugging Face, run or checkpoint folder")
    parser.add_argument("--tokenizer", default="", help="default: the folder's")
    parser.add_argument("--template", default="", help="name or JSON file; default: the folder's")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp32"))
    for f in dataclasses.fields(Sampling):
        default = getattr(defaults, f.name)
        help = f"default {default}"
        parser.add_argument(f"--{f.name}", type=f.type, default=default, help=help)


def open_model(c: argparse.Namespace) -> tuple[Aquila, Encoder, Sampling]:
    names = [f.name for f in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(c, name) for name in names})
    _, encoder = pretrained.describe(c.model, c.tokenizer, c.template)
    device = pick_device(c.device)
    if warning := stage.bf16_warning(c, device):
        print(warning, file=sys.stderr)
    return pretrained.load(c.model, device, stage.compute_dtype(c, device)), encoder, sampling


def chat_of(record: dict, where: str) -> Chat:
    """A prompt record as a chat that ends with a user's turn. Raises InputError."""
    if not isinstance(record, dict) or ("messages" in record) == ("prompt" in record):
        raise InputError(f"{where}: expected an object with either 'messages' or 'prompt'")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    turns = []
    for i, message in enumerate(messages if isinstance(messages, list) else [None]):
        role, text = (message.get(k) if isinstance(message, dict) else None for k in _KEYS)
        if role not in ROLES or not isinstance(text, str) or not _is_text(text):
            raise InputError(f"{where}: messages[{i}] needs a role and a text as content")
        turns.append((ROLES[role], text))
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else record.get("system", "")
    if not isinstance(system, str) or not _is_text(system):
        raise InputError(f"{where}: system is {system!a}; expected a text")
    if not turns or turns[-1][0] != "user" or any(role == "system" for role, _ in turns):
        raise InputError(f"{where}: the last turn must be the user's, a system turn the first")
    return Chat(turns, system)


_KEYS = ("role", "content")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half an emoji
        return False
    return True


def _done(out: Path, records: list[dict], settings: dict) -> int:
    """How many prompts an earlier call answered; a line that it did not finish is cut off."""
    noted = out.with_name(out.name + ".settings.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        return 0
    if not noted.exists() or json.loads(noted.read_text("utf-8")) != settings:
        raise InputError(
            f"{out} was written with other settings, see {noted}; choose another --out"
        )
    whole = out.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    asked = [{k: v for k, v in line.items() if k not in ("answer", "end")} for line in lines]
    if asked != records[: len(asked)]:
        raise InputError(f"{out} answers other prompts; choose another --out")
    with open(out, "r+b") as file:
        file.truncate(len(whole))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="nanomed.tools.generate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--prompts", required=True, help="JSON lines (or an array), also .gz")
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, one per prompt")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time; default 16")
    add_arguments(parser, Sampling())
    c = parser.parse_args()
    numbered = [(number, record) for number, record, _ in read_json(c.prompts)]
    records = [record for _, record in numbered]
    chats = [chat_of(record, f"{c.prompts}, record {number}") for number, record in numbered]
    model, encoder, sampling = open_model(c)
    prompts = [encoder.prompt(chat) for chat in chats]
    limits_of(model, prompts, sampling)
    settings = {"model": c.model, "prompts": c.prompts, **dataclasses.asdict(sampling)}
    first = _done(c.out, records, settings)
    stop = {encoder.turn_end, encoder.document_end}
    n_tokens, started = 0, time.perf_counter()
    bar = tqdm(total=len(prompts), initial=first, unit="prompt", disable=None)
    with bar, open(c.out, "a", encoding="utf-8") as file:
        for i in range(first, len(prompts), c.batch_size):
            batch = prompts[i : i + c.batch_size]
            for record, (ids, end) in zip(
                records[i : i + c.batch_size],
                generate(model, batch, stop, sampling, first=i),
                strict=True,
            ):
                line = record | {"answer": encoder.tokenizer.decode(ids), "end": end}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                n_tokens += len(ids)
            file.flush()
            bar.update(len(batch))
    speed = n_tokens / (time.perf_counter() - started)
    print(f"{len(prompts) - first} answers, {speed:,.0f} tokens/s; all in {c.out}")


if __name__ == "__main__":
    launch(main)
