import dataclasses

import pytest
import torch
import transformers

import kernels
from nanomed.batches.packing import row_from
from nanomed.config import MODELS
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.recompute import set_recompute

LENGTHS = [1, 17, 64, 3, 40]


@pytest.fixture(scope="module")
def model(small) -> Aquila:
    """With weights large enough that attention and positions matter."""
    model = Aquila(small)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def segments(small) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(small.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def nll_and_gradients(model: Aquila, segments: list[list[int]], only: int):
    """Of segment `only`, in a row of all `segments`."""
    row = row_from(segments)
    start, end = row.cu_seqlens[only : only + 2].tolist()
    model.zero_grad()
    nll = model(row).nll[start:end]
    nll.sum().backward()
    return [nll.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_packed_equals_alone(model: Aquila, segments: list[list[int]]):
    """1e-5 * max(1, |x|) on log-probabilities, norm-wise on each gradient,
    because single elements near zero have no relative accuracy."""
    for i, segment in enumerate(segments):
        packed = nll_and_gradients(model, segments, i)
        alone = nll_and_gradients(model, [segment], 0)
        assert ((packed[0] - alone[0]).abs() <= 1e-5 * alone[0].abs().clamp(min=1)).all()
        for a, b in zip(packed[1:], alone[1:], strict=True):
            assert (a - b).norm() <= 1e-5 * max(1, b.norm())


def test_packed_equals_alone(model, segments):
    """No segment sees its neighbours, and its positions begin at 0."""
    assert_packed_equals_alone(model, segments)


def test_a_planted_position_bug_is_seen(model, segments, monkeypatch):
    """Positions that run on through the row. RoPE is relative, so that alone changes nothing but
    rounding; what would be seen is a position that is wrong inside a segment."""

    def rope(q, k, positions, *turning, original=kernels.rope):
        return original(q, k, positions + (positions > 20) * (len(q) > 64), *turning)

    monkeypatch.setattr(kernels, "rope", rope)
    with pytest.raises(AssertionError):
        assert_packed_equals_alone(model, segments)


def test_a_planted_mask_bug_is_seen(model, segments, monkeypatch):
    """One causal mask over the whole row: neighbours leak."""

    def attention(q, k, v, cu_seqlens, max_seqlen, original=kernels.attention):
        return original(q, k, v, cu_seqlens[[0, -1]], len(q))

    monkeypatch.setattr(kernels, "attention", attention)
    with pytest.raises(AssertionError):
        assert_packed_equals_alone(model, segments)


def test_changing_a_segment_changes_no_other_number(model, segments):
    row = row_from(segments)
    changed = [list(s) for s in segments]
    changed[2] = [(i + 1) % 97 for i in changed[2]]
    with torch.no_grad():
        before, after = model(row).nll, model(row_from(changed)).nll
    start, end = row.cu_seqlens[2:4].tolist()
    others = [*range(start), *range(end, len(before))]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[start:end], after[start:end])


@pytest.mark.parametrize("name", ["Qwen2", "Llama"])
def test_equals_transformers(model, small, segments, name):
    """The same weights in an implementation that is not ours: logits within 1e-4."""
    shared = dict(
        vocab_size=small.vocab_size,
        hidden_size=small.d_model,
        intermediate_size=small.d_ff,
        num_hidden_layers=small.n_layers,
        num_attention_heads=small.n_heads,
        num_key_value_heads=small.n_kv_heads,
        max_position_embeddings=small.max_seq_len,
        rms_norm_eps=small.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": small.rope_theta},
        tie_word_embeddings=False,
    )
    extra = {"attention_bias": True} if name == "Llama" else {}
    config = getattr(transformers, f"{name}Config")(**shared, **extra)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    weights = {
        (n if n.startswith("lm_head") else f"model.{n}"): p for n, p in model.named_parameters()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("o_proj.bias" in n for n in missing)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if n in missing:
                p.zero_()
        for segment in segments:
            ours = model(row_from([segment]), logits=True)
            assert (ours - theirs(torch.tensor([segment])).logits[0]).abs().max() < 1e-4


def test_scores_are_the_logits_own(model, segments):
    row = row_from(segments)
    with torch.no_grad():
        logits = model(row, logits=True).double()
        learned = row.labels >= 0
        labels = torch.where(learned, logits.argmax(-1), -100)
        labels[:5] = row.labels[:5]
        row = dataclasses.replace(row, labels=labels, scored=None)
        picked = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        scores = model(row)
        assert (scores.nll - picked * learned).abs().max() < 1e-5
        assert (scores.lse - logits.logsumexp(-1) * learned).abs().max() < 1e-5
        assert torch.equal(scores.right, logits.argmax(-1) == labels) and scores.right.any()


def test_recompute_changes_no_gradient(model, segments):
    """With dropout, too: the second forward draws the same masks."""
    results = []
    for policy in ("none", "full"):
        copy = Aquila(model.config, dropout=0.3)
        set_recompute(copy, policy)
        copy.load_state_dict(model.state_dict())
        torch.manual_seed(5)
        copy(row_from(segments)).nll.sum().backward()
        results.append([p.grad for p in copy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_only_in_training(model, segments):
    copy = Aquila(model.config, dropout=0.3)
    copy.load_state_dict(model.state_dict())
    row = row_from(segments)
    with torch.no_grad():
        assert torch.equal(copy.eval()(row).nll, model(row).nll)
        assert not torch.equal(copy.train()(row).nll, model(row).nll)


def test_initial_weights_depend_on_the_seed_alone(small):
    first, again, other = Aquila(small), Aquila(small), Aquila(small)
    init_weights(other, seed=1)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert abs(first.lm_head.weight.std() - 0.02) < 0.001


def test_parameter_counts_of_the_real_models():
    """Counted on the meta device, where nothing is allocated; the published sizes."""
    counts = {}
    for name, config in MODELS.items():
        with torch.device("meta"):
            params = dict(Aquila(config).named_parameters())
        counts[name] = sum(p.numel() for p in params.values())
        assert counts[name] == config.n_params()
    assert counts["aquilamed-7b"] == 8_223_748_096 and len(params) == 387  # the last one
    assert counts["aquila-7b"] == 7_295_537_152
