"""Context Relevance: does a round of a dialogue follow from what was said before? (Aquila-Med, 2.2)

    CR = L(t|H) / L(t)

L(t|H) is the mean negative log-likelihood of the round's tokens after the history H, L(t) that of
the same tokens without it. Above 1 the history only hurts: the rounds do not belong together. Near
0 it says all: the round repeats it. The first round has no history and is left out.

One row gives both. Its first segment is the whole dialogue, each further one a round behind the
same header (S system, 1 2 3 rounds), and segments do not see one another:

    S 1 1 1 2 2 2 3 3     S 2 2 2     S 3 3
            ^^^^^ ^^^       ^^^^^       ^^^
            L(2|H) L(3|H)   L(2)        L(3)

Both use the same ids, since each turn is tokenised once. The row's first segment gives two things
more: the mean loss of all answers, each after what precedes it (a model that knows the subject is
surprised by a wrong one), and the dialogue's embedding, the mean of its tokens' last hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanomed.batches.packing import row_from
from nanomed.build.deita import rounds
from nanomed.model.decoder import Aquila
from nanomed.records import Chat
from nanomed.text.template import Encoder

TARGETS = ("turn", "assistant")  # all of a round's tokens, or those of its answers alone
LEAST = 1e-3  # nats: a loss without history that is below it is not divided by


@dataclass(frozen=True)
class Dialogue:
    """What is run and read of a chat."""

    segments: list[list[int]]  # the whole dialogue, then each round but the first
    places: list[int]  # whose next tokens are asked for, counted through all segments
    labels: list[int]  # those tokens
    sizes: list[int]  # of each round: how many, first after its history, then without it
    n_answers: int  # the last of the places are those of all answers
    cut: int  # oldest turns that did not fit

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.segments))


class Measured(NamedTuple):
    losses: list[list[float]]  # [L(t|H), L(t)] of each round but the first, in nats per token; NaN
    # where a round has no token that counts
    vector: Tensor  # [D] float32, the embedding
    answer_loss: float  # nats per token of all answers; NaN if there is none


def dialogue(chat: Chat, encoder: Encoder, longest: int, targets: str = "turn") -> Dialogue | None:
    """None if not even the last question and answer fit `longest` tokens."""
    ids, wanted, cut = encoder.chat(chat, longest - 1)
    if not ids:
        return None
    return laid_out(ids, wanted, encoder.borders(chat, cut), encoder, targets, cut)


def laid_out(
    ids: list[int],
    wanted: list[bool],
    borders: Sequence[tuple[str, int]],
    encoder: Encoder,
    targets: str = "turn",
    cut: int = 0,
) -> Dialogue:
    """Of a chat's ids, whether each is learned, and (role, tokens) of each of its turns."""
    n_system = borders[0][1] if borders[0][0] == "system" else 0
    header, turns = ids[:n_system], borders[1 if n_system else 0 :]
    if not header:  # a round's first token must have something before it
        header, ids, wanted = [encoder.document_end], [encoder.document_end, *ids], [False, *wanted]
    at = [len(header)]
    for _, n in turns:
        at.append(at[-1] + n)
    segments, places, labels, sizes = [ids], [], [], []
    for part in rounds(turns)[1:]:
        a, b = at[part.start], at[part.stop]
        mine = [t for t in range(a, b) if targets == "turn" or wanted[t]]
        start = sum(map(len, segments)) + len(header) - a
        places += [t - 1 for t in mine] + [start + t - 1 for t in mine]
        labels += [ids[t] for t in mine] * 2
        sizes.append(len(mine))
        segments.append([*header, *ids[a:b]])
    answers = [t for t, learned in enumerate(wanted) if learned]
    places += [t - 1 for t in answers]
    labels += [ids[t] for t in answers]
    return Dialogue(segments, places, labels, sizes, len(answers), cut)


@torch.no_grad()
def run(model: Aquila, found: Sequence[Dialogue]) -> list[Measured]:
    """Of each dialogue of a row."""
    segments = [ids for one in found for ids in one.segments]
    starts = [0]
    for one in found:
        starts.append(starts[-1] + one.n_tokens)
    places = [s + p for s, one in zip(starts, found, strict=False) for p in one.places]
    device, states = next(model.parameters()).device, []
    labels = torch.tensor([label for one in found for label in one.labels] or [-100])
    row = replace(row_from(segments), labels=labels, scored=None)
    hook = model.layers[-1].register_forward_hook(lambda layer, x, y: states.append(model.norm(y)))
    try:
        nll = model(row.to(device), at=torch.tensor(places or [0], device=device)).nll.double()
    finally:
        hook.remove()
    means, results, k = nll.cpu(), [], 0
    for start, one in zip(starts, found, strict=False):
        losses = []
        for n in one.sizes:
            parts = means[k : k + 2 * n].view(2, n) if n else torch.full((2, 1), torch.nan)
            losses.append(parts.mean(1).tolist())
            k += 2 * n
        answers = means[k : k + one.n_answers]
        k += one.n_answers
        vector = states[0][start : start + len(one.segments[0])].float().mean(0).cpu()
        results.append(Measured(losses, vector, answers.mean().item()))
    return results


def relevance(losses: Sequence[Sequence[float]]) -> list[float | None]:
    """The CR of each round; None where it is not defined."""
    return [with_it / alone if alone >= LEAST else None for with_it, alone in losses]
