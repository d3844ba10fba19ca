"""lm-eval 0.4.13 itself on a real model over real test files: every item's verdict is the same.

`NANOMED_LM_EVAL=PYTHON pytest -m slow tests/evals/test_lm_eval.py`, PYTHON being one that has
lm-eval, and NANOMED_REAL_MODEL the model's folder. NANOMED_LM_EVAL_LIMIT asks about as many items
of each task, evenly spread over its file (PubMedQA's is sorted by its labels); without it all.
"""

import json
import os
import subprocess

import pytest

import evaluate
from nanomed.evals.benchmarks import read_items
from tests.evals.downloaded import WORKER, write_downloaded
from tests.hf.test_real_model import folder  # noqa: F401

pytestmark = pytest.mark.slow
TASKS = [f"mmlu_{name}" for name in ("anatomy", "medical_genetics", "college_biology")]
TASKS += [f"mmlu_{name}" for name in ("clinical_knowledge", "college_medicine")]
TASKS += ["mmlu_professional_medicine", "pubmedqa", "cmmlu_anatomy", "cmmlu_virology"]
TASKS += ["medqa_4options", "medmcqa"]


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("task", TASKS)
def test_every_verdict_is_lm_evals(task, shots, folder, shared_data, tmp_path):  # noqa: F811
    python = os.environ.get("NANOMED_LM_EVAL")
    if not python:
        pytest.skip("NANOMED_LM_EVAL names no Python with lm-eval")
    limit = int(os.environ.get("NANOMED_LM_EVAL_LIMIT", 0))
    n, whole = write_downloaded(task, shared_data, tmp_path / "data", limit)
    asked = {"samples": {task: list(range(n))}, "shots": shots, "batch": 1}
    command = [python, WORKER, folder, tmp_path / "data"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    worker = subprocess.run(
        [*map(str, command)],
        input=json.dumps(asked) + "\n",
        env=os.environ | offline,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    theirs = json.loads(worker.stdout)

    arguments = ["--model", folder, "--data", tmp_path / "data", "--out", tmp_path / "ours"]
    arguments += ["--shots", shots, "--tasks", task]
    evaluate.score([*map(str, arguments)])
    ours = read_items(tmp_path / "ours")
    flips, worst = [], 0.0
    for mine, item in zip(ours, theirs["items"][task], strict=True):
        if (mine["pred"] == mine["gold"]) != bool(item["acc"]):
            flips.append((mine["id"], mine["logprobs"], item["logprobs"]))
        pairs = zip(mine["logprobs"], item["logprobs"], strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    print(
        f"{task}, {shots} shots: {n} of {whole} items, {len(flips)} other verdicts, largest "
        f"difference {worst:.1e}"
    )
    assert flips == [] and worst < 1e-3
    result = json.loads((tmp_path / "ours/results.json").read_text())[task]
    assert [result["acc"], result["stderr"]] == pytest.approx(theirs["results"][task], abs=1e-9)
