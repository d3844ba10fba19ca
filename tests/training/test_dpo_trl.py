"""DPO against TRL's own trainer."""

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from nanomed import hf
from nanomed.batches.packing import row_from
from nanomed.config import MODELS
from nanomed.model.decoder import Aquila
from nanomed.text import tokenizer
from tests.conftest import ROOT
from tests.training.test_dpo import C, PairData, loss_of, random_reference
from tests.training.test_exactness import assert_same_gradients


def test_equals_trl(small, tmp_path, monkeypatch):
    """TRL 1.16's own trainer on the same ids and weights, padded where we pack: the loss to 1e-5,
    gradients to 1e-5 of their norm, and the metrics."""
    trl = pytest.importorskip("trl")
    ours = Aquila(small)
    theirs = _theirs(small, ours, tmp_path)
    data, reference = PairData(8), random_reference(8)
    trainer = _trl_trainer(trl, theirs, tmp_path, monkeypatch)
    batch = _padded(data, reference, range(8))
    loss = trainer._compute_loss(theirs, batch, return_outputs=False)
    loss.backward()

    row = row_from(*zip(*[(*s, i) for i in range(8) for s in data[i]], strict=True))
    total, metrics = loss_of(reference, C)(ours(row), row)
    (total / 8).backward()
    assert (total / 8).item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients([p.grad for p in ours.parameters()], _gradients(theirs, ours))
    logged = trainer._metrics["train"]
    for name in ("chosen", "rejected", "margins", "accuracies"):
        value = (metrics[f"rewards/{name}"] / 8).item()
        assert value == pytest.approx(logged[f"rewards/{name}"][0], rel=1e-4, abs=1e-6), name


def test_the_sft_term_equals_trls(small, tmp_path, monkeypatch):
    """--sft_weight is TRL's loss types sigmoid and sft, weighted. TRL's takes the mean of a batch's
    chosen tokens and ours of each pair's, so TRL gets one pair at a time; ours all eight, as one
    row and as several."""
    trl = pytest.importorskip("trl")
    ours = Aquila(small)
    theirs = _theirs(small, ours, tmp_path)
    weighted = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    trainer = _trl_trainer(trl, theirs, tmp_path, monkeypatch, **weighted)
    data, reference = PairData(8), random_reference(8)
    losses = [trainer._compute_loss(theirs, _padded(data, reference, [i]), False) for i in range(8)]
    torch.stack(losses).mean().backward()
    wanted = _gradients(theirs, ours)

    for rows in ([range(8)], [[5, 0], [3], [1, 7, 2], [6, 4]]):
        ours.zero_grad()
        total = 0.0
        for pairs in rows:
            row = row_from(*zip(*[(*s, i) for i in pairs for s in data[i]], strict=True))
            part, _ = loss_of(reference, dataclasses.replace(C, sft_weight=0.7))(ours(row), row)
            (part / 8).backward()
            total += part.item() / 8
        assert total == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert_same_gradients([p.grad for p in ours.parameters()], wanted)


def _theirs(small, ours, folder):
    """transformers' model with our weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=small.vocab_size,
        hidden_size=small.d_model,
        intermediate_size=small.d_ff,
        num_hidden_layers=small.n_layers,
        num_attention_heads=small.n_heads,
        num_key_value_heads=small.n_kv_heads,
        rms_norm_eps=small.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": small.rope_theta},
        tie_word_embeddings=False,
    )
    theirs = Qwen2ForCausalLM(config)
    theirs.load_state_dict({_name_of(n): p for n, p in ours.named_parameters()})
    theirs.save_pretrained(folder / "m")  # TRL's reference is read from there
    return Qwen2ForCausalLM.from_pretrained(folder / "m", dtype=torch.float32)


def _name_of(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _gradients(theirs, ours) -> list[Tensor]:
    """In the order of our parameters."""
    grads = dict(theirs.named_parameters())
    return [grads[_name_of(n)].grad for n, _ in ours.named_parameters()]


def _trl_trainer(trl, model, folder, monkeypatch, **given):
    """A trainer of theirs, built the usual way on a pair of words; our batch replaces its own."""
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(folder),
        beta=C.beta,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        precompute_ref_log_probs=False,
        report_to=[],
        per_device_train_batch_size=8,
        **given,
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = trl.DPOTrainer(
        model, args=arguments, train_dataset=rows, processing_class=plain_export(folder / "t")
    )
    monkeypatch.setattr(trainer, "precompute_ref_logps", True)  # we give them, as a batch would
    model.train()
    return trainer


def _padded(data: PairData, reference: Tensor, pairs: Iterable[int]) -> dict[str, Tensor]:
    """All chosen answers, then all rejected ones, padded on the right."""
    segments = [data[i][side] for side in (0, 1) for i in pairs]
    longest = max(len(ids) for ids, *_ in segments)
    shape = (len(segments), longest)
    ids, mask, learned = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for k, (tokens, trained, _) in enumerate(segments):
        ids[k, : len(tokens)] = torch.from_numpy(tokens)
        mask[k, : len(tokens)] = 1
        learned[k, : len(tokens)] = torch.from_numpy(trained).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": learned,
        "ref_chosen_logps": reference[list(pairs), 0],
        "ref_rejected_logps": reference[list(pairs), 1],
    }


def plain_export(folder):
    """The sample tokenizer as transformers reads it, from an export of a model that is not used."""
    tok = tokenizer.load(ROOT / "samples/tokenizer.model")
    config = dataclasses.replace(MODELS["tiny"], n_layers=1, d_model=64, n_heads=1,
                                 n_kv_heads=1, d_ff=64)  # fmt: skip
    hf.export(Aquila(config), tok, folder)
    return AutoTokenizer.from_pretrained(folder)
