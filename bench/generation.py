"""Tokens per second of cached, batched, greedy generation beside transformers' generate().

    python -m bench.generation [--device cuda] [--rounds 7]

Same weights, same prompts of different lengths, same tokens out, in one process, turn by turn.
"""

import argparse
import tempfile

import torch

from bench.measure import interleaved, quartiles, ratio
from nanomed.hf import pretrained
from nanomed.model.generation import Sampling, generate

SHAPE = {
    "vocab_size": 20_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def write_model(folder: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(folder)


def transformers_model(folder: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def hide_our_kernels() -> None:
    """transformers looks for a published package of the name of our folder kernels/."""
    from transformers import utils

    utils.is_kernels_available = utils.import_utils.is_kernels_available = lambda *a, **k: False


def main() -> None:
    hide_our_kernels()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    c = parser.parse_args()
    device = torch.device(c.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        theirs = transformers_model(folder, dtype).to(device)
        ours = pretrained.load(folder, device, dtype)
    lengths = torch.randint(16, 129, (c.batch,)).tolist()
    prompts = [torch.randint(0, SHAPE["vocab_size"], (n,)).tolist() for n in lengths]

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
    works = {"nanomed": run_ours, "nanomed again": run_ours, "transformers": run_theirs}
    samples = interleaved(works, c.rounds, warmup=0, device=device, flush=False)
    print(f"answers equal: {same} of {c.batch} ({dtype})")
    for name, seconds in samples.items():
        print(f"{name}: median {c.batch * c.new / quartiles(seconds)[1]:,.0f} tokens/s")
    faster = ratio(samples["transformers"], samples["nanomed"], samples["nanomed again"])
    print(f"nanomed is faster by {faster} over {c.rounds} rounds")


if __name__ == "__main__":
    main()
