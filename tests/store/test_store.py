import dataclasses
import json
import threading

import numpy as np
import pytest

from nanomed import store
from nanomed.config import InputError
from nanomed.records import read_chats
from nanomed.store import cache, examples
from nanomed.text import tokenizer
from nanomed.text.template import CHATML, Encoder
from tests.conftest import ROOT


def write_chats(path, n: int = 20, length: int = 5):
    rows = [{"instruction": f"问题{i}", "output": "答" * (i % length + 1)} for i in range(n)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


@pytest.fixture
def file(tmp_path) -> str:
    return write_chats(tmp_path / "chats.jsonl")


def build(file, encoder, seq_len=256, allow_drop=0.05):
    return store.chats([file], encoder, seq_len, allow_drop)


def test_what_goes_in_comes_out(file, encoder):
    built = build(file, encoder)
    chats = list(read_chats(file))
    assert len(built) == len(chats) == 20
    for i, (number, chat, _) in enumerate(chats):
        ids, trained, _ = encoder.chat(chat, 256)
        ((stored_ids, stored_trained, _),) = built[i]
        assert stored_ids.tolist() == ids and stored_trained.tolist() == trained
        assert stored_ids.dtype == np.int64
        assert built.lengths[i] == len(ids) and built.divisors[i] == sum(trained)
        assert built.where(i) == (file, number)
        assert built.keys[i] == store.group_key(chat.group)


def test_a_second_launch_reads_nothing_again(file, encoder, monkeypatch):
    first = build(file, encoder)
    monkeypatch.setattr(examples._Reading, "write", lambda *_: pytest.fail("tokenised twice"))
    assert build(file, encoder).folder == first.folder


def test_the_key_covers_all_that_the_ids_depend_on(file, encoder, tmp_path):
    """Data, tokenizer, template, seq_len; test_versions.py has the code."""
    keys = {build(file, encoder).folder}
    keys.add(build(file, encoder, seq_len=255).folder)
    other = dataclasses.replace(CHATML, system="Other.")
    keys.add(build(file, Encoder(other, encoder.tokenizer)).folder)
    text = (ROOT / "samples/sft.jsonl").read_text().splitlines()[:300]
    tokenizer.train(text, tmp_path / "other.model", vocab_size=5000)
    keys.add(build(file, Encoder(CHATML, tokenizer.load(tmp_path / "other.model"))).folder)
    with open(file, "a") as handle:
        handle.write('\n{"instruction": "a", "output": "b"}')
    keys.add(build(file, encoder).folder)
    assert len(keys) == 5


def test_too_many_dropped_chats_stop_the_run(tmp_path, encoder):
    """Nothing is dropped silently, nor does a run go on with what little is left."""
    file = write_chats(tmp_path / "x.jsonl", n=20, length=20)
    shortest = len(encoder.chat(next(chat for _, chat, _ in read_chats(file)), 999)[0])
    with pytest.raises(
        InputError, match=r"of 20 examples in .*x.jsonl cannot be kept .*longer than"
    ):
        build(file, encoder, seq_len=shortest + 12)
    kept = build(file, encoder, seq_len=shortest + 12, allow_drop=0.5)
    assert len(kept) == 20 - sum(kept.meta["report"]["dropped"].values()) < 20
    with pytest.raises(InputError, match="20 of 20"):
        build(file, encoder, seq_len=4, allow_drop=1.0)


def test_the_report_counts_by_cause(tmp_path, encoder):
    history = [["旧问题" * 30, "旧回答" * 30]]
    rows = [
        {"instruction": "新问题", "output": "新回答", "history": history},
        {"instruction": "问", "output": " "},
        {"instruction": "问", "output": "答" * 300},
        {"conversations": [{"from": f, "value": "好"} for f in ("gpt", "human", "gpt", "human")]},
    ]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(rows))
    built = store.chats([str(file)], encoder, 120, allow_drop=0.5)
    report = built.meta["report"]
    assert (report["examples"], report["kept"], report["shortened"], report["turns_cut"]) == (
        4,
        2,
        1,
        2,
    )
    assert report["dropped"] == {"empty answer": 1, "longer than seq_len": 1}
    assert set(report["changed"].values()) == {1} and len(report["changed"]) == 2
    assert report["tokens"] == built.lengths.sum() and report["length_percentiles"]["p100"] <= 120
    assert report["trained_tokens"] == built.divisors.sum()


