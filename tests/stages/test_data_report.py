"""What somebody is told of the data before a run: on the screen, and in data_report.json."""

import json

import pytest

from nanomed import store
from nanomed.batches.loader import Loader, split_remark
from nanomed.config import MODELS, SFT
from nanomed.records import chats_of, pair_of
from nanomed.stages import data_report
from nanomed.stages.stage import identity
from nanomed.store import group_key
from tests.data import ListData


def chat(i: int, *roles: str) -> dict:
    """Each with questions of its own."""
    return {"conversations": [{"from": role, "value": f"{role} {i} {n}"}
                              for n, role in enumerate(roles)]}  # fmt: skip


def told(path, encoder, records: list[dict], **changes) -> tuple[list[str], dict]:
    """(the lines, data_report.json) of a run on one file."""
    encoding = changes.pop("encoding", "utf-8")
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding)
    c = SFT(data=[str(path)], seq_len=64, **changes)
    loader = Loader(c, store.chats(c.data, encoder, c.seq_len, 1.0), 0, 1)
    report = data_report.report(loader)
    return data_report.lines(c, loader, report), report


def test_a_field_that_is_not_read_is_said_once_and_counted(tmp_path, encoder):
    """Of each file, with its records; labels, numbers and dates are not."""
    known = {"id": "a", "source": "b", "seen": "2026-11-26", "score": 3}
    records = [{"question": f"q {i}", "answer": "a", "remark": "why"} | known for i in range(40)]
    records += [{"question": "q", "answer": "a", "remark": ""}, {"question": "r", "answer": "a"}]
    path = tmp_path / "x.jsonl"
    lines, report = told(path, encoder, records)
    assert [line for line in lines if "not read" in line] == [
        f"field 'remark' of {path} is not read: 40 records"
    ]
    assert report["files"][str(path)]["unread"] == {"remark": 40}


@pytest.mark.parametrize("n_swapped, is_said", [(21, True), (20, False)])
def test_roles_that_look_swapped_are_said(tmp_path, encoder, n_swapped, is_said):
    """In more than half of 40 chats."""
    records = [chat(i, "gpt", "human", "gpt") for i in range(n_swapped)]
    records += [chat(i, "human", "gpt") for i in range(n_swapped, 40)]
    lines, _ = told(tmp_path / "x.jsonl", encoder, records)
    said = [line for line in lines if "the first turn is the assistant's" in line]
    assert len(said) == is_said
    if is_said:
        assert said[0].startswith("warning: in 21 of 40 chats")
        assert "--fields user=gpt assistant=human" in said[0]


def test_gb18030_is_said(tmp_path, encoder):
    records = [
        {"question": f"高血压的病人要注意什么？{i}", "answer": "要少吃盐。"} for i in range(40)
    ]
    lines, report = told(tmp_path / "x.jsonl", encoder, records, encoding="gb18030")
    assert report["files"][str(tmp_path / "x.jsonl")]["encoding"] == "gb18030"
    assert any("read as GB18030" in line for line in lines)
    assert not any("GB18030" in line for line in told(tmp_path / "y.jsonl", encoder, records)[0])


def test_a_held_out_share_that_is_far_off_is_said():
    data = ListData.of_lengths([5] * 100)
    for n_held_out, is_said in ((6, True), (7, False), (10, False), (15, False), (16, True)):
        found = split_remark("examples", data, n_held_out, 0.1)
        assert len(found) == is_said, n_held_out
    said = "warning: of 100 examples 10 were to be held out, and 16 are: a hash of each one decides"
    assert len(found) == 1 and found[0].startswith(said)


def test_the_largest_group_is_named(tmp_path, encoder):
    """All but a few chats are of one group, wherever the split puts it."""
    records = [{"question": f"q {i}", "answer": "a", "group": 7} for i in range(90)]
    records += [{"question": f"r {i}", "answer": "a"} for i in range(10)]
    path = tmp_path / "x.jsonl"
    lines, _ = told(path, encoder, records, val_fraction=0.5)
    (said,) = [line for line in lines if "were to be held out" in line]
    assert f"group has 90 of them, the first in {path}, record 1" in said


def test_held_out_questions_that_are_trained_on_are_said(tmp_path, encoder):
    """Of files that are held out whole nothing else keeps them apart."""
    files = [tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"]
    for path, asked in zip(files, (range(10), (3, 4, 11)), strict=True):
        path.write_text("\n".join(json.dumps(chat(i, "human", "gpt")) for i in asked))
    c = SFT(data=[str(files[0])], val_data=[str(files[1])], seq_len=64)
    loader = Loader(c, store.chats([*c.data, *c.val_data], encoder, c.seq_len, 0.0), 0, 1)
    lines = data_report.lines(c, loader, data_report.report(loader))
    assert lines[1].startswith("warning: 2 of 3 examples of --val_data have the questions or")


def test_a_resume_knows_which_examples_are_held_out(tmp_path, encoder):
    """Although the records' groups are no token ids, and as many are held out as before."""
    apart = [next(g for g in "abcdefgh" if (group_key(g) < 2**63) == out) for out in (True, False)]
    found = []
    for groups in (apart, apart[::-1]):
        records = [chat(i, "human", "gpt") | {"group": g} for i, g in enumerate(groups)]
        (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
        c = SFT(data=[str(tmp_path / "x.jsonl")], seq_len=64, val_fraction=0.5)
        loader = Loader(c, store.chats(c.data, encoder, c.seq_len, 0.0))
        found.append(identity(c, MODELS["tiny"], encoder, loader))
    one, other = found
    assert [name for name in one if one[name] != other[name]] == ["which are held out"]


def test_a_group_is_all_that_the_user_says_and_may_be_a_number():
    one, other = (chats_of({"messages": [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"},
        {"role": "user", "content": asked}, {"role": "assistant", "content": "yes"},
    ]})[0] for asked in ("is it asthma?", "is it gout?"))  # fmt: skip
    assert one.group != other.group
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "group": 7, "kind": 1}
    assert (pair_of(pair).group, pair_of(pair).kind) == ("7", "1")
