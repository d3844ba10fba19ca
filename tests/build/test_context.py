"""Context Relevance: the paper's formula, one row beside two forwards, and what it tells apart."""

from itertools import chain, pairwise

import pytest
import torch

from nanomed.build import context
from nanomed.model.scoring import in_order
from nanomed.records import Chat
from nanomed.text import template
from tests.build.scored import folder_of, tiny

CHATS = [
    Chat([("user", "头痛三天了。"), ("assistant", "量过体温吗？"), ("user", "三十八度。"),
          ("assistant", "请多喝水，必要时就医。"), ("user", "要吃药吗？"),
          ("assistant", "先不用。")]),
    Chat([("user", "What is gout?"), ("assistant", "A disease of the joints."),
          ("user", "And its cause?"), ("assistant", "Too much uric acid.")], system="Be brief."),
    Chat([("user", "发热怎么办？"), ("assistant", "多休息。")]),
]  # fmt: skip


def made(encoder, targets: str = "turn", longest: int = 512) -> list[context.Dialogue]:
    return [context.dialogue(chat, encoder, longest, targets) for chat in CHATS]


@torch.no_grad()
def loss_of(theirs, ids: list[int], targets: list[int]) -> float:
    """The mean loss of the tokens at these places of one sequence, run alone by transformers."""
    logps = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logps[t - 1, ids[t]].item() for t in targets) / len(targets)


@pytest.mark.parametrize("targets", context.TARGETS)
def test_a_packed_row_gives_what_two_forwards_give(encoder, targets, tmp_path):
    """Each term by transformers, from the chat's own ids: the whole dialogue, and the turn behind
    the header."""
    transformers = pytest.importorskip("transformers")
    folder = folder_of(encoder, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = context.run(tiny(encoder), made(encoder, targets))
    for chat, (losses, vector, own) in zip(CHATS, found, strict=True):
        ids, trained, _ = encoder.chat(chat, 512)
        borders = [n for _, n in encoder.borders(chat, 0)]
        starts = [sum(borders[:k]) for k in range(1, len(borders) + 1, 2)]  # of rounds, and the end
        assert len(losses) == len(starts) - 2
        for (a, b), (with_history, alone) in zip(pairwise(starts[1:]), losses, strict=True):
            mine = [t for t in range(a, b) if targets == "turn" or trained[t]]
            assert with_history == pytest.approx(loss_of(theirs, ids, mine), abs=1e-5)
            header, turn = ids[: borders[0]], ids[a:b]
            inside = [t - a + len(header) for t in mine]
            assert alone == pytest.approx(loss_of(theirs, header + turn, inside), abs=1e-5)
            assert context.relevance(losses)[0] == losses[0][0] / losses[0][1]
        answers = [t for t, learned in enumerate(trained) if learned]
        assert own == pytest.approx(loss_of(theirs, ids, answers), abs=1e-5)
        with torch.no_grad():
            states = theirs.model(torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(vector, states.mean(0), atol=1e-4)


def test_packing_changes_nothing(encoder):
    model = tiny(encoder)
    together = context.run(model, made(encoder))
    for one, (losses, vector, own) in zip(made(encoder), together, strict=True):
        ((alone, same, own_alone),) = context.run(model, [one])
        assert own == pytest.approx(own_alone, abs=1e-5)
        assert [*chain(*alone)] == pytest.approx([*chain(*losses)], abs=1e-5)
        assert torch.allclose(vector, same, atol=1e-5)


def test_a_template_without_a_system_text_still_has_something_before_each_turn(encoder):
    bare = template.Template(**vars(template.CHATML) | {"system": ""})
    one = context.dialogue(CHATS[0], template.Encoder(bare, encoder.tokenizer), 512)
    assert all(segment[0] == encoder.document_end for segment in one.segments)
    assert min(one.places) >= 1 and len(one.labels) == 2 * sum(one.sizes) + one.n_answers


def test_a_dialogue_that_is_too_long_loses_its_oldest_turns(encoder):
    whole = made(encoder)[0]
    one = context.dialogue(CHATS[0], encoder, len(whole.segments[0]) - 5)
    assert one.cut == 2 and len(one.sizes) == 1
    assert context.dialogue(CHATS[0], encoder, 12) is None


def test_what_is_certain_by_itself_is_not_divided_by():
    assert context.relevance([(1.0, 2.0), (0.5, 1e-4), (float("nan"), float("nan"))]) == [
        0.5, None, None
    ]  # fmt: skip


def test_rows_are_as_full_as_they_may_be(encoder):
    found = made(encoder) * 3
    rows = in_order([one.n_tokens for one in found], 200)
    assert [i for row in rows for i in row] == list(range(9))
    sizes = [sum(found[i].n_tokens for i in row) for row in rows]
    assert all(size <= 200 or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
