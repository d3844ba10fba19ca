"""The X-ray draws what the model gets: checked against the template, the Row and the losses."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext

import pytest
import torch

from nanomed import arguments, config
from nanomed.batches.packing import row_from
from nanomed.build import context
from nanomed.config import InputError
from nanomed.model.decoder import Aquila
from nanomed.records import chats_of
from nanomed.tools import show, show_html, show_text
from tests.conftest import ROOT
from tests.formats import gpt

CHATS = [
    {"messages": [{"role": "user", "content": "问<b>"}, {"role": "assistant", "content": "答"}]},
    {"conversations": gpt("一", "二", "三", "四"), "kind": "multi"},
    {"instruction": "问", "output": " "},
    {"prompt": "天是", "completion": "蓝的"},
]


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps(chat) for chat in CHATS), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(capsys, *argv: str) -> str:
    show.main(list(argv))
    return capsys.readouterr().out


def views_of(*argv: str, **own) -> list:
    given = {"n": 9, "step": None, "world_size": 1, "cr": False, **own}
    return show.draw(show.settings([argv[0]], [*argv[1:]]), show.argparse.Namespace(**given))


def learned(segment) -> str:
    return "".join(t.text for _, tokens in segment.turns for t in tokens if t.trained)


def test_turns_and_what_is_trained_in_them(file, capsys):
    """Each run can show exactly which text is supervised."""
    text = run(capsys, file, "-n", "4")
    assert "assistant        " in text and "⟦答<|im_end|>⟧⏎" in text
    assert text.count("⟦") == 1 + 1 + 2 + 1  # the legend, then one for each answer
    assert "⟦二<|im_end|>⟧" in text and "⟦四<|im_end|>⟧" in text and "chat multi" in text
    assert "record 3: DROPPED, empty answer" in text
    assert re.search(r"text +0-\d+ +天是\n +continuation +\d+-\d+ +⟦蓝的<\|endoftext\|>⟧", text)


def test_every_token_of_every_segment_is_drawn_once_and_in_place(file, encoder):
    flags = ("--val_fraction", "0", "--allow_drop", "0.5", "--batch_size", "3", "--seed", "1")
    (view,) = views_of(file, *flags, step=0)
    assert len(view.segments) == 3  # the dropped one is not in any row
    for segment in view.segments:
        tokens = [token for _, turn in segment.turns for token in turn]
        assert [token.position for token in tokens] == list(range(len(tokens)))
        number = int(re.search(r"record (\d)", segment.title)[1])
        (chat,) = chats_of(CHATS[number - 1])
        ids, trained, _ = encoder.chat(chat, 1024)
        assert [token.id for token in tokens] == ids
        assert [token.trained for token in tokens] == trained
        roles = [role for role, _ in segment.turns]
        wanted = [role for role, _ in chat.turns]
        assert roles == (["text", "continuation"] if chat.raw else ["system", *wanted])


def test_old_turns_that_were_cut_are_named_and_not_drawn(file):
    shown = views_of(file, n=2)[1]
    length = sum(len(turn) for _, turn in shown.segments[0].turns)
    cut = views_of(file, "--seq_len", str(length - 1), n=2)[1]
    assert "2 oldest turns cut" in cut.segments[0].title
    assert learned(shown.segments[0]).startswith("二") and learned(cut.segments[0])[0] == "四"


def test_rows_of_several_processes_share_the_step(file):
    flags = ("samples/sft.jsonl", "--batch_size", "8", "--micro_tokens", "1024")
    (alone,) = views_of(*flags, step=2)
    (half,) = views_of(*flags, step=2, world_size=2)
    titles = [{s.title.split(",")[0] for s in view.segments} for view in (alone, half)]
    assert titles[1] < titles[0] and len(titles[0]) == 8
    with pytest.raises(InputError, match=r"--step 99999: the run has steps 0 to"):
        views_of(*flags, step=99999)


@pytest.fixture
def run_folder(file, tmp_path, encoder):
    """What a run leaves behind for --init, and an untrained model that its weights shall be."""
    folder = tmp_path / "run"
    folder.mkdir()
    flags = ["--data", file, "--batch_size", "2", "--val_fraction", "0", "--seq_len", "200"]
    c = arguments.parse(config.SFT, [*flags, "--allow_drop", "0.5", "--out", str(folder)])
    shape = dict(n_layers=1, d_ff=64, vocab_size=encoder.tokenizer.vocab_size)
    model_config = dataclasses.replace(config.MODELS["tiny"], **shape)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(c)))
    (folder / "model.json").write_text(json.dumps(dataclasses.asdict(model_config)))
    shutil.copy(ROOT / "samples/tokenizer.model", folder)
    return folder, Aquila(model_config).eval()


def test_a_runs_own_settings_are_the_defaults(file, run_folder):
    c = show.settings([file], ["--init", str(run_folder[0]), "--seed", "3"])
    assert (c.batch_size, c.seq_len, c.val_fraction, c.seed) == (2, 200, 0.0, 3)
    assert c.lr == config.SFT.FRESH["lr"] and c.out == "" and c.data == [file]


def test_losses_stand_at_the_tokens_they_are_of(file, run_folder, encoder, monkeypatch):
    folder, model = run_folder
    monkeypatch.setattr(show, "start", lambda device: nullcontext(None))
    monkeypatch.setattr(show.stage, "build_model", lambda *_: model)
    (view,) = views_of(file, "--init", str(folder), "--batch_size", "1", step=0)
    (segment,) = view.segments
    tokens = [token for _, turn in segment.turns for token in turn]
    ids = [token.id for token in tokens]
    with torch.no_grad():
        logits = model(row_from([ids]), logits=True).log_softmax(1)
    assert any(token.trained for token in tokens)
    for t, token in enumerate(tokens):
        assert (token.loss is None) == (not token.trained)
        if token.trained:
            assert token.loss == pytest.approx(-logits[t - 1, ids[t]].item(), abs=1e-4)
    assert "mean loss" in segment.title


def test_the_page_is_whole_and_escapes_what_users_typed(file, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert run(capsys, file, "--html", str(out)) == f"wrote {out}\n"
    text = out.read_text(encoding="utf-8")
    typed = re.search("问.{0,60}&lt;.{0,60}b.{0,60}&gt;", re.sub("<.*?>", "", text))
    assert typed and "<script" not in text
    assert "http" not in text  # nothing is loaded from elsewhere
    for tag in ("div", "span", "ruby", "html", "h3"):
        opened, closed = len(re.findall(f"<{tag}[ >]", text)), text.count(f"</{tag}>")
        assert opened == closed, tag
    assert text.count("class='row'") == 3 and "DROPPED, empty answer" in text


def test_colours_show_the_loss():
    low, high = (show.Token("x", 1, 0, True, loss) for loss in (0.01, 9.0))
    rest = show.Token("x", 1, 0, False, None)
    view = show.RowView("r", [show.DrawnSegment("s", [("assistant", [low, high, rest])])])
    line = show_text.lines([view], colour=True)[-1]
    codes = [show_text.BY_LOSS[0][1], show_text.BY_LOSS[-1][1], show_text.PLAIN]
    assert [line.index(code) for code in codes] == sorted(line.index(code) for code in codes)
    page = show_html.page([view])
    assert "hsl(120 " in page and "hsl(0 " in page and "loss 9.0000" in page


# ---------------------------------------------------------------- pairs and documents


def write(path, *records: dict) -> str:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


PAIRS = [
    {"question": "问", "chosen": "好", "rejected": "坏", "system": "医", "why": "because"},
    {"prompt": "天是", "chosen": "蓝的", "rejected": "绿的"},
    {"question": "问", "chosen": "好", "rejected": ""},
]


def test_a_pair_is_drawn_as_two_chats_that_share_their_prompt(tmp_path, capsys, encoder):
    file = write(tmp_path / "pairs.jsonl", *PAIRS)
    views = views_of(file)
    assert views[2].title.endswith("record 3: DROPPED, empty answer") and not views[2].segments
    for view, record in zip(views, PAIRS[:2], strict=False):
        chosen, rejected = view.segments
        assert chosen.title.startswith("chosen") and rejected.title.startswith("rejected")
        assert [learned(s)[: len(record["chosen"])] for s in view.segments] == [
            record["chosen"],
            record["rejected"],
        ]
        prompts = [[t.id for _, turn in s.turns[:-1] for t in turn] for s in view.segments]
        assert prompts[0] == prompts[1]
    assert [role for role, _ in views[0].segments[0].turns] == ["system", "user", "assistant"]
    assert "why is not read" in views[0].segments[0].title
    assert "continued without a template" in views[1].segments[0].title
    page = tmp_path / "page.html"
    run(capsys, file, "--html", str(page))
    text = re.sub("<.*?>", "", page.read_text(encoding="utf-8"))
    assert "好" in text and "坏" in text and "Numbers below are losses" not in text


@pytest.mark.parametrize("name", ["dpo", "cpt_medical"])
def test_a_step_of_any_stage_is_drawn_as_the_loader_packs_it(name, encoder):
    file = f"samples/{name}.jsonl"
    c = show.settings([file], ["--batch_size", "4", "--val_fraction", "0.2"])
    rows = list(show.step_rows(c, encoder, 1, 1))
    for title, row, parts in rows:
        view = show.view(row, encoder, parts, None, title)
        tokens = [t for segment in view.segments for _, turn in segment.turns for t in turn]
        assert [t.id for t in tokens] == row.by_place(row.tokens).tolist()
        assert len(view.segments) == len(row.cu_seqlens) - 1
        starts = [segment.turns[0][1][0] for segment in view.segments]
        assert not any(t.trained or t.position for t in starts)  # nothing stands before them
    examples = {i for _, row, _ in rows for i in row.examples.tolist()}
    assert len(examples) == 4


def test_documents_are_drawn_whole(tmp_path, encoder):
    (tmp_path / "a.txt").write_text("糖尿病 diabetes\n痛风", encoding="utf-8")
    first, second = views_of(str(tmp_path / "a.txt"))
    (segment,) = first.segments
    ids = [*encoder.tokenizer.encode("糖尿病 diabetes"), encoder.document_end]
    assert [t.id for _, turn in segment.turns for t in turn] == ids
    assert [t.trained for _, turn in segment.turns for t in turn] == [False] + [True] * (
        len(ids) - 1
    )
    assert second.title.startswith(f"{tmp_path / 'a.txt'}, record 2")


def test_fields_of_other_names_are_drawn(tmp_path):
    file = write(tmp_path / "x.jsonl", {"q_text": "问", "a_text": "答"})
    (view,) = views_of(file, "--fields", "question=q_text", "answer=a_text", "--seed", "1")
    assert learned(view.segments[0]).startswith("答")


def test_a_dialogue_s_turns_have_their_context_relevance(tmp_path, encoder, capsys):
    from tests.build import scored

    roles = ("one", "two", "three", "four")
    data = scored.write(tmp_path / "chats.jsonl", [scored.chat(*roles), scored.chat("one", "two")])
    model = scored.folder_of(encoder, tmp_path / "model")
    dialogue, single = views_of(str(data), "--init", str(model), "--seq_len", "256", cr=True)
    found = dialogue.segments[0].relevance
    made = context.dialogue(chats_of(scored.chat(*roles))[0], encoder, 512)
    ((losses, *_),) = context.run(scored.tiny(encoder), [made])
    assert found == {3: found[4], 4: pytest.approx(context.relevance(losses)[0], abs=1e-5)}
    assert single.segments[0].relevance == {}
    shown = f"CR {found[4]:.2f}"
    page = show_html.page([dialogue])
    assert page.count(shown) == 2 and "hsl(" in page
    assert sum(shown in line for line in show_text.lines([dialogue], colour=False)) == 2
    coloured = "".join(show_text.lines([dialogue], colour=True))
    assert f"m{shown}\033[0m" in coloured
    with pytest.raises(InputError, match="--init"):
        views_of(str(data), cr=True)
