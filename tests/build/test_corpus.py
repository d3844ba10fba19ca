"""build_corpus.py from what people have to what the next stage reads, and the demonstration."""

import gzip
import json
import os
import random
import re
import sys
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pytest

import build_corpus
from nanomed import store
from nanomed.build.settings import files_of
from nanomed.config import InputError
from tests.build import corpora
from tests.build.corpora import build, dropped, kept, read, write
from tests.build.scored import chat
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "samples"))
import raw
from world import all_facts

QUESTIONS = ROOT / "samples/questions.jsonl"
LONG = corpora.text(random.Random(1), "en", 8)


# ---------------------------------------------------------------- in and out


def test_every_format_of_documents_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"{LONG} number {i}" for i in range(6)]
    data = tmp_path / "in"
    (data / "zh").mkdir(parents=True)
    (data / "en").mkdir()
    write(data / "zh/rank_0.jsonl.gz", [{"text": texts[0], "alnum_ratio": 0.9}])  # IndustryCorpus
    write(data / "en/rank_0.jsonl", [{"content": texts[1]}])
    (data / "a.json").write_text(json.dumps([{"text": texts[2]}]))
    (data / "b.csv").write_text(f'text,source\n"{texts[3]}",web\n')
    (data / "c.txt").write_text(texts[4] + "\n")
    table = pyarrow.Table.from_pylist([chat("Why?", texts[5])])
    parquet.write_table(table, data / "d.parquet")
    corpora.exam(tmp_path)
    out = build([str(data)], tmp_path / "out", "--near_dup_jaccard", "1", "--private", "keep")
    found = kept(out)
    assert len(found) == 6
    assert sorted(r["nanomed"]["source"] for r in found) == ["en", "in", "in", "in", "web", "zh"]
    assert found[[r["nanomed"]["source"] for r in found].index("zh")]["alnum_ratio"] == 0.9


def test_another_name_of_the_text_is_given_as_a_field(tmp_path):
    corpora.exam(tmp_path)
    files = [write(tmp_path / "x.jsonl", [{"body": LONG, "n": 1}])]
    out = build(files, tmp_path / "out", "--fields", "text=body")
    assert [(r["text"], r["n"]) for r in kept(out)] == [(LONG, 1)]


def test_what_is_kept_becomes_a_store_as_it_is(tmp_path, encoder):
    files = corpora.corpus(tmp_path / "raw", n_files=2, n=30)
    corpora.exam(tmp_path / "raw")
    odd = [{"text": "", "content": f"{LONG} One."}, {"text": None, "content": f"{LONG} Two."}]
    both = chat("Why is that so?", f"{LONG} Third.", text="")
    files.append(write(tmp_path / "raw/odd.jsonl", [*odd, both]))  # all have a text
    out = build(files, tmp_path / "out", "--near_dup_jaccard", "1")
    assert sum("odd.jsonl" in line["file"] for line in dropped(out)) == 0
    final = [str(path) for path in sorted((out / "final").glob("*.jsonl.gz"))]
    made = store.build(tmp_path / "store", final, encoder)
    assert made.manifest["documents"] == len(kept(out)) > 20
    assert not made.manifest["report"]["dropped"]


def test_a_folder_is_read_with_all_that_is_linked_and_packed_in_it(tmp_path, capsys):
    data, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (data / "spark.json").mkdir(parents=True)
    elsewhere.mkdir()
    names = ["in/A.JSONL", "in/spark.json/part-0.json", "in/b.jsonl.zst", "elsewhere/c.jsonl"]
    for name in names:
        write(tmp_path / name, [{"text": LONG}])
    (data / "linked").symlink_to(elsewhere)
    (data / "linked again").symlink_to(elsewhere)  # each file is read once
    (elsewhere / "back").symlink_to(data)
    (data / "part-0").write_text("no ending\n")
    found = files_of([str(data)])
    assert [Path(p).name for p in found] == ["A.JSONL", "b.jsonl.zst", "c.jsonl", "part-0.json"]
    assert "part-0" in (said := capsys.readouterr().out) and said.count("\n") == 1
    (data / os.fsdecode(b"\xff.jsonl")).write_text("{}\n")
    with pytest.raises(InputError, match=r"udcff\.jsonl.*rename"):
        files_of([str(data)])


