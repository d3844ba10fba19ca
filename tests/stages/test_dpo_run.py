"""train_dpo.py as a user meets it: where it starts from, and what it prints."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_dpo
from nanomed import hf
from nanomed.config import DPO, ModelConfig
from nanomed.model.decoder import Aquila
from nanomed.records import Chat, read_records
from nanomed.stages import stage
from nanomed.stages.answers import said
from tests.conftest import ROOT


def test_without_a_fine_tuned_model_the_user_is_told_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stage.with_newest_sft(DPO()) == DPO()
    assert capsys.readouterr().out == (
        "no fine-tuned model in runs/: this starts from an untrained one and shows little; run "
        "`torchrun --nproc_per_node 2 train_sft.py` first\n"
    )
    monkeypatch.setenv("RANK", "1")  # one process says it
    stage.with_newest_sft(DPO())
    monkeypatch.delenv("RANK")
    for told in ({"init": "elsewhere"}, {"model": "tiny"}, {"config": "configs/dpo.toml"}):
        assert stage.with_newest_sft(DPO(**told)) == DPO(**told)
    (tmp_path / "runs/sft-002/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/sft").symlink_to("sft-002")
    assert stage.with_newest_sft(DPO()).init == "runs/sft-002"
    shutil.move(tmp_path / "runs", tmp_path / "large disk")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("runs").symlink_to("../large disk")
    assert stage.with_newest_sft(DPO()).init == "runs/sft-002"
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- what it shows of its text


def run_on(pairs: str, monkeypatch) -> None:
    """Two steps, from and into the folder where we are."""
    flags = "--seq_len 256 --micro_tokens 512 --batch_size 8 --steps 2 --lr 0.03 --val_fraction 0.3"
    command = f"train_dpo.py --init start --data {pairs} --out run --device cpu {flags}"
    monkeypatch.setattr(sys, "argv", command.split())
    train_dpo.main()
    torch.set_num_threads(1)


@pytest.fixture
def workplace(tmp_path, monkeypatch, encoder) -> Path:
    """Twenty pairs of the samples and a model of random weights."""
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "samples/dpo.jsonl").read_text("utf-8").splitlines(True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:20]), "utf-8")
    torch.manual_seed(0)
    model = Aquila(ModelConfig(encoder.tokenizer.vocab_size, 1, 64, 2, 1, 96, 512, 1e6, 1e-5, True))
    hf.export(model, encoder.tokenizer, tmp_path / "start", torch.float32, encoder.template)
    return tmp_path


def answers_of_transformers(folder: Path, encoder, questions: list[str]) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for question in questions:
        prompt = encoder.prompt(Chat([("user", question)]))
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64,
            eos_token_id=[encoder.turn_end, encoder.document_end], pad_token_id=0,
        )  # fmt: skip
        new = out[0, len(prompt) :].tolist()
        stops = {encoder.turn_end, encoder.document_end}
        answers.append(encoder.tokenizer.decode([i for i in new if i not in stops]))
    return answers


def test_dpo_shows_answers_before_and_after(workplace, monkeypatch, capsys, encoder):
    """Held-out questions with the chosen answer as the reference, answered by the weights before
    the first step and by those of the best checkpoint: transformers says the same of both."""
    run_on("few.jsonl --show_text", monkeypatch)
    screen = capsys.readouterr().out
    start, before, after = (
        "start: loss within", "answered by the model as it starts (greedy):",
        "answered by the best checkpoint (greedy):",
    )  # fmt: skip
    places = [
        screen.index(x) for x in (start, before, "step 1/2", "step 2/2", after, "exported to")
    ]
    assert places == sorted(places)
    assert screen.count(before) == screen.count(after) == 1

    parts = screen[places[1] : places[2]], screen[places[4] :]
    records = {r["conversations"][0]["value"]: r for _, r, _ in read_records("few.jsonl")}
    questions = [q for q in records if said("question", q) in parts[0]]
    assert 2 <= len(questions) <= 6
    both = [answers_of_transformers(Path(f), encoder, questions) for f in ("start", "run/export")]
    assert both[0] != both[1]
    for part, answers in zip(parts, both, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            _, shown = part.split(said("question", question))
            _, shown = shown.split("\n", 1)  # behind the question stands what training knows of it
            reference = records[question]["chosen"]
            wanted = said("reference", reference) + "\n" + said("answer", answer) + "\n"
            assert shown.startswith(wanted)


def test_text_that_may_be_a_patients_stays_off_the_screen(workplace, monkeypatch, capsys):
    """Also where it lies in a folder that is called samples, but is not the project's."""
    (workplace / "samples").mkdir()
    shutil.move("few.jsonl", "samples/clinic.jsonl")
    run_on("samples/clinic.jsonl", monkeypatch)
    said = capsys.readouterr().out
    assert "step 2/2" in said and "answered by" not in said
    for _, record, _ in read_records("samples/clinic.jsonl"):
        texts = record["conversations"][0]["value"], record["chosen"], record["rejected"]
        assert not any(text in said for text in texts)


def test_one_sentence_says_what_happens():
    def sentence(chosen, rejected):
        return train_dpo.what_happens(
            {
                "val_log_ratio_per_token/chosen": chosen,
                "val_log_ratio_per_token/rejected": rejected,
            }
        )

    assert "not grown" in sentence(0.0, 0.0)
    assert "rejected ones fall" in sentence(0.1, -0.1)
    assert "rise less" in sentence(0.2, 0.1)
    assert sentence(-0.1, -0.3).startswith("warning: chosen answers became less likely")
