"""Text from a model: a key/value cache, sampling, batches of prompts of different lengths.

    python -m nanomed.generate --model DIR --prompts FILE --out FILE

A prompt is a JSON record: {"messages": [...]} ending with a user's turn, or {"prompt": "..."}. It
comes out with its "answer" and why it ended ("stop" or "length"). Started again, it goes on where
it stopped.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanomed import pretrained
from nanomed.config import InputError
from nanomed.distributed import from_main_tensor, launch, pick_device
from nanomed.model import Aquila, new_cache
from nanomed.packing import Row, row_from
from nanomed.records import Chat, read_json
from nanomed.records.chats import ROLES
from nanomed.template import Encoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the most likely that together have this probability
    repetition_penalty: float = 1.0  # Keskar et al. 2019, section 4.1; 1: none
    max_new: int = 512  # most tokens of one answer
    seed: int = 0  # prompt i draws from a generator of its own, seeded by (seed, i)

    def __post_init__(self) -> None:
        limits = [
            (self.temperature >= 0, "temperature", "0 or more"),
            (self.top_k >= 0, "top_k", "0 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0, at most 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (self.max_new >= 1, "max_new", "at least 1"),
        ]
        for holds, name, rule in limits:
            if not holds:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be {rule}")


def generate(
    model: Aquila,
    prompts: list[list[int]],
    stop: set[int],
    sampling: Sampling,
    first: int = 0,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[tuple[list[int], str]]:
    """(ids without the stop token, "stop" or "length") for each prompt, all in one batch. What
    comes out for a prompt depends on its number (first, first + 1, ...), not on its neighbours."""
    answers: list[list[int]] = [[] for _ in prompts]
    ends = ["length"] * len(prompts)
    for i, token in stream(model, prompts, stop, sampling, first, agree):
        if token in stop:
            ends[i] = "stop"
        else:
            answers[i].append(token)
    return list(zip(answers, ends, strict=True))


@torch.no_grad()
def stream(
    model: Aquila,
    prompts: list[list[int]],
    stop: set[int],
    sampling: Sampling,
    first: int = 0,
    agree: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> Iterator[tuple[int, int]]:
    """Yields (index of the prompt, its next token) as they come, stop tokens included. `agree`
    makes the ranks of a sharded model choose alike. Raises InputError for a prompt that leaves no
    room for an answer."""
    limits = _limits(model, prompts, sampling)
    device = next(model.parameters()).device
    generators = [_generator(sampling.seed, first + i) for i in range(len(prompts))]
    batch = list(range(len(prompts)))  # the prompts that have a place in the cache
    lengths = [len(prompt) for prompt in prompts]
    seen = _seen(prompts, model.config.vocab_size, device)
    cache = new_cache(model, len(prompts), max(limits))
    logits = model(row_from(prompts).to(device), cache=cache)  # [B,V]
    done = set()
    while True:
        tokens = agree(choose(logits, seen, sampling, [generators[i] for i in batch]))
        for i, token in zip(batch, tokens.tolist(), strict=True):
            if i not in done:
                yield i, token
                lengths[i] += 1
                if token in stop or lengths[i] >= limits[i]:
                    done.add(i)
        if len(done) == len(prompts):
            return
        seen.scatter_(1, tokens[:, None], True)
        places = [place for place, i in enumerate(batch) if i not in done]
        # Copying the cache costs about a step, so it waits until half the places are idle.
        if 2 * len(places) <= len(batch):
            kept = torch.tensor(places, device=device)
            batch, tokens, seen = [batch[p] for p in places], tokens[kept], seen[kept]
            for layer in cache:
                layer.keep(kept)
        # An idle place goes on over its own last token, unseen.
        positions = [min(lengths[i], limits[i]) - 1 for i in batch]
        logits = model(_one_each(tokens, positions), cache=cache)


def _limits(model: Aquila, prompts: list[list[int]], sampling: Sampling) -> list[int]:
    """The most tokens of each prompt with its answer."""
    most = model.config.max_seq_len
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < most:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens; the model reads 1 to {most - 1}, so that "
                "there is room for an answer"
            )
    return [min(most, len(prompt) + sampling.max_new) for prompt in prompts]


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _seen(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """[B,V]: which tokens each prompt has."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        seen[i, torch.tensor(prompt)] = True
    return seen.to(device)


def _one_each(tokens: Tensor, positions: list[int]) -> Row:
    """A row of one token of each sequence."""
    n, device = len(positions), tokens.device
    return Row(
        tokens=tokens,
        labels=torch.full_like(tokens, -100),
        positions=torch.tensor(positions, device=device),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32, device=device),
        max_seqlen=1,
        examples=torch.arange(n, device=device),
    )


def choose(
    logits: Tensor, seen: Tensor, sampling: Sampling, generators: list[torch.Generator]
) -> Tensor:  # logits[B,V], seen[B,V] -> [B]
    """The next token of each sequence: penalty, temperature, top-k, top-p, in this order."""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(
            seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, tokens = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
    probs /= probs.sum(-1, keepdim=True)
    probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0  # the first always stays
    # One uniform number per sequence, read off the cumulative distribution.
    uniform = torch.stack([torch.rand((), generator=g) for g in generators]).to(logits.device)
    total = probs.cumsum(-1)
    place = (total <= uniform[:, None] * total[:, -1:]).sum(-1)
    place = place.minimum((probs > 0).sum(-1) - 1)  # rounding may point past the last one
    return tokens.gather(1, place[:, None])[:, 0]


def greedy_in_lockstep(
    model: Aquila, prompts: list[list[int]], stop: set[int], max_new: int
) -> list[list[int]]:
    """The most likely answer to each prompt, from a sharded model: a rank that stopped alone would
    hang the others, so all of them run the same batch and rank 0 decides each token (on another
    GPU a tie could fall the other way)."""
    model.eval()
    answers = generate(model, prompts, stop, Sampling(max_new=max_new), agree=from_main_tensor)
    return [ids for ids, _ in answers]


# ---------------------------------------------------------------- command


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
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": auto}[c.dtype]
    return pretrained.load(c.model, device, dtype), encoder, sampling


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
        noted.write_text(json.dumps(settings, indent=2) + "\n")
        return 0
    if not noted.exists() or json.loads(noted.read_text()) != settings:
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
    parser = argparse.ArgumentParser(prog="nanomed.generate", description=__doc__.splitlines()[0])
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
    _limits(model, prompts, sampling)
    settings = {"model": c.model, "prompts": c.prompts, **dataclasses.asdict(sampling)}
    first = _done(c.out, records, settings)
    stop = {encoder.turn_end, encoder.document_end}
    n_tokens, started = 0, time.perf_counter()
    bar = tqdm(total=len(prompts), initial=first, unit="prompt")
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
