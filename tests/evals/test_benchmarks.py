"""A whole evaluation: its three files, its figures beside lm-eval's, kills and refusals."""

import dataclasses
import json
import math
import os
import signal
import socket
import statistics

import pytest
import torch

import evaluate
import kernels
from nanomed import locks
from nanomed.config import InputError
from nanomed.evals import benchmarks, folder
from nanomed.model.decoder import Aquila
from nanomed.model.scoring import Scorer
from nanomed.text import tokenizer
from tests.conftest import ROOT
from tests.evals.test_requests import GOLDEN, RECORDED, write_golden, write_lines
from tests.folders import edit_config, write_model
from tests.forks import Group, server
from tests.pretend import CUDA, pretended

MEDQA, MMLU = GOLDEN[2], GOLDEN[0]


def write_folder(folder, seed: int = 0):
    """A model of random weights with the samples' tokenizer."""
    tok = tokenizer.load(ROOT / "samples/tokenizer.model")
    write_model(folder, "qwen2", tok.vocab_size, seed=seed)
    tokenizer.copy(tok, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_golden(MEDQA, folder)
    for subject in ("anatomy", "clinical_knowledge", "college_biology", "college_medicine"):
        write_golden(MMLU | {"folder": f"cais/mmlu/{subject}"}, folder)
    for subject in ("medical_genetics", "professional_medicine"):
        write_golden(MMLU | {"folder": f"cais/mmlu/{subject}"}, folder)
    return folder


def argv(model, data, out, *more: str) -> list[str]:
    fixed = [
        "--model",
        model,
        "--data",
        data,
        "--out",
        out,
        "--shots",
        "1",
        "--micro_tokens",
        "900",
    ]
    more = more or ("--tasks", "medqa_4options", "mmlu_med")
    return [*map(str, fixed), *more]


@pytest.fixture(scope="module")
def done(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "evals"
    evaluate.score(argv(model, data, out))
    return out


def files_of(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_figures_are_the_items(done):
    items = benchmarks.read_items(done)
    results = json.loads((done / "results.json").read_text())
    assert len(items) == 32 + 6 * 5
    mine = [item for item in items if item["id"].startswith("medqa")]
    right = [item["pred"] == item["gold"] for item in mine]
    medqa = results["medqa_4options"]
    assert medqa["n"] == 32 and medqa["acc"] == statistics.mean(right)
    assert medqa["stderr"] == pytest.approx(statistics.stdev(right) / math.sqrt(32))
    assert all(item["pred"] == max(range(4), key=item["logprobs"].__getitem__) for item in items)
    assert sum(chosen for chosen, _ in medqa["letters"].values()) == 32
    assert medqa["chance"] == 0.25
    gold = [item["gold"] for item in mine]
    assert medqa["majority"]["acc"] == max(map(gold.count, gold)) / 32


def test_a_groups_figures(done):
    """The six tasks have the same items here, so five of the thirty are distinct; micro, macro and
    the pooled error are then those of one task, the last one over six times the items."""
    results = json.loads((done / "results.json").read_text())
    one, group = results["mmlu_anatomy"], results["mmlu_med"]
    assert group["n"] == 30 and group["distinct"]["n"] == 5
    accuracies = [results[name]["acc"] for name in group["tasks"]]
    assert group["acc"] == pytest.approx(statistics.mean(accuracies)) == group["macro"]
    variances = [(5 - 1) * 5 * results[name]["stderr"] ** 2 for name in group["tasks"]]
    assert group["stderr"] == pytest.approx(math.sqrt(sum(variances) / 24 / 30))
    assert one["in_own_shots"] == 0 and "mmlu_med_nine" not in results


def test_uneven_choices_are_warned_of(done, model, data, capsys):
    evaluate.score(argv(model, data, done))  # all is there: it is shown again
    shown = capsys.readouterr().out
    assert "choices have different numbers of tokens" in shown and "(1, 1, 1, 2)" in shown
    assert "chosen (right)" in shown


def test_an_evaluation_that_was_cut_anywhere_goes_on_to_the_same_bytes(done, model, data, tmp_path):
    whole = files_of(done)
    items, out = whole["items.jsonl"], tmp_path / "out"
    turned = argv(model, data, out, "--tasks", "mmlu_med", "medqa_4options")
    for kept in (0, 1, len(items) // 3, len(items) // 2 + 7, len(items) - 1, len(items)):
        out.mkdir(exist_ok=True)
        (out / "config.json").write_bytes(whole["config.json"])
        (out / "items.jsonl").write_bytes(items[:kept])
        evaluate.score(turned if kept == len(items) // 3 else argv(model, data, out))
        assert files_of(out) == whole


def _killed(world, arguments):
    rows, row = [], Scorer._row

    def dying(*call):
        rows.append(call)
        if len(rows) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return row(*call)

    Scorer._row = dying
    evaluate.score(arguments)


def test_a_killed_evaluation_goes_on_to_the_same_bytes(done, model, data, tmp_path):
    group = Group(server(), 1, _killed, argv(model, data, tmp_path / "out"))
    assert group.wait(60) == [-signal.SIGKILL]
    left = (tmp_path / "out/items.jsonl").read_bytes()
    assert 0 < len(left) < len((done / "items.jsonl").read_bytes())
    evaluate.score(argv(model, data, tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(done)


def test_another_model_and_other_settings_are_refused(done, model, data, tmp_path):
    other = write_folder(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"other settings: weights was \w+, is \w+\. Choose"):
        evaluate.score(argv(other, data, done))
    for more, name in (
        (["--shots", "2"], "shots"),
        (["--protocol", "chat"], "protocol"),
        (["--limit", "3"], "requests"),
        (["--micro_tokens", "800"], "micro_tokens"),
    ):
        with pytest.raises(InputError, match=f"{name} was"):
            evaluate.score([*argv(model, data, done), *more])
    same = write_folder(tmp_path / "same")
    edit_config(same, rms_norm_eps=1e-2)  # the same weights compute other numbers
    with pytest.raises(InputError, match=r"settings: model was .*'norm_eps': 1e-05"):
        evaluate.score(argv(same, data, done))


def test_two_at_once_do_not_write_into_one_folder(done, model, data):
    whole = files_of(done)
    with (
        locks.take(done / "items.jsonl"),
        pytest.raises(InputError, match=f"another process is writing to {done}"),
    ):
        evaluate.score(argv(model, data, done))
    assert files_of(done) == whole


def test_a_models_folder_is_no_place_for_results(model, data):
    with pytest.raises(InputError, match=r"config.json is not an evaluation's; choose an --out"):
        evaluate.score(argv(model, data, model))
    assert not (model / "items.jsonl").exists()


def test_other_data_and_another_template_are_refused(model, tmp_path):
    records = MEDQA["splits"]["test"][:4]
    path = tmp_path / "data" / MEDQA["folder"] / "test.jsonl"
    write_lines(path, records)
    tasks = ("--tasks", "medqa_4options", "--shots", "0", "--protocol", "chat")
    arguments = argv(model, tmp_path / "data", tmp_path / "out", *tasks)
    evaluate.score(arguments)
    template = tmp_path / "template.json"
    _, encoder = evaluate.pretrained.describe(model)
    template.write_text(encoder.template.to_json().replace("medical domain", "general"))
    with pytest.raises(InputError, match="template was"):
        evaluate.score([*arguments, "--template", str(template)])
    write_lines(path, [*records[:3], records[3] | {"ending0": "another option"}])
    with pytest.raises(InputError, match=r"files was.*requests was"):
        evaluate.score(arguments)


def test_what_is_missing_is_said_for_all_tasks_before_a_model_is_read(data, tmp_path):
    arguments = argv("no model", data, tmp_path, "--tasks", "medqa_4options", "medmcqa", "cmexam")
    folder = write_folder(tmp_path / "m")
    with pytest.raises(InputError) as error:
        evaluate.score([*arguments, "--model", str(folder)])
    assert "medmcqa: " in str(error.value) and "cmexam: " in str(error.value)
    assert str(error.value).endswith("without them: --tasks medqa_4options")


@pytest.mark.parametrize("more", [["--protocol", "chat", "--bos", "yes"], ["--template", "chatml"]])
def test_a_flag_that_the_protocol_does_not_read_is_refused(more, model, data, tmp_path):
    with pytest.raises(InputError, match=f"{more[-2]} has no part in protocol"):
        evaluate.score([*argv(model, data, tmp_path / "o"), *more])


def test_no_socket_is_opened(model, data, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    evaluate.score(argv(model, data, tmp_path / "o", "--tasks", "medqa_4options", "--limit", "2"))
    assert (tmp_path / "o/results.json").exists()


def test_lm_evals_own_figures(tmp_path):
    """Accuracy and its standard error, as lm-eval printed them for the recorded requests."""
    if not (RECORDED / "model/model.safetensors").exists():
        pytest.skip("../shared/golden/lm_eval/model is absent")
    tasks = ["medqa_4options", "careqa_en", "ceval-valid_basic_medicine", "mmlu_anatomy"]
    arguments = argv(RECORDED / "model", RECORDED / "data", tmp_path, "--tasks", *tasks)
    evaluate.score([*arguments, "--shots", "0"])
    found = json.loads((tmp_path / "results.json").read_text())
    for task in tasks:
        recorded = json.loads((RECORDED / f"{task}-0shot.json").read_text())["results"]
        assert found[task]["acc"] == pytest.approx(recorded["acc,none"], abs=1e-12)
        assert found[task]["stderr"] == pytest.approx(recorded["acc_stderr,none"], abs=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_the_record_says_which_attention_ran(small, monkeypatch):
    """In float32 and for heads of 80 it is torch's, also where Triton's is measured."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernels, "_is_measured", lambda device: True)
    wide = dataclasses.replace(small, d_model=160)
    mixed, bf16 = "triton, attention reference", torch.bfloat16
    tok = tokenizer.load(ROOT / "samples/tokenizer.model")
    cases = (small, torch.float32, mixed), (wide, bf16, mixed), (small, bf16, "triton")
    for config, dtype, label in cases:
        with pretended():
            with torch.device("meta"):
                model = Aquila(config).to(dtype)
            found = folder.identity(model.to_empty(device=CUDA), tok, None)
        assert found["kernels"] == f"{label}, torch {torch.__version__}"
