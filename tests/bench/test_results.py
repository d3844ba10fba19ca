"""docs/results.md comes from the files of measurements; bench/gpu.sh keeps to its time."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from bench import measure, results
from tests.conftest import ROOT


def test_the_page_of_results_and_readmes_figures_are_what_the_files_give():
    files = sorted(results.FOLDER.glob("*.jsonl"))
    assert results.page(files) == results.PAGE.read_text("utf-8"), "python -m bench.results"
    shown = re.findall(results.FIGURES, results.README.read_text("utf-8"))
    assert shown == [results.figures(files)], "python -m bench.results"


def test_a_page_shows_what_was_measured_and_lists_what_waits_for_a_gpu(tmp_path):
    path = tmp_path / "x.jsonl"
    found = measure.Results(path)
    found.add("step", "CPT", [2.0], shapes={"T": 4096}, convention="MFU counts causal pairs")
    found.add("step", "start", [1.0, 2.0])
    found.add("a new kind", "x", [3], "GiB")
    text = results.page([path])
    step = text.split("## A training step")[1].split("##")[0]
    assert "2,000" in step and "MFU counts causal pairs." in step
    assert step.count("| name ") == 2  # other sizes, another table
    assert "python -m bench.step --results" in step and "step_gpu" not in step
    assert "## A new kind" in text and "## Ceilings" not in text and "not measured" not in text
    waiting = text.split("## What waits for a GPU")[1]
    for kind in results.KINDS.values():
        assert all(f"`{command}`" in waiting for command in kind.gpu.splitlines())
        assert (f"- {kind.title}: " in waiting) == bool(kind.gpu)
    # Measured there: it waits no more, and the command is the GPU's.
    path.write_text(
        path.read_text().replace('"device"', '"gpu": "H200", "memory_gib": 1, "cuda": 1, "device"')
    )
    text = results.page([path])
    assert "bench.step_gpu --results" in text and "A training step: " not in text
    path.write_text(path.read_text().replace("2.0]", "2.5]"))
    assert results.page([path]) != text


def test_check_fails_on_a_page_that_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    readme = tmp_path / "README.md"
    readme.write_text(results.README.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(results, "README", readme)
    monkeypatch.setattr(sys, "argv", ["x"])
    results.main()
    assert readme.read_text("utf-8") == (ROOT / "README.md").read_text("utf-8")
    monkeypatch.setattr(sys, "argv", ["x", "--check"])
    results.main()
    right = results.PAGE.read_text("utf-8")
    results.PAGE.write_text(right + "10x faster\n", "utf-8")
    with pytest.raises(SystemExit, match=r"results\.md is stale"):
        results.main()
    results.PAGE.write_text(right, "utf-8")
    readme.write_text(re.sub(r"(\d)(\.\d+ times)", r"1\1\2", readme.read_text("utf-8")), "utf-8")
    with pytest.raises(SystemExit, match=r"README\.md is stale"):
        results.main()


def test_readmes_figures_are_of_the_newest_run_of_the_largest_model(tmp_path):
    """A quick run of a smaller model that came later does not take their place. A rival's faster
    dtype stands beside the default's figure."""
    paths = []
    for number, (parameters, median) in enumerate(((9, "3.00"), (9, "4.00"), (1, "5.00"))):
        paths.insert(0, tmp_path / f"{9 - number}.jsonl")  # names and places say nothing of time
        for name in results.RIVALS:
            for suffix, ratio in (("", median), (", bf16", "2.50")):
                measure.Results(paths[0]).add(
                    "step", name + suffix, [1.0], shapes={"parameters": parameters * 10**6},
                    nanomed_is_faster_by=f"{ratio} (2.00 to 6.00)", setting="TRL 7: bf16=True",
                )  # fmt: skip
    text = " ".join(results.figures(paths).split())
    assert text.count("4.00 times (2.00 to 6.00) as fast as") == len(results.RIVALS)
    assert text.count("2.50 times (2.00 to 6.00) as fast as it in bfloat16") == len(results.RIVALS)
    assert "SFT: 4.00 times" in text and "TRL 7 as shipped" in text
    assert results._times("no difference (0.97 to 1.02)").startswith("as fast (no difference, 0.97")


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


def test_a_part_of_the_gpu_script_that_breaks_stops_no_other(tmp_path):
    """One that breaks is not one that runs out of time: only then the step is tried again."""
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\ncase "$*" in *bench.step*) exit $CODE;; esac\n', "utf-8")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for code, again in ((3, True), (124, False)):
        folder = tmp_path / str(code)
        run = subprocess.run(
            ["bash", "bench/gpu.sh", str(folder), "300"], cwd=ROOT, capture_output=True, text=True,
            timeout=60, env=os.environ | {"PATH": path, "CODE": str(code)},
        )  # fmt: skip
        assert run.returncode == 1 and "skipped" not in run.stdout
        assert ("== step without Triton, at most" in run.stdout) == again
        assert f"== not whole: step (exit {code})" in run.stdout
        for part in ("tests", "attention", "kernels", "layer", "growth", "rows"):
            assert f"== {part} took" in run.stdout, part