def test_the_report_has_every_file_and_source(tmp_path, encoder):
    rows = [{"instruction": f"问题{i}", "output": "答", "source": "甲"} for i in range(3)]
    rows += [{"instruction": "what is it", "output": "an answer", "source": "乙"}]
    rows += [{"instruction": "问", "output": "", "source": "乙"}]
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, part in zip(paths, (rows, [{"question": "问", "answer": "答" * 20}]), strict=True):
        with open(path, "w") as file:
            json.dump(part, file)
    report = store.chats(paths, encoder, 256, 0.5).meta["report"]
    first, second = (report["files"][path] for path in paths)
    assert (report["examples"], first["examples"], second["examples"]) == (6, 5, 1)
    assert {name: s["kept"] for name, s in first["sources"].items()} == {"甲": 3, "乙": 1}
    assert first["sources"]["乙"]["dropped"] == {"empty answer": 1}
    assert list(second["sources"]) == ["(none named)"]
    assert first["language_share"] == {"en": 0.25, "zh": 0.75}
    assert first["sources"]["乙"]["language_share"] == {"en": 1.0}
    assert report["tokens"] == first["tokens"] + second["tokens"]
    for part in (report, first, second):
        assert part["trained_share"] == round(part["trained_tokens"] / part["tokens"], 4)
        assert part["length_percentiles"]["p50"] <= part["length_percentiles"]["p100"]
    assert second["trained_share"] > first["trained_share"]  # its answers are longer


def test_the_report_stays_small_whatever_the_records_say(tmp_path, encoder):
    """Each pair names a source of its own; DPO has metrics for each name."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "source": f"s{i}"} for i in range(300)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = store.pairs([str(tmp_path / "x.jsonl")], encoder, 256, 0.5)
    (file,) = data.meta["report"]["files"].values()
    assert len(file["sources"]) == 101 and file["sources"]["(others)"]["examples"] == 200
    assert data.meta["kinds"] == [f"s{i}" for i in range(100)] + ["(others)"]


def test_one_process_tokenises_and_the_others_wait_without_a_collective(file, encoder, monkeypatch):
    """Threads stand in for the other ranks; there is no process group here."""
    passes, opened = [], []
    original = examples._Reading.write
    monkeypatch.setattr(examples._Reading, "write", lambda *a: (passes.append(1), original(*a))[1])
    local_rank = threading.local()
    monkeypatch.setattr(cache, "rank_from_env", lambda: (0, 2, local_rank.value, 2))

    def launch(rank: int) -> None:
        local_rank.value = rank
        opened.append(len(build(file, encoder)))

    threads = [threading.Thread(target=launch, args=(rank,)) for rank in (3, 2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert opened == [20] * 4 and len(passes) == 1


def test_an_unfinished_store_is_not_taken_for_one(file, encoder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            build(file, encoder)
    assert len(build(file, encoder)) == 20


def test_a_damaged_store_is_refused(file, encoder):
    folder = build(file, encoder).folder
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        for size in (len(sound) - 1, 40, 0):  # after a loss of power what was just written is empty
            path.write_bytes(sound[:size])
            with pytest.raises(InputError, match=r"is damaged.*; delete it and start again"):
                build(file, encoder)
        path.write_bytes(sound)
    assert len(build(file, encoder)) > 0


@pytest.mark.slow
def test_a_500_mb_array_takes_three_times_its_size(tmp_path):
    """Read in a process of its own, whose peak memory is then its own: VmHWM begins anew with a
    program, ru_maxrss goes on from the process that has started it."""
    import subprocess
    import sys
    import time

    row = json.dumps({"instruction": "问" * 300, "output": "答" * 300}, ensure_ascii=False)
    path = tmp_path / "big.json"
    with open(path, "w") as file:
        file.write("[" + row)
        for _ in range(500_000_000 // len(row.encode())):
            file.write("," + row)
        file.write("]")
    code = (
        "import re, sys; from nanomed.records import read_chats;"
        "n = sum(1 for _ in read_chats(sys.argv[1]));"
        "print(n, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    )
    started = time.perf_counter()
    command = [sys.executable, "-c", code, str(path)]
    n_chats, peak = map(int, subprocess.check_output(command).split())
    print(f"{time.perf_counter() - started:.1f} s, {peak / path.stat().st_size:.2f} x its size")
    assert n_chats > 200_000 and peak < 3 * path.stat().st_size