def test_sources_without_end_are_counted_under_their_folder(tmp_path):
    corpora.exam(tmp_path)
    named = [{"text": f"{LONG} {i}", "source": f"http://a/{i}\tb"} for i in range(130)]
    out = build([write(tmp_path / "x.jsonl", named)], tmp_path / "out", "--stop_after", "exact")
    flow = json.loads((out / "report.json").read_text("utf-8"))["stages"][0]["flow"]
    assert len(flow) == 101 and {x["source"] for x in flow} >= {"http://a/99 b", tmp_path.name}
    assert [x["documents"] for x in flow if x["source"] == tmp_path.name] == [30]
    assert kept(out)[129]["source"] == "http://a/129\tb"  # as it came


def test_values_of_parquet_that_json_has_no_form_for_are_kept_as_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    corpora.exam(tmp_path)
    row = {"text": LONG, "when": datetime(2020, 1, 2), "bytes": b"ab", "price": Decimal("1.50")}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    out = build([str(tmp_path / "x.parquet")], tmp_path / "out", "--stop_after", "exact")
    (record,) = kept(out)
    assert (record["when"], record["bytes"]) == ("2020-01-02 00:00:00", "b'ab'")
    assert record["price"] == "1.50"


# ---------------------------------------------------------------- bad input


def test_files_are_looked_into_before_the_first_is_read(tmp_path):
    corpora.exam(tmp_path)
    files = [write(tmp_path / "a.jsonl", [{"text": LONG}])]
    for content, message in ((b"", "empty"), (b"%PDF-1.4", "PDF"), (b'{"x": 1}', "unknown fields")):
        (tmp_path / "b.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=rf"b\.jsonl.*{message}"):
            build([*files, str(tmp_path / "b.jsonl")], tmp_path / "out")
    assert len(kept(build(files, tmp_path / "out"))) == 1  # the folder is still free


def test_a_record_that_cannot_be_read_stops_its_shard_and_is_named(tmp_path):
    corpora.exam(tmp_path)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": LONG}) + '\n{"text": "broken\n')
    with pytest.raises(InputError, match=r"x\.jsonl, record 2"):
        build([str(path)], tmp_path / "out")
    assert not list((tmp_path / "out/0-read").glob("*.jsonl.gz"))
    other = [write(tmp_path / "y.jsonl", [{"text": LONG}, {"text": {"a": 1}}])]
    with pytest.raises(InputError, match=r"y\.jsonl, record 2.*text"):
        build(other, tmp_path / "out2")
    surrogate = [write(tmp_path / "z.jsonl", [{"text": LONG + " x"}])]
    Path(surrogate[0]).write_text(json.dumps({"text": "a\ud83d b"}) + "\n")
    with pytest.raises(InputError, match=r"z\.jsonl, record 1.*surrogate"):
        build(surrogate, tmp_path / "out3")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stop_after", "rule"], "did you mean rules"),
        (["--near_dup_jaccard", "0"], "near_dup_jaccard"),
        (["--max_special", "20"], "between 0 and 1"),
        (["--private", "hide"], "drop"),
        (["--engine", "spark"], "engine"),
        (["--near_dup", "0.9"], "near_dup_jaccard"),
        (["--fields", "text"], "KNOWN=THEIRS"),
        (["--data", "nowhere.jsonl"], r"nowhere\.jsonl"),
        (["--decontaminate", "nowhere.csv"], r"nowhere\.csv"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_refused_before_anything_is_read(tmp_path, flags, message):
    corpora.exam(tmp_path)
    files = [write(tmp_path / "x.jsonl", [{"text": LONG}])]
    with pytest.raises(InputError, match=message):
        build(files, tmp_path / "out", *flags)
    assert not list(tmp_path.glob("out/0-read/*.jsonl.gz"))


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("labels", b'{"text": "a", "label": "medicine"}\n', "no record has a domain or a quality"),
        ("labels", b'{"text": "a", "domain": "law"}\n{"domain": "law"}\n', "record 2"),
        ("toxic_words", b"bad\n***\n", r"'\*\*\*' is no word"),
        ("toxic_words", b"# none\n\xff\xfe\x9d\n", "its encoding"),
    ],
)  # fmt: skip
def test_a_file_beside_the_documents_is_read_before_them(tmp_path, flag, content, message):
    corpora.exam(tmp_path)
    files = [write(tmp_path / "x.jsonl", [{"text": LONG}])]
    (tmp_path / "beside.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        build(files, tmp_path / "out", f"--{flag}", str(tmp_path / "beside.txt"))
    assert not list(tmp_path.glob("out/0-read/*.jsonl.gz"))


def test_a_folder_belongs_to_one_build_and_to_its_user(tmp_path):
    corpora.exam(tmp_path)
    files = [str(tmp_path / "x.jsonl")]
    Path(files[0]).write_text(json.dumps({"text": LONG, "note": "a\ud83d"}) + "\n")
    out = build(files, tmp_path / "out")
    assert all(p.stat().st_mode & 0o077 == 0 for p in [out, *out.rglob("*")] if p.is_dir())
    Path(files[0]).write_text(json.dumps({"text": LONG + "!"}) + "\n")
    with pytest.raises(InputError, match=r"x\.jsonl.*another --out"):
        build(files, out)
    assert kept(out)[0]["note"] == "a\ud83d"  # half an emoji beside the text is carried along
    (out / "plan.json").unlink()
    with pytest.raises(InputError, match=r"no plan\.json"):  # else old shards would count as new
        build(files, out)


# ---------------------------------------------------------------- the demonstration


def test_the_raw_samples_are_those_of_their_generator():
    for name, records in raw.files().items():
        assert read(ROOT / "samples" / name) == records, name
        content = (ROOT / "samples" / name).read_bytes()
        assert len(gzip.decompress(content)) < 3 << 20 and len(content) < 200_000
    assert sum(len(r) for n, r in raw.files().items() if n.startswith("raw/")) > 3000


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demonstration") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["build_corpus.py", "--out", str(out), "--workers", "1"])
        build_corpus.main()
    return out


def test_raw_texts_leave_what_is_measured_alone():
    """But for the planted leaks, none asks in words that are kept, and none states what nothing
    states: paper.sh trains on them."""
    texts = [r["text"].lower() for path in ROOT.glob("samples/raw/*/*.gz") for r in read(path)
             if r["category"] != "leak"]  # fmt: skip
    kept_words = {q["question"].lower() for q in map(json.loads, QUESTIONS.open(encoding="utf-8"))}
    asked = [t.split("\n")[0].removeprefix("问：").removeprefix("q: ") for t in texts]
    assert kept_words.isdisjoint(asked) and any("？" in x for x in asked)
    for fact in all_facts():
        if fact.stated == "nowhere":
            for name, value in ((fact.name, fact.zh), (fact.name_en, fact.en)):
                name, value = name.lower().removeprefix("the "), value.lower()
                assert not any(name in t and value in t for t in texts), fact.key


def test_the_demonstration_finds_what_was_planted(demonstration):
    planted = {}
    for path in sorted(ROOT.glob("samples/raw/*/*.gz")):
        shown = str(path.relative_to(ROOT))
        planted |= {(shown, i): r["category"] for i, r in enumerate(read(path), 1)}
    why = {}
    for line in dropped(demonstration):
        name = str(Path(line["file"]).relative_to(ROOT)) if line["file"][0] == "/" else line["file"]
        why.setdefault((name, line["record"]), line["reason"])

    def share(kind: str, *reasons: str) -> float:
        of_kind = [place for place, what in planted.items() if what == kind]
        return sum(why.get(place, "kept") in reasons for place in of_kind) / len(of_kind)

    assert share("leak", "contaminated") == 1
    assert share("private", "kept") == 0 and share("advert", "kept") == 0
    assert share("garbage", "kept") == 0 and share("short", "kept") == 0
    assert share("general", "domain", "exact_duplicate", "near_duplicate") > 0.95
    assert share("medical", "kept") > 0.8


def test_the_report_can_be_read_by_programs_and_by_people(demonstration):
    report = json.loads((demonstration / "report.json").read_text("utf-8"))
    names = ["read", *build_corpus.stages(build_corpus.Corpus())]
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert [*stages] == [*names, "stage1-general", "stage1-medical"]
    lines = Counter(line["reason"] for line in dropped(demonstration, "*/**/*.dropped.jsonl"))
    assert lines == sum((Counter(stage["dropped"]) for stage in stages.values()), Counter())
    for name in ("final", "stage1-general", "stage1-medical"):
        stage = stages["decontaminate" if name == "final" else name]
        assert stage["read"] - sum(stage["dropped"].values()) == len(kept(demonstration, name))
    assert report["benchmarks"]["samples/exam.jsonl"]["dropped"] >= 3
    assert report["duplicates"]["near"] and report["models"]["domain"]["limits"]
    page = (demonstration / "report.html").read_text("utf-8")
    for word in ("kept", "private", "near_duplicate", "exam.jsonl", "limit"):
        assert word in page
    assert "<script" not in page and not re.search(r"(src|href)=", page)
    assert page.count("<svg") == page.count("</svg>") > 15 and "unseen_sources" not in page
