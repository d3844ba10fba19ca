"""Tokenising in many processes, killed at any moment: the store is the same, byte for byte."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanomed import store
from nanomed.config import InputError
from nanomed.store import tokenising
from tests.conftest import ROOT
from tests.stores import SAMPLES, content, write


def test_the_number_of_processes_changes_no_byte(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr("nanomed.store.tokenising.BATCH", 5_000)
    stores = [tmp_path / str(n) for n in (1, 2)]
    for n, folder in enumerate(stores, 1):
        store.build(folder, SAMPLES, encoder, shard_tokens=5_000, n_processes=n)
    assert content(stores[0]) == content(stores[1]) and len(content(stores[0])) > 50


class Killed(BaseException):
    pass


def test_a_kill_at_any_write_costs_one_shard(tmp_path, encoder, monkeypatch):
    """At each write in turn the process is gone with half of the file on the disk."""
    rows = [f"文章{i} " * (i % 7 + 1) for i in range(40)]
    rows[20:25] = [" "] * 5  # dropped ones
    file = write(tmp_path / "x.jsonl", rows)

    def build(folder: str) -> store.Documents:
        return store.build(tmp_path / folder, [file], encoder, shard_tokens=200)

    n_shards = len(build("whole").manifest["shards"])
    left, encoded = [0], []

    def dying(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise Killed

    def noted(batch, *rest):
        encoded.append(batch.records[0][0])
        return original(batch, *rest)

    original = tokenising.encode
    monkeypatch.setattr(os, "fsync", dying)
    monkeypatch.setattr(tokenising, "encode", noted)
    n_writes = 1 + 5 * n_shards + 1  # the plan, each shard's arrays and JSON, the manifest
    for n in range(1, n_writes + 1):
        left[0] = n
        with pytest.raises(Killed):
            build(str(n))
        done = sorted((tmp_path / str(n)).glob("shard-*.json"))
        left[0] = 0
        encoded.clear()
        build(str(n))
        assert content(tmp_path / str(n)) == content(tmp_path / "whole")
        following = json.loads(done[-1].read_text())["next"] if done else [0, 1]
        assert encoded == ([following[1]] if following[0] == 0 else [])
    assert n_shards >= 4 and len(done) == n_shards


LAUNCH = """
import pathlib, sys
from nanomed import store
from nanomed.text import template, tokenizer
encoder = template.Encoder(template.CHATML, tokenizer.load("samples/tokenizer.model"))
folder, (shard_tokens, n_processes) = pathlib.Path(sys.argv[1]), map(int, sys.argv[2:4])
store.build(folder, sys.argv[4:], encoder, "", shard_tokens, n_processes)
"""


def launch(folder: Path, file: Path, shard_tokens: int, n_processes: int) -> subprocess.Popen:
    words = map(str, (folder, shard_tokens, n_processes, file))
    return subprocess.Popen([sys.executable, "-c", LAUNCH, *words], cwd=ROOT)


def n_shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def test_killed_for_good(tmp_path, encoder):
    """kill -9 of the process, while the processes that it has started go on for a moment."""
    file, killed = tmp_path / "x.jsonl", tmp_path / "killed"
    file.write_text(Path(SAMPLES[0]).read_text() * 10)
    store.build(tmp_path / "whole", [str(file)], encoder, shard_tokens=50_000)
    for n_processes, n in ((1, 2), (2, 5)):
        process = launch(killed, file, 50_000, n_processes)
        while n_shards(killed) < n:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    store.build(killed, [str(file)], encoder, shard_tokens=50_000)
    assert content(killed) == content(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    file, killed = tmp_path / "x.jsonl", tmp_path / "killed"
    file.write_text(Path(SAMPLES[0]).read_text() * 200)
    started = time.perf_counter()
    assert launch(tmp_path / "whole", file, 100_000, 1).wait() == 0
    seconds = time.perf_counter() - started
    rng, counts = random.Random(0), [0]
    for k in range(10):
        process = launch(killed, file, 100_000, n_processes=1 + k % 2)
        while k % 5 and n_shards(killed) == counts[-1] and process.poll() is None:
            time.sleep(0.001)  # two of the ten are killed while they start
        time.sleep(rng.uniform(0, 0.05) * seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
        counts.append(n_shards(killed))
    print(f"shards after each kill: {counts}, of {n_shards(tmp_path / 'whole')}")
    assert launch(killed, file, 100_000, 2).wait() == 0
    assert content(killed) == content(tmp_path / "whole")


def test_a_tokenising_process_needs_no_torch():
    code = "import sys, nanomed.store.tokenising; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_process_that_dies_is_named(tmp_path, encoder, monkeypatch):
    class Doomed(tokenising._Process):
        def __init__(self, *settings):
            super().__init__(*settings)
            self.process.kill()

    monkeypatch.setattr(tokenising, "_Process", Doomed)
    monkeypatch.setattr("nanomed.store.tokenising.BATCH", 5_000)  # more batches than processes
    with pytest.raises(ChildProcessError, match=r"exit code -9 .*the same command goes on"):
        store.build(tmp_path / "store", SAMPLES, encoder, n_processes=2)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_bad_record_is_named(tmp_path, encoder, n_processes):
    file = write(tmp_path / "x.jsonl", ["a", {"text": 7}, {"text": 8}])
    with pytest.raises(InputError, match=r"x.jsonl, record 2: field 'text': expected text"):
        store.build(tmp_path / "store", [file], encoder, n_processes=n_processes)
    with pytest.raises(InputError, match=r"no document in .*empty text"):
        store.build(tmp_path / "blank", [write(tmp_path / "y.jsonl", [" "])], encoder)


def test_another_store_is_not_gone_on_with(tmp_path, encoder, monkeypatch):
    file, folder = write(tmp_path / "x.jsonl", ["a"] * 9), tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr("nanomed.store.writing._manifest", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            store.build(folder, [file], encoder)
    with pytest.raises(InputError, match=r"no manifest.json; run the command .* again"):
        store.documents([str(folder)], encoder)
    with pytest.raises(InputError, match=r"other input \(shard_tokens differ"):
        store.build(folder, [file], encoder, shard_tokens=4)
    os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match=r"other input \(times differ"):
        store.build(folder, [file], encoder)
    store.build(tmp_path / "whole", [file], encoder)
    with pytest.raises(InputError, match=r"other input \(fields differ"):
        store.build(tmp_path / "whole", [file], encoder, fields=["text=body"])
    with open(folder / "unfinished.json") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is writing to"):
            store.build(folder, [file], encoder)
