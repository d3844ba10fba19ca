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
    for path in (results.PAGE, results.README):
        text = path.read_text("utf-8")
        assert results.filled(text, files) == text, "python -m bench.results"
    blocks = [name for _, name, *_ in re.findall(results.BLOCK, results.PAGE.read_text("utf-8"))]
    assert {*blocks} == {*(line["kind"] for line in measure.read(files)[0])}


def test_a_page_shows_what_was_measured(tmp_path):
    path = tmp_path / "x.jsonl"
    found = measure.Results(path)
    found.add("step", "CPT", [2.0], shapes={"T": 4096}, convention="MFU counts causal pairs")
    found.add("step", "start", [1.0, 2.0])
    found.add("a new kind", "x", [3], "GiB")
    page = "# Title\n<!-- step -->\nold\n<!-- end of step -->\n"
    text = results.filled(page, [path])
    step = text.partition("<!-- end of step -->")[0]
    assert "2,000" in step and "MFU counts causal pairs." in step and "old" not in step
    assert step.count("| name ") == 2  # other sizes, another table
    assert "GiB" not in step and step.startswith("# Title")
    assert results.filled(text, [path]) == text
    path.write_text(path.read_text().replace("2.0]", "2.5]"))
    assert results.filled(page, [path]) != text


def test_check_fails_on_a_page_that_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    paths = {name: tmp_path / getattr(results, name).name for name in ("PAGE", "README")}
    right = {name: getattr(results, name).read_text("utf-8") for name in paths}
    for name, path in paths.items():
        monkeypatch.setattr(results, name, path)
        path.write_text(re.sub(results.BLOCK, r"\1\4", right[name]), "utf-8")  # empty
    monkeypatch.setattr(sys, "argv", ["x"])
    results.main()
    assert {name: path.read_text("utf-8") for name, path in paths.items()} == right
    monkeypatch.setattr(sys, "argv", ["x", "--check"])
    results.main()
    paths["PAGE"].write_text(right["PAGE"].replace(" GB/s", " TB/s").replace("1.5", "15."), "utf-8")
    with pytest.raises(SystemExit, match=r"results\.md is stale"):
        results.main()
    paths["PAGE"].write_text(right["PAGE"].replace("<!-- step -->", ""), "utf-8")
    with pytest.raises(SystemExit, match=r"results\.md has no <!-- step -->"):
        results.main()
    paths["PAGE"].write_text(right["PAGE"], "utf-8")
    paths["README"].write_text(re.sub(r"(\d)(\.\d+ times)", r"1\1\2", right["README"]), "utf-8")
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
    text = " ".join(results.figures(*measure.read(paths)).split())
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


def test_the_tests_for_a_gpu_are_told_apart_by_how_they_ended(tmp_path):
    """One that ran nothing is not called passed; a failed one says why."""
    fake = tmp_path / "python3"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*racecheck*) echo "FAILED a_test.py - why"; echo "1 failed in 2s"; exit 1;;\n'
        '*memcheck*) echo "SKIPPED needs it"; echo "1 skipped in 2s";;\n'
        '*dpo-cuda*) exit 124;;\n*decoder*) exit 5;;\n*) echo "3 passed in 2s";;\nesac\n'
    )
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "tests/gpu.sh", str(tmp_path / "out"), "60"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    said = {line.split(" ")[0]: " ".join(line.split()[1:]) for line in run.stdout.splitlines()}
    assert run.returncode == 1 and "sanitizer-racecheck: FAILED a_test.py - why" in run.stdout
    assert said["sanitizer-racecheck"].startswith("FAILED")
    assert said["sanitizer-memcheck"].startswith("nothing ran")
    assert said["script-dpo-cuda"].startswith("STOPPED at its limit")
    assert said["script-decoder"].startswith("has no such test")
    assert said["kernels_gpu"].startswith("passed") and len(list(tmp_path.glob("out/*.log"))) == 17
