"""Chats scored per second, complexity and quality, beside Deita's way: one by one in transformers.

    python -m bench.selection MODEL [-n 24] [--turns 5]

Both sides ask the same prompts of the same model in float32 on a CPU. `released` is what Deita's
code does, `generate` of two tokens for each prompt; `forward` is the least that one by one can be,
a single forward. Sides take turns, and a ratio is of one turn.
"""

import argparse

import torch

from bench.measure import against_first, quartiles
from bench.theirs import transformers
from nanomed.build import deita, scores
from nanomed.distributed import World
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("-n", type=int, default=24, help="chats")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    c = parser.parse_args()
    _, encoder = pretrained.describe(c.model)
    found = [item.chat for item in scores.read(["samples/sft.jsonl"], [])]
    chats = [chat for chat in found if not chat.dropped][: c.n]
    asker = deita.Asker(encoder, pretrained.config_of(c.model).max_seq_len)
    prompts = [
        list(asker.encode(kind, *texts)[1].inputs[0])
        for chat in chats for texts in deita.exchanges(chat) for kind in deita.ASKED
    ]  # fmt: skip
    model = pretrained.load(c.model, torch.device("cpu"), torch.float32)
    pack_linears(model)
    scorer = Scorer(model, World(0, 1, torch.device("cpu")))
    measure = scores.Measure(scorer, encoder, "turn", ("digits",), 4096)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(c.model, dtype=torch.float32).eval()
    digits = torch.tensor(asker.digits)

    def ours() -> list[float]:
        return [v for line, _ in measure._measured(chats, asker) for t in line["rounds"] for v in t]

    @torch.no_grad()
    def forward() -> list[float]:
        logits = [theirs(torch.tensor([ids])).logits[0, -1, digits] for ids in prompts]
        return deita.expectation(torch.stack(logits)).tolist()

    def released() -> list[float]:
        how = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True}
        found = [theirs.generate(torch.tensor([ids]), do_sample=False, **how) for ids in prompts]
        return deita.expectation(torch.stack([one.scores[0][0, digits] for one in found])).tolist()

    sides = {"nanomed": ours, "released": released, "forward": forward}
    values = {name: side() for name, side in sides.items()}  # warm
    worst = max(
        abs(a - b) for other in ("released", "forward")
        for a, b in zip(values["nanomed"], values[other], strict=True)
    )  # fmt: skip
    print(f"{len(chats)} chats, {len(prompts)} prompts of {sum(map(len, prompts)):,} tokens, "
          f"{torch.get_num_threads()} threads; scores differ by at most {worst:.1e}")  # fmt: skip
    samples, faster = against_first(sides, c.turns, 0)
    for name, seconds in samples.items():
        print(f"{name}: median {len(chats) / quartiles(seconds)[1]:.2f} chats/s")
        if faster.get(name):
            print(f"nanomed is faster than {name} by {faster[name]} over {c.turns} turns")


if __name__ == "__main__":
    main()
