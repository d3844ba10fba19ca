"""Text from a model: a key/value cache, sampling, batches of prompts of different lengths."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomed.batches.packing import Row, row_from
from nanomed.config import InputError, check_limits
from nanomed.distributed import from_main_tensor
from nanomed.model.cache import Cache, LayerCache
from nanomed.model.decoder import Aquila


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
        check_limits(self, limits)


# How chats are answered: nanomed.tools.chat's default, and what an export tells servers.
CHAT = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.05)


def generate(
    model: Aquila,
    prompts: list[list[int]],
    stop: set[int],
    sampling: Sampling,
    first: int = 0,
    lockstep: bool = False,
) -> list[tuple[list[int], str]]:
    """(ids without the stop token, "stop" or "length") for each prompt, all in one batch. What
    comes out for a prompt depends on its number (first, first + 1, ...), not on its neighbours."""
    answers: list[list[int]] = [[] for _ in prompts]
    ends = ["length"] * len(prompts)
    for i, token, _ in stream(model, prompts, stop, sampling, first, lockstep):
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
    lockstep: bool = False,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (index of the prompt, its next token, the model's own logits[V] for it) as they come,
    stop tokens included. In lockstep rank 0 chooses for all ranks of a sharded model. Raises
    InputError for a prompt that leaves no room for an answer."""
    limits = limits_of(model, prompts, sampling)
    device = next(model.parameters()).device
    start = sampling.seed * 1_000_003 + first
    seeds = [(start + i) % 2**64 for i in range(len(prompts))]  # torch takes no larger ones
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    batch = list(range(len(prompts)))  # the prompts that have a place in the cache
    lengths = [len(prompt) for prompt in prompts]
    seen = _seen(prompts, model.config.vocab_size, device)
    cache = [LayerCache(len(prompts), max(limits)) for _ in model.layers]
    logits = _next(model, row_from(prompts).to(device), cache)  # [B,V]
    done = set()
    while True:
        tokens = choose(logits, seen, sampling, [generators[i] for i in batch])
        tokens = from_main_tensor(tokens) if lockstep else tokens
        for i, token, of_token in zip(batch, tokens.tolist(), logits, strict=True):
            if i not in done:
                yield i, token, of_token
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
        logits = _next(model, _one_each(tokens, positions), cache)


def _next(model: Aquila, row: Row, cache: list[Cache]) -> Tensor:
    """[n,V]: the logits of each segment's last token."""
    return model(row, logits=True, cache=cache, at=row.cu_seqlens[1:] - 1)


def limits_of(model: Aquila, prompts: list[list[int]], sampling: Sampling) -> list[int]:
    """The most tokens of each prompt with its answer."""
    most = model.config.max_seq_len
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < most:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens; the model reads 1 to {most - 1}, so that "
                "there is room for an answer"
            )
    return [min(most, len(prompt) + sampling.max_new) for prompt in prompts]


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
    """The most likely answer to each prompt, from a sharded model. A rank that stopped alone would
    hang the others, so all of them run the same batch. Rank 0 decides each token, because of two
    equally likely ones another GPU could take the other."""
    model.eval()
    answers = generate(model, prompts, stop, Sampling(max_new=max_new), lockstep=True)
    return [ids for ids, _ in answers]
