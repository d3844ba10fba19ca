"""A real pretrained model: what tiny random ones do not show. `pytest -m slow` with transformers,
accelerate and gguf; the folder is NANOMED_REAL_MODEL's, else it is made once by docs/real_model.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from nanomed import hf, store
from nanomed.batches.loader import Loader
from nanomed.batches.packing import row_from
from nanomed.config import SFT
from nanomed.hf import pretrained
from nanomed.model.generation import Sampling, generate
from nanomed.records import Chat
from nanomed.training.dropout import dropout_cost
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
QUESTIONS = (
    "What is diabetes?", "Name three symptoms of pneumonia.", "Is a fever dangerous in a child?",
    "How does aspirin work?", "What does a high white cell count mean?", "Write a haiku on sleep.",
    "What is 17 + 25?", "Why is the sky blue?", "Explain hypertension to a child.",
    "Who was Galen?",
    "List the bones of the hand.", "How much water should I drink?", "What is an ECG?",
    "Can antibiotics treat a cold?", "What causes migraine?", "How is malaria spread?",
    "What are the side effects of statins?", "Translate 'heart' into French.", "What is a vaccine?",
    "\nMy head hurts.\n\nWhat should I do?",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder() -> Path:
    if named := os.environ.get("NANOMED_REAL_MODEL"):
        return Path(named)
    for package in ("transformers", "accelerate", "gguf"):
        pytest.importorskip(package, reason=f"the real model is made with {package}")
    made = Path.home() / ".cache/nanomed/smollm2-135m"
    if not (made / "tokenizer_config.json").exists():  # what is written last
        shutil.rmtree(made, ignore_errors=True)
        command = [sys.executable, str(ROOT / "docs/real_model.py"), "model", str(made)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            pytest.skip(f"the real model could not be made: {run.stderr[-300:]}")
    return made


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder(folder):
    return pretrained.describe(folder)[1]


@pytest.fixture(scope="module")
def segments(encoder) -> list[tuple[list[int], list[bool]]]:
    """English chats of the sample world, as SFT packs them."""
    lines = (ROOT / "samples/sft.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["messages"] for line in lines if line.isascii()][:12]
    chats = [Chat([(turn["role"], turn["content"]) for turn in turns]) for turns in records]
    return [encoder.chat(chat, 512)[:2] for chat in chats]


def test_logits_of_a_packed_row(folder, theirs, segments):
    """As near to float64's as transformers' are in float32: of logits up to 39, 1e-4 off."""
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    row = row_from([ids for ids, _ in segments])
    with torch.no_grad():
        packed = pretrained.load(folder)(row, logits=True).split(row.cu_seqlens.diff().tolist())
        for ours, (ids, _) in zip(packed, segments, strict=True):
            one = torch.tensor([ids])
            wanted, rounded = exact(one).logits[0], theirs(one).logits[0]
            assert (ours - wanted).norm() < 1.5 * (rounded - wanted).norm()  # measured: up to 1.2
            assert (ours - wanted).abs().max() < 2 * (rounded - wanted).abs().max()


def test_its_template_and_twenty_greedy_answers(folder, theirs, encoder):
    from transformers import AutoTokenizer

    tok, ours = AutoTokenizer.from_pretrained(folder), pretrained.load(folder)
    assert "SmolLM" in encoder.template.system
    stop = [encoder.turn_end, encoder.document_end]
    for question in QUESTIONS:
        prompt = encoder.prompt(Chat([("user", question)]))
        messages = [{"role": "user", "content": question}]
        rendered = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt == rendered
        ids = torch.tensor([prompt])
        new = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=stop, pad_token_id=stop[1],
        )[0, len(prompt) :].tolist()  # fmt: skip
        answer, end = generate(ours, [prompt], set(stop), Sampling(max_new=24))[0]
        assert answer == new[: -1 if end == "stop" else None], question


def test_an_export_is_the_same_model_elsewhere(folder, theirs, encoder, segments, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = pretrained.load(folder)
    hf.export(ours, encoder.tokenizer, tmp_path / "out", torch.float32, encoder.template)
    again, tok = pretrained.describe(tmp_path / "out")
    assert again == ours.config and tok.template == encoder.template
    back = pretrained.load(tmp_path / "out")
    assert all(map(torch.equal, back.parameters(), ours.parameters()))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([segments[0][0]])
    with torch.no_grad():
        assert torch.equal(other(ids).logits, theirs(ids).logits)
    elsewhere, first = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", folder))
    for question in QUESTIONS:
        assert elsewhere.encode(question) == first.encode(question)


def test_the_gradients_of_an_sft_step(folder, segments):
    """Norm-wise for each tensor: a packed row in float32 against chats alone in float64. The loss
    is made of their logits: the gradients of the one that they return are 2.6e-4 off. Tied in
    theirs, two tensors in ours: the gradient of the one is the sum."""
    from transformers import AutoModelForCausalLM

    ours = pretrained.load(folder)
    row = row_from(*zip(*segments, strict=True))
    n = (row.labels >= 0).sum()
    (ours(row).nll.sum() / n).backward()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    theirs.model.embed_tokens.padding_idx = None  # it would never learn <|im_end|>'s embedding
    for ids, trained in segments:
        logits, learned = theirs(torch.tensor([ids])).logits[0, :-1], torch.tensor(trained)[1:]
        labels = torch.tensor(ids)[1:][learned]
        (F.cross_entropy(logits[learned], labels, reduction="sum") / n).backward()
    wanted = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    grads = {name: p.grad for name, p in ours.named_parameters()}
    grads["embed_tokens.weight"] += grads.pop("lm_head.weight")
    assert grads.keys() == wanted.keys()
    assert max((grads[k] - wanted[k]).norm() / wanted[k].norm() for k in wanted) < 5e-5


def test_dropout_on_its_branches_is_not_noise(folder, encoder, world):
    """faults 39: from 3 to about 6 nats; that is why the recipe does without."""
    data = store.chats([str(ROOT / "samples/sft.jsonl")], encoder, 512, 0.05)
    c = SFT(dropout=0.1, batch_size=8, seq_len=512, micro_tokens=512, val_fraction=0.0)
    loader = Loader(c, data, 0, 1)
    model = pretrained.load(folder)
    assert SFT().dropout == 0.0
    for layer in model.layers:
        layer.dropout.p = 0.1
    dropped, whole = dropout_cost(model, loader)
    assert dropped > 1.5 * whole
