"""Requests as token ids, the way lm-eval encodes them; nanomed/model/scoring.py scores those.

Context and continuation are encoded as one text, and the score is the sum over the continuation's
tokens.
"""

import json
import re
from collections.abc import Sequence

from nanomed.config import InputError
from nanomed.evals.requests import Request
from nanomed.model.scoring import Encoded
from nanomed.text.template import Encoder
from nanomed.text.tokenizer import Tokenizer


def encode(
    request: Request,
    tokenizer: Tokenizer,
    bos: Sequence[int],
    longest: int,
    encoder: Encoder | None = None,
) -> Encoded:
    """`longest` is the model's: an input is cut on the left to longest + 1 tokens with its last
    target, as lm-eval does. `bos` is put before every text; `encoder` is for chats. Raises
    InputError if a continuation has no token of its own, or one with nothing before it."""
    wanted = []  # (input, targets) by continuation
    cut = 0
    for ids, targets in _pairs(request, tokenizer, list(bos), encoder):
        if not targets:
            raise InputError(
                f"{request.id}: the tokenizer gives a continuation of {request.continuations} no "
                "token of its own, so it has no score"
            )
        whole = [*ids, *targets]
        if not ids or len(targets) > longest:
            raise InputError(
                f"{request.id}: a continuation of {len(targets)} tokens after {len(ids)} others, "
                f"for a model that reads {longest}: its first token has no score"
            )
        cut = max(cut, len(whole) - longest - 1)
        wanted.append((tuple(whole[-longest - 1 : -1]), targets))
    ordered = sorted({ids for ids, _ in wanted})
    # What begins another one stands right before it, or before others that it begins.
    inputs = [a for a, b in zip(ordered, [*ordered[1:], ()], strict=True) if b[: len(a)] != a]
    reads = []
    for ids, targets in wanted:
        which = next(i for i, whole in enumerate(inputs) if whole[: len(ids)] == ids)
        first = len(ids) - len(targets)
        reads.append([(which, first + j, token) for j, token in enumerate(targets)])
    return Encoded(inputs, reads, cut)


def _pairs(
    request: Request, tokenizer: Tokenizer, bos: list[int], encoder: Encoder | None
) -> list[tuple[list[int], list[int]]]:
    """(context's ids, continuation's ids) for each continuation."""
    encode = tokenizer.encode
    if request.chat:
        prompt = encoder.prompt(request.chat)
        return [(prompt, encode(text)) for text in request.continuations]
    context = request.context.rstrip()
    spaces = request.context[len(context) :]  # they belong to what follows
    ids = bos + encode(context)
    wholes = [bos + encode(context + spaces + text) for text in request.continuations]
    return [(ids, whole[len(ids) :]) for whole in wholes]


def bos_of(tokenizer: Tokenizer, asked: str) -> list[int]:
    """What stands before every plain text: the begin token or nothing. "auto" does what the
    tokenizer's files tell transformers to do, and so lm-eval since 0.4.9.2."""

    def read(name: str) -> dict:
        path = tokenizer.path.with_name(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    config, processor = read("tokenizer_config.json"), read("tokenizer.json").get("post_processor")
    begin = config.get("bos_token")
    begin = begin["content"] if isinstance(begin, dict) else begin
    # A processor that puts a token first has it as the first part of a single text.
    single = re.search(r'"single": \[{"SpecialToken": {"id": "(.*?)"', json.dumps(processor))
    puts = config.get("add_bos_token", bool(single))
    if asked == "no" or (asked == "auto" and not puts):
        return []
    begin = begin or (json.loads(f'"{single[1]}"') if single else None)
    if begin not in tokenizer.special:
        folder = tokenizer.path.parent
        raise InputError(f"--bos {asked}: {folder} names no begin token that its tokenizer has")
    return [tokenizer.special[begin]]
