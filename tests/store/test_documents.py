"""The store of documents: what goes in comes out, in any range, on the right side of the split."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomed import store
from nanomed.config import InputError
from nanomed.records.shapes import blank
from nanomed.store.cache import limit_of
from nanomed.store.stream import file_of, verify
from nanomed.text import template
from tests.conftest import ROOT
from tests.stores import SAMPLES, everything, in_shard, write

TEXTS = st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=30)


# ---------------------------------------------------------------- what goes in comes out


@given(texts=TEXTS, fraction=st.floats(0, 1), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_range_of_either_part(tmp_path_factory, encoder, texts, fraction, data):
    folder = tmp_path_factory.mktemp("store")
    texts = [*texts, "end"]
    built = store.build(
        folder / "store", [write(folder / "texts.jsonl", texts)], encoder, shard_tokens=50
    )
    n_kept = sum(not blank(text) for text in texts)
    assert built.manifest["documents"] == n_kept
    parts = built.split(fraction)
    assert sum(part.n_documents for part in parts) == n_kept
    for held_out, part in enumerate(parts):
        expected = []  # (id, the next one in its document or -100, its place)
        for shard in range(len(built.manifest["shards"])):
            sides = built._map(shard, "keys") < limit_of(fraction)
            for d, ids in enumerate(in_shard(built, shard)):
                if sides[d] == held_out:
                    following = [*ids[1:], -100]
                    expected += [(i, following[k], (shard, d)) for k, i in enumerate(ids)]
        assert part.n_tokens == len(expected)
        start = data.draw(st.integers(0, len(expected)))
        stop = data.draw(st.integers(start, len(expected)))
        pieces = part.read(start, stop)
        found = [i for piece in pieces for i in piece.ids]
        assert found == [i for i, *_ in expected[start:stop]]
        assert part.n_ends(start, stop) == sum(e[1] == -100 for e in expected[start:stop])
        for piece in pieces:
            last = expected[start + len(piece.ids) - 1]
            assert piece.last_label == last[1] and piece.ids.dtype == np.int64
            shard, d = last[2]
            assert piece.document == built.starts[shard] + d
            start += len(piece.ids)
            number = built.where(piece.document)[1]
            ids = in_shard(built, shard)[d]
            assert ids == [*encoder.tokenizer.encode(texts[number - 1]), encoder.document_end]


def test_a_text_that_spells_the_end_stays_text(tmp_path, encoder):
    spelt = "<|endoftext|> 一 <|im_end|>\n<|endoftext|>"
    built = store.build(tmp_path / "store", [write(tmp_path / "x.jsonl", [spelt])], encoder)
    (ids,) = everything(built)
    assert ids.count(encoder.document_end) == 1 and ids[-1] == encoder.document_end
    assert not set(ids[:-1]) & set(encoder.tokenizer.special.values())
    assert encoder.tokenizer.decode(ids[:-1]) == spelt


def test_every_form_of_file_gives_the_same_tokens(tmp_path, encoder):
    texts = [f"第{i}篇。A text of its own, the {i}th." for i in range(40)]
    plain = write(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps([{"content": text} for text in texts]))
    (tmp_path / "d.txt").write_text("\n\n".join(texts))
    write(tmp_path / "e.jsonl", [{"body": text, "messages": []} for text in texts])
    (tmp_path / "f.csv").write_text("id,body\n" + "\n".join(f'1,"{text}"' for text in texts))
    write(tmp_path / "g.jsonl", [{"body": text, "text": "another"} for text in texts])
    found = [
        everything(
            store.build(
                tmp_path / path.stem, [str(path)], encoder, ["text=body"] * (path.name[0] in "efg")
            )
        )
        for path in sorted(tmp_path.glob("?.*"))
    ]
    assert len(found) == 7 and all(other == found[0] for other in found)


def test_chats_become_documents_by_the_template(tmp_path, encoder):
    """Special tokens that the template puts in are real ones; what a user types stays text."""
    chat = {"instruction": "问<|im_end|>", "output": "答"}
    raw = {"prompt": "One, two,", "completion": " three"}
    wordings = {"questions": ["a", "b"], "answers": "c"}
    file = write(tmp_path / "x.jsonl", [chat, "一篇文章", raw, wordings])
    built = store.build(tmp_path / "store", [file], encoder)
    system = "<|im_start|>system\nYou are a helpful assistant in medical domain.<|im_end|>\n"
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    end = "<|endoftext|>"
    *found, one, other = (encoder.tokenizer.decode(ids) for ids in everything(built))
    assert found == [
        system + turns.format("问<|im_end|>", "答") + end,
        "一篇文章" + end,
        "One, two, three" + end,
    ]
    assert {one, other} == {system + turns.format(q, "c") + end for q in "ab"}
    assert everything(built)[0].count(encoder.tokenizer.special["<|im_end|>"]) == 3
    assert built.manifest["report"]["changed"] == {
        "chat rendered by the template": 4,
        "text continued without a template": 1,
        "text spells <|im_end|>, kept as text": 1,
    }


def test_a_record_is_never_cut_between_shards(tmp_path, encoder):
    """However many texts it has, and however short a shard is: a kill costs whole records."""
    wordings = {"questions": list("abcd"), "answers": "c"}
    file = write(tmp_path / "x.jsonl", [wordings, " ", wordings, "an other"])
    built = store.build(tmp_path / "store", [file], encoder, shard_tokens=50)
    sources = [built._map(shard, "source").reshape(-1, 2).tolist() for shard in range(3)]
    assert sources == [[[0, 1]] * 4, [[0, 3]] * 4, [[0, 4]]]


def test_a_template_whose_turns_end_as_documents_do(tmp_path, encoder):
    """As in aquila-v1, where both end with </s>."""
    end = "<|endoftext|>"
    after = {"system": "", "user": "", "assistant": end}
    same = dataclasses.replace(
        template.CHATML, special=(*template.CHATML.special, end), after=after, turn_end=end
    )
    same = template.Encoder(same, encoder.tokenizer)
    file = write(tmp_path / "x.jsonl", [{"instruction": "问", "output": "答"}])
    (chat,) = everything(store.build(tmp_path / "store", [file], same))
    assert chat.count(same.document_end) == 1 and chat[-1] == same.document_end


def test_the_report_and_the_manifest(tmp_path, encoder):
    rows = [{"text": f"医学文章{i}", "source": "甲"} for i in range(3)]
    rows += [{"text": "an article", "source": "乙"}, {"text": " \n", "source": "乙"}]
    files = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", ["an other"])]
    built = store.build(tmp_path / "store", files, encoder)
    manifest, report = built.manifest, built.manifest["report"]
    assert (report["examples"], report["kept"], manifest["documents"]) == (6, 5, 5)
    assert report["dropped"] == {"empty text": 1}
    assert manifest["tokens"] == sum(map(len, everything(built))) == report["tokens"]
    assert report["trained_tokens"] == report["tokens"] - 5
    texts = [*(row["text"] for row in rows[:4]), "an other"]
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts)
    first = report["files"][files[0]]
    assert {name: s["kept"] for name, s in first["sources"].items()} == {"甲": 3, "乙": 1}
    assert report["language_share"] == {"en": 0.4, "zh": 0.6}
    assert [source["path"] for source in manifest["sources"]] == files
    assert manifest["document_end"] == encoder.document_end
    assert manifest["tokenizer"] == encoder.tokenizer.fingerprint()


def test_the_report_stays_small_whatever_the_records_say(tmp_path, encoder):
    rows = [{"text": "a " * i, "source": f"s{i}", "lang": f"l{i}"} for i in range(1, 300)]
    built = store.build(tmp_path / "store", [write(tmp_path / "x.jsonl", rows)], encoder, "", 5_000)
    report = built.manifest["report"]
    (sources,) = (file["sources"] for file in report["files"].values())
    assert len(sources) == 101 and sources["(others)"]["examples"] == 199
    assert list(report["language_share"]) == ["en"] and report["kept"] == 299
    assert len(report["length_percentiles"]) == 7


# ---------------------------------------------------------------- opening


def test_files_are_tokenised_once(tmp_path, encoder, monkeypatch):
    file = write(tmp_path / "x.jsonl", ["one", "two"])
    first = store.documents([file], encoder)
    monkeypatch.setattr("nanomed.store.writing.batches", lambda *_: pytest.fail("tokenised twice"))
    assert store.documents([file], encoder).folder == first.folder
    assert store.documents([str(first.folder)], encoder).manifest == first.manifest
    with pytest.raises(pytest.fail.Exception):
        store.documents([file], encoder, fields=["text=body"])


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "shard-00001.tokens.u32", 40), "has 40 bytes, the man"),
    "missing": (lambda f: (f / "shard-00000.borders.npy").unlink(), "borders.npy is missing"),
    "no JSON": (lambda f: os.truncate(f / "manifest.json", 300), "manifest.json is damaged"),
    "no field": (lambda f: change(f, "shards", None), "manifest.json is damaged"),
    "other counts": (lambda f: change(f, "tokens", 1), "manifest.json is damaged .the shards"),
    "other tokenizer": (lambda f: change(f, "tokenizer", "0"), "with another tokenizer than"),
    "other end": (lambda f: change(f, "document_end", 5), "with another document_end"),
    "other ids": (
        lambda f: change(f, "versions", {}),
        "has ids of version none of 'documents', .*; tokenise the files again",
    ),
    "no store": (lambda f: (f / "manifest.json").unlink(), "not a finished store"),
}


def change(folder: Path, name: str, value) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, encoder) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "store"
    return store.build(folder, SAMPLES, encoder, shard_tokens=20_000).folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_store_is_refused_by_name(tmp_path, encoder, sound, damage):
    folder = tmp_path / "store"
    shutil.copytree(sound, folder)
    store.documents([str(folder)], encoder)
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(InputError, match=f"{folder}.*{message}"):
        store.documents([str(folder)], encoder)


def test_another_template_matters_only_to_chats(tmp_path, encoder):
    other = template.Encoder(
        dataclasses.replace(template.CHATML, system="Other."), encoder.tokenizer
    )
    texts = store.build(tmp_path / "a", [write(tmp_path / "a.jsonl", ["text"])], encoder)
    store.documents([str(texts.folder)], other)
    chat = write(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b"}])
    chats = store.build(tmp_path / "b", [chat], encoder)
    with pytest.raises(InputError, match="tokenised with another template"):
        store.documents([str(chats.folder)], other)


def test_one_flipped_bit_is_found_by_verify(tmp_path, encoder, sound):
    folder = tmp_path / "store"
    shutil.copytree(sound, folder)
    verify(folder)
    with open(folder / "shard-00001.keys.npy", "r+b") as file:
        file.seek(200)
        byte = file.read(1)[0]
        file.seek(200)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(InputError, match=r"shard-00001.keys.npy is not what was written"):
        verify(folder)


def test_the_command(tmp_path, encoder):
    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "nanomed.store", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    out, model = str(tmp_path / "store"), ["--tokenizer", "samples/tokenizer.model"]
    done = run("samples/cpt_general.jsonl", *model, "--out", out, "--processes", "1")
    assert done.returncode == 0 and re.search(
        r"\d+ documents, [\d,]+ tokens in 1 shards", done.stdout
    )
    again = run("samples/cpt_medical.jsonl", *model, "--out", out)
    assert again.returncode == 1 and again.stderr.startswith(f"error: {out} holds a store of other")


@pytest.mark.slow
def test_a_terabyte_opens_in_a_second(tmp_path, encoder):
    """Of 128 MiB shards, which all are the same sparse file; and reading adds nothing."""
    n_shards, n_documents, n_tokens = 7_451, 30_000, 32 << 20
    rng = np.random.default_rng(0)
    arrays = {
        "borders": np.linspace(0, n_tokens, n_documents + 1).astype(np.int64),
        "keys": np.sort(rng.integers(0, 2**64, n_documents, dtype=np.uint64)),
        "source": np.zeros((n_documents, 2), np.int64),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "tokens.npy").touch()
    os.truncate(tmp_path / "tokens.npy", 4 * n_tokens)
    folder, shards = tmp_path / "store", []
    folder.mkdir()
    for shard in range(n_shards):
        files = {}
        for name in (*arrays, "tokens"):
            linked = folder / file_of(shard, name)
            linked.hardlink_to(tmp_path / f"{name}.npy")
            files[linked.name] = {"size": linked.stat().st_size, "sha256": "0" * 64}
        shards.append({"tokens": n_tokens, "documents": n_documents, "files": files})
    manifest = {"tokens": n_shards * n_tokens, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    seconds, opening, reading, total = map(float, done.stdout.split())
    print(f"{seconds:.2f} s to open and split, {opening:.0f} MB for it, {reading:.0f} MB more read")
    assert seconds < 1 and opening + reading < 200
    assert total == n_shards * n_tokens


OPEN = """
import pathlib, random, sys, time
from nanomed.store.stream import Documents

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

before, started = resident(), time.process_time()  # other processes' time does not count
train, held_out = Documents(pathlib.Path(sys.argv[1])).split(0.01)
seconds, opened = time.process_time() - started, resident()
for _ in range(5_000):
    start = random.randrange(train.n_tokens - 4096)
    train.read(start, start + 4096), train.n_ends(start, start + 4096)
print(seconds, opened - before, resident() - opened, train.n_tokens + held_out.n_tokens)
"""
