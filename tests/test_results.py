"""docs/results.md comes from the files of measurements; bench/gpu.sh keeps to its time."""

import json
import math
import re
import subprocess
import sys

import pytest

from bench import measure, results
from tests.conftest import ROOT


def test_the_page_of_results_is_what_the_files_give():
    files = sorted(results.FOLDER.glob("*.jsonl"))
    assert results.page(files) == results.PAGE.read_text("utf-8"), "python -m bench.results"


def test_a_page_shows_what_was_measured_and_leaves_the_rest_empty(tmp_path):
    path = tmp_path / "x.jsonl"
    found = measure.Results(path)
    found.add("step", "CPT", [2.0], shapes={"T": 4096}, convention="MFU counts causal pairs")
    found.add("step", "start", [1.0, 2.0])
    found.add("a new kind", "x", [3], "GiB")
    text = results.page([path])
    step = text.split("## A training step")[1].split("##")[0]
    assert "2,000" in step and "MFU counts causal pairs." in step
    # Measured on a CPU: the rows of a GPU stay, empty. Other sizes, another table.
    assert "| AquilaMed SFT |" in step and step.count("| name ") == 3
    assert "## A new kind" in text and "| rope forward: triton " in text
    changed = path.read_text().replace("2.0]", "2.5]")
    path.write_text(changed)
    assert results.page([path]) != text


def test_check_fails_on_a_page_that_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(sys, "argv", ["x"])
    results.main()
    monkeypatch.setattr(sys, "argv", ["x", "--check"])
    results.main()
    results.PAGE.write_text(results.PAGE.read_text("utf-8") + "10x faster\n", "utf-8")
    with pytest.raises(SystemExit, match="stale"):
        results.main()


def test_results_in_the_repository_parse():
    for path in results.FOLDER.glob("*.jsonl"):
        for row in measure.read([path])[0]:
            assert all(math.isfinite(x) for x in row["samples"]), json.dumps(row)


def test_the_gpu_script_says_what_it_had_no_time_for(tmp_path):
    command = ["bash", "bench/gpu.sh", str(tmp_path), "0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    skipped = re.findall(r"== (\w+): skipped", run.stdout)
    assert skipped[:3] == ["machine", "tests", "ceilings"] and "layer" in skipped
    assert (tmp_path / "gpu.log").read_text() == run.stdout
