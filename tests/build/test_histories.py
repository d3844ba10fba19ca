"""What Context Relevance of a real model tells apart: own histories and others', repeated rounds.
`pytest -m slow -s` prints the figures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomed.build import context
from nanomed.hf import pretrained
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import in_order
from nanomed.records import Chat, chats_of, read_json, read_pairs
from tests.build import scored
from tests.build.real import real_model_folder
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def real_model() -> Path:
    return real_model_folder()


def relevances(folder: Path, chats: list[Chat], targets: str = "turn") -> np.ndarray:
    _, encoder = pretrained.describe(folder)
    model = pretrained.load(folder, CPU, torch.float32)
    pack_linears(model)
    found = [context.dialogue(chat, encoder, 4096, targets) for chat in chats]
    values = []
    for row in in_order([one.n_tokens for one in found], 2048):
        for losses, *_ in context.run(model, [found[i] for i in row]):
            values.append(np.mean(context.relevance(losses)))
    return np.array(values)


def short(turns: list[tuple[str, str]], most: int) -> Chat:
    """Two rounds, of each text `most` characters: 135 million parameters are slow on a CPU."""
    return Chat([(role, text[:most]) for role, text in turns[:4]])


def with_other_histories(chats: list[Chat]) -> list[Chat]:
    """Each second round behind the first one of another dialogue."""
    others = chats[len(chats) // 2 :] + chats[: len(chats) // 2]
    return [
        Chat([*other.turns[:2], *chat.turns[2:]]) for chat, other in zip(chats, others, strict=True)
    ]


def auc(real: np.ndarray, others: np.ndarray) -> float:
    return float((others > real[:, None]).mean() + (others == real[:, None]).mean() / 2)


def histories_told_apart(name: str, folder: Path, chats: list[Chat]) -> float:
    """The AUC. Shown beside it: where it lies in 95 of 100 draws of as many dialogues."""
    real, others = relevances(folder, chats), relevances(folder, with_other_histories(chats))
    rng = np.random.default_rng(0)
    draws = rng.integers(len(chats), size=(2000, len(chats)))
    low, high = np.quantile([auc(real[i], others[i]) for i in draws], (0.025, 0.975))
    found = auc(real, others)
    print(f"\n{name}, {len(chats)} dialogues: AUC {found:.3f} ({low:.3f} to {high:.3f}), medians "
          f"{np.median(real):.3f} and {np.median(others):.3f}")  # fmt: skip
    return found


def test_a_real_model_knows_whose_history_it_is(real_model, shared_data):
    chats = []
    for _, pair, _ in read_pairs(str(shared_data / "general/lf_dpo_en_demo.json")):
        if [role for role, _ in pair.turns[:3]] == ["user", "assistant", "user"]:
            chats.append(short([*pair.turns, ("assistant", pair.chosen)], 200))
    assert histories_told_apart("English", real_model, chats[:24]) > 0.8


def test_so_does_one_that_was_trained_on_the_other_half_of_cmtmedqa(
    real_model, shared_data, tmp_path
):
    """Fine-tuned on 48 of one half's 250 dialogues, asked about 60 of the other's: some ten minutes
    of one core. An English model reads Chinese byte by byte, and has learned to look back."""
    records = [r for _, r, _ in read_json(str(shared_data / "cmtmedqa_multi_turn.json"))]
    records = [r for r in records if r.get("history") and "instruction" in r]
    assert len(records) == 500
    learn, test = ([short(chats_of(r)[0].turns, 60) for r in half]
                   for half in (records[::2][:48], records[1::2][:60]))  # fmt: skip
    assert histories_told_apart("CMtMedQA, as it is", real_model, test) > 0.8
    tuned = fine_tuned(real_model, learn, tmp_path)
    assert histories_told_apart("CMtMedQA, fine-tuned", tuned, test) > 0.8


def fine_tuned(folder: Path, chats: list[Chat], home: Path) -> Path:
    """The run folder of 24 steps on these dialogues."""
    data = scored.write(
        home / "half.jsonl", [scored.chat(*(t for _, t in chat.turns)) for chat in chats]
    )
    flags = "--epochs 1 --batch_size 2 --seq_len 1024 --lr 5e-5 --warmup_ratio 0.1 --val_fraction 0"
    command = [sys.executable, str(ROOT / "train_sft.py"), "--init", str(folder)]
    command += ["--data", str(data), "--out", str(home / "run"), "--device", "cpu", *flags.split()]
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    return home / "run"


def test_a_turn_that_repeats_is_near_0(real_model):
    texts = [
        "My knee hurts when I climb stairs. What could it be?",
        "It may be wear of the cartilage behind the kneecap, which stairs strain.",
        "How is a urinary tract infection found out?",
        "A urine sample is tested for white cells and nitrite, then cultured.",
    ]
    roles = ["user", "assistant"] * 2
    said = [Chat([*zip(roles, parts, strict=True)]) for parts in (texts[:2] * 2, texts)]
    repeated, unrelated = relevances(real_model, said)
    print(f"\nrepeated {repeated:.3f}, unrelated {unrelated:.3f}")
    assert repeated < 0.25 and unrelated > 0.8
