"""Small models and chats for the tests of what scores chats."""

import dataclasses
import json
from pathlib import Path

import torch

from nanomed import hf
from nanomed.config import ModelConfig
from nanomed.model.decoder import Aquila
from nanomed.text.template import Encoder


def tiny(encoder: Encoder, seed: int = 0) -> Aquila:
    """Random weights, large enough that its losses and logits are far from even."""
    config = ModelConfig(encoder.tokenizer.vocab_size, 2, 64, 2, 1, 96, 512, 1e6, 1e-5, True)
    torch.manual_seed(seed)
    model = Aquila(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" not in name:
                param.mul_(6 if "embed" in name or "lm_head" in name else 3)
    return model.eval()


def folder_of(encoder: Encoder, folder: Path, longest: int = 512) -> Path:
    model = tiny(encoder)
    model.config = dataclasses.replace(model.config, max_seq_len=longest)
    hf.export(model, encoder.tokenizer, folder, torch.float32, encoder.template)
    return folder


def chat(*texts: str, **more) -> dict:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return {"messages": turns, **more}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
