"""Tokens per second of cached, batched, greedy generation beside transformers' generate().

    python -m bench.generation [--device cuda] [--rounds 7]

Same weights, same prompts of different lengths, same tokens out, in one process, turn by turn.
"""

import argparse

import torch

from bench.measure import against_first, quartiles
from bench.theirs import prepare, qwen2
from nanomed.config import ModelConfig
from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, generate

CONFIG = ModelConfig(20_000, 8, 512, 8, 2, 1408, 2048, 1e6, 1e-6, True)


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    c = parser.parse_args()
    device = torch.device(c.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    ours = Aquila(CONFIG)
    theirs = qwen2(CONFIG, ours, device).to(dtype).eval()
    ours = ours.to(device, dtype).eval()
    lengths = torch.randint(16, 129, (c.batch,)).tolist()
    prompts = [torch.randint(0, CONFIG.vocab_size, (n,)).tolist() for n in lengths]

    def run_ours() -> list[list[int]]:
        return [ids for ids, _ in generate(ours, prompts, set(), Sampling(max_new=c.new))]

    def run_theirs() -> list[list[int]]:
        longest = max(lengths)
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
        out = theirs.generate(
            padded, attention_mask=mask, max_new_tokens=c.new, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return out[:, longest:].tolist()

    same = sum(a == b for a, b in zip(run_ours(), run_theirs(), strict=True))  # also the warm-up
    works = {"nanomed": run_ours, "transformers": run_theirs}
    samples, faster = against_first(works, c.rounds, 0, device, flush=False)
    print(f"answers equal: {same} of {c.batch} ({dtype})")
    for name, seconds in samples.items():
        print(f"{name}: median {c.batch * c.new / quartiles(seconds)[1]:,.0f} tokens/s")
    print(f"nanomed is faster by {faster['transformers']} over {c.rounds} rounds")


if __name__ == "__main__":
    main()
