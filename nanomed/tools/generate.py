"""Answers to a file of prompts.

    python -m nanomed.tools.generate --model DIR --prompts FILE --out FILE

A prompt is a JSON record: {"messages": [...]} ending with a user's turn, or {"prompt": "..."}; a
"system" text may stand beside them. It comes out with its "answer" and why it ended ("stop" or
"length"). Started again, it goes on where it stopped.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from nanomed.arguments import command_line
from nanomed.build.files import make_private, same_as_before
from nanomed.config import InputError
from nanomed.distributed import launch, pick_device
from nanomed.evals.folder import going_on, identity
from nanomed.hf import pretrained
from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, generate, limits_of
from nanomed.records import BadField, Chat, read_json
from nanomed.records.fields import filled
from nanomed.records.shapes import text_of
from nanomed.records.turns import add_turns
from nanomed.stages import stage
from nanomed.store.cache import digest
from nanomed.text.template import Encoder

# What training would read of such a record, too.
UNREAD = ("history", "instruction", "context", "input")


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a model asks for."""
    parser.add_argument("--model", required=True, help="Hugging Face, run or checkpoint folder")
    parser.add_argument("--tokenizer", default="", help="default: the folder's")
    parser.add_argument("--template", default="", help="name or JSON file; default: the folder's")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto: the GPU if any"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bf16", "fp32"),
        help="of the computation; auto: bf16 on CUDA, fp32 on CPU",
    )  # fmt: skip


ABOUT = {
    "temperature": "0: always the likeliest token; higher: more by chance",
    "top_k": "only the k likeliest tokens; 0: all",
    "top_p": "only the likeliest tokens that together have this probability",
    "repetition_penalty": "above 1: tokens that stood there before are less likely",
    "max_new": "most tokens of one answer",
    "seed": "number that decides what chance draws",
}


def load_model(c: argparse.Namespace, device: torch.device) -> Aquila:
    if warning := stage.bf16_warning(c, device):
        print(warning, file=sys.stderr)
    return pretrained.load(c.model, device, stage.compute_dtype(c, device))


def add_arguments(parser: argparse.ArgumentParser, defaults: Sampling) -> None:
    """What generation and chat ask for."""
    add_model(parser)
    for f in dataclasses.fields(Sampling):
        default = getattr(defaults, f.name)
        help = f"{ABOUT[f.name]}; default {default}"
        parser.add_argument(f"--{f.name}", type=f.type, default=default, help=help)


def open_model(c: argparse.Namespace) -> tuple[Aquila, Encoder, Sampling]:
    names = [f.name for f in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(c, name) for name in names})
    _, encoder = pretrained.describe(c.model, c.tokenizer, c.template)
    return load_model(c, pick_device(c.device)), encoder, sampling


def chat_of(record: dict, where: str) -> Chat:
    """A prompt record as a chat that ends with a user's turn. Raises InputError."""
    if not isinstance(record, dict) or ("messages" in record) == ("prompt" in record):
        raise InputError(f"{where}: expected an object with either 'messages' or 'prompt'")
    messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
    try:
        chat = Chat([], text_of(record.get("system"), "system"))
        add_turns(chat, messages, "messages")
    except BadField as bad:
        raise InputError(f"{where}: {bad}") from None
    elsewhere = (name for name in UNREAD if filled(record.get(name)))
    if left := [*elsewhere, *chat.unread, *chat.notes]:
        raise InputError(f"{where}: {left[0]}: this cannot be followed here; leave it out")
    if chat.dropped or not chat.turns or chat.turns[-1][0] != "user":
        raise InputError(f"{where}: the last turn must be the user's, a system turn the first")
    return chat


def main() -> None:
    parser = command_line("python -m nanomed.tools.generate", __doc__)
    parser.add_argument("--prompts", required=True, help="JSON lines (or an array), also .gz")
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, one per prompt")
    parser.add_argument(
        "--batch_size", type=positive_int, default=16, help="prompts at a time; default 16"
    )
    add_arguments(parser, Sampling())
    c = parser.parse_args()
    numbered = [(number, record) for number, record, _ in read_json(c.prompts)]
    records = [record for _, record in numbered]
    chats = [chat_of(record, f"{c.prompts}, record {number}") for number, record in numbered]
    model, encoder, sampling = open_model(c)
    prompts = [encoder.prompt(chat) for chat in chats]
    limits_of(model, prompts, sampling)
    settings = {"prompts": digest(c.prompts), **dataclasses.asdict(sampling)}
    settings |= identity(model, encoder.tokenizer, encoder.template)
    make_private(c.out.parent)
    noted = c.out.with_name(c.out.name + ".settings.json")
    if not c.out.exists():
        noted.unlink(missing_ok=True)
    same_as_before(noted, settings, str(c.out))
    n, size = len(prompts), c.batch_size
    batches = [range(i, min(i + size, n)) for i in range(0, n, size)]
    stop = {encoder.turn_end, encoder.document_end}
    n_answers, n_tokens, started = 0, 0, time.perf_counter()
    with going_on(c.out, [b.stop for b in batches], "prompt", True) as (done, write):
        for batch in batches[done:]:
            found = generate(model, [prompts[i] for i in batch], stop, sampling, batch.start)
            write([
                records[i] | {"answer": encoder.tokenizer.decode(ids), "end": end}
                for i, (ids, end) in zip(batch, found, strict=True)
            ])  # fmt: skip
            n_answers, n_tokens = n_answers + len(batch), n_tokens + sum(len(x) for x, _ in found)
    speed = n_tokens / (time.perf_counter() - started)
    print(f"{n_answers} answers, {speed:,.0f} tokens/s; all in {c.out}")


if __name__ == "__main__":
    launch(main)
