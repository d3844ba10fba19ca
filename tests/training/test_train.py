"""train_sft.py as a user meets it: what it refuses, what it prints, what it leaves behind."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import kernels
import train_sft
from nanomed import hf, store
from nanomed.batches.loader import Loader
from nanomed.config import MODELS, SFT, InputError
from nanomed.distributed import shard
from nanomed.model.decoder import Aquila, init_weights
from nanomed.model.generation import greedy_in_lockstep
from nanomed.records import Chat, chats_of
from nanomed.stages import stage
from nanomed.training.trainer import fit
from tests.conftest import ROOT

CHAT = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}


def write(path, *records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


# ---------------------------------------------------------------- refused before the first step


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "none.jsonl"], "none.jsonl: No such file"),
        (["--data", "EMPTY"], "holds no record: the file is empty"),
        (["--data", "BROKEN"], "record 2: broken JSON"),
        (
            ["--data", "UNKNOWN"],
            "record 1: .*unknown fields; found 'foo'; known, the nearest first",
        ),
        (["--data", "NO_ANSWER"], "record 1: .*no assistant turn"),
        (["--data", "SURROGATE"], r"record 1: field 'messages\[0\].content': a lone surrogate"),
        (["--data", "ONE", "LINK"], "LINK is given twice; --epochs repeats data"),
        (["--data", "ONE"], "leaves 0 held out and 1 to train on|leaves 1 held out and 0"),
        (["--lr", "abc"], "--lr: invalid float value"),
        (["--batch_sise", "8"], "did you mean --batch_size"),
        (["--seq_len", "8192", "--micro_tokens", "8192"], "over the model's maximum 4096"),
        (["--seq_len", "64", "--micro_tokens", "32"], "--micro_tokens is 32; it must be at least"),
        (["--out", "USED"], "already holds a run; go on with it by --resume"),
        (["--out", "FRESH", "--resume"], "FRESH holds no checkpoint"),
        (["--init", "none"], "none: no such folder"),
        (["--init", "FRESH", "--model", "tiny"], "--init .* fixes the model"),
        (["--init", "FRESH", "--tokenizer", "TOKENIZER"], "config.json: .*No such file"),
        (["--tokenizer", "none"], "no tokenizer at none"),
        (["--kernels", "trition"], "--kernels.*did you mean triton"),
        (["--device", "cuda"], "this machine's GPU.*DEVICES: empty.*--device cpu"),
    ],
)
def test_bad_input_is_met_before_the_first_step(world, tmp_path, monkeypatch, flags, message):
    (tmp_path / "FRESH").mkdir()
    (tmp_path / "USED").mkdir()
    (tmp_path / "USED/config.json").write_text("{}")
    files = {
        "EMPTY": (tmp_path / "EMPTY").write_text("") and "",
        "BROKEN": (tmp_path / "BROKEN").write_text(json.dumps(CHAT) + '\n{"messages": ['),
        "UNKNOWN": write(tmp_path / "UNKNOWN", {"foo": 1}),
        "NO_ANSWER": write(tmp_path / "NO_ANSWER", {"messages": CHAT["messages"][:1]}),
        "SURROGATE": write(
            tmp_path / "SURROGATE",
            {"messages": [{"role": "user", "content": "a\ud83d"}, CHAT["messages"][1]]},
        ),
        "ONE": write(tmp_path / "ONE", CHAT),
    }
    (tmp_path / "LINK").symlink_to(tmp_path / "ONE")
    places = {name: str(tmp_path / name) for name in (*files, "FRESH", "USED", "LINK")}
    places["TOKENIZER"] = str(ROOT / "samples/tokenizer.model")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *(places.get(flag, flag) for flag in flags)])
    monkeypatch.setattr(train_sft, "start", lambda _: nullcontext(world))
    monkeypatch.setattr(train_sft, "fit", lambda *_: pytest.fail("a step was reached"))
    with pytest.raises(InputError, match=message):
        train_sft.main()


def test_triton_without_a_gpu_is_refused_and_never_replaced(monkeypatch):
    """The interpreter is for tests; a Triton that does not import is named."""
    cpu, cuda, c = torch.device("cpu"), torch.device("cuda"), SFT(kernels="triton")
    model = MODELS["tiny"]
    monkeypatch.setattr(kernels, "_chosen", "auto")  # and back to it
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    stage.choose_kernels(c, model, cpu)
    assert kernels.in_force(cpu, torch.bfloat16, 64) == "triton"
    odd = dataclasses.replace(model, n_heads=2, n_kv_heads=1, d_model=160)
    with pytest.raises(InputError, match=r"heads of \(16, 32, 64, 128\), the model's are 80 wide"):
        stage.choose_kernels(c, odd, cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match=r"needs a CUDA device.*--kernels auto"):
        stage.choose_kernels(c, model, cpu)
    monkeypatch.setattr(kernels, "triton_error", lambda: "No module named 'triton'")
    with pytest.raises(InputError, match=r"No module named 'triton'.*--kernels reference"):
        stage.choose_kernels(c, model, cuda)
    stage.choose_kernels(SFT(), model, cuda)
    assert kernels.in_force(cuda, torch.bfloat16, 64) == "reference"


def test_an_embedding_is_never_resized_silently():
    """Spare rows are kept (and printed), missing ones are an error; the tiny model
    alone has no vocabulary of its own."""
    config, encoder = stage.model_and_encoder(SFT(model="aquilamed-7b"))
    assert config.vocab_size == 151_851 > encoder.tokenizer.vocab_size
    config, encoder = stage.model_and_encoder(SFT())
    assert config.vocab_size == encoder.tokenizer.vocab_size


# ---------------------------------------------------------------- a run, from outside


# The script, but at the end it asks every fifth question and takes four tokens of an answer: after
# five steps no answer would end before its limit.
SHORT = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
from nanomed.stages import world
world.LONGEST, read = 4, world.read_json
world.read_json = lambda path: [*read(path)][::5]
runpy.run_path(sys.path[0] + "/train_sft.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short run of the script on samples/ and two processes: its screen and its folder."""
    folder = tmp_path_factory.mktemp("run") / "out"
    (folder.parent / "short.py").write_text(SHORT)
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node 2 {folder.parent}/short.py"
    flags = f"--out {folder} --steps 5 --log_every 2 --batch_size 8 --val_fraction 0.03"
    command = [sys.executable, *torchrun.split(), str(ROOT), *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    return run, folder


def test_what_a_run_prints(finished):
    run, folder = finished
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert lines[-1] == f"run folder: {folder}"
    (begun,) = (line for line in lines if line.startswith("sft of tiny from nothing"))
    assert "configs/sft.toml" in begun  # how to run the paper's setting
    assert sum(line.startswith("step 1/5 ") for line in lines) == 1  # rank 0 alone prints
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        "1/5",
        "2/5",
        "4/5",
        "5/5",
    ]
    assert len([line for line in lines if line.startswith("  answer")]) == 5
    assert "fact stated in training, in other words" in run.stdout
    assert sum("chance is 25%" in line for line in lines) == 6
    assert "<|im_end|>⟧" in run.stdout  # an example with its mask
    assert sum(line.startswith("kernels: reference (") for line in lines) == 1


def test_what_a_run_leaves_behind(finished):
    _, folder = finished
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 4, 5]
    for name in ("lr", "grad_norm", "tokens_per_s", "trained_share", "peak_memory_gb"):
        assert all(m[name] > 0 for m in steps)
    assert [m["step"] for m in metrics if "val_loss" in m] == [0, 5]
    assert json.loads((folder / "config.json").read_text())["steps"] == 5
    assert json.loads((folder / "data_report.json").read_text())["examples"] == 1600
    assert (folder / "checkpoints/best").resolve().name == "step-000005"
    results = json.loads((folder / "results.json").read_text())
    assert results["option_letters"]["of"] == results["held_out_answers"]["of"] == 16
    assert folder.stat().st_mode & 0o777 == 0o700  # the data may be patients'


def test_the_export_loads_in_transformers(finished, encoder):
    """With no custom code: equal logits, equal ids, and it stops where a turn ends."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[1] / "export"
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = hf.load(folder)
    prompt = encoder.prompt(Chat([("user", "什么是高血压？")]))
    messages = [{"role": "user", "content": "什么是高血压？"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer(text)["input_ids"] == prompt
    from nanomed.batches.packing import row_from

    with torch.no_grad():
        difference = theirs(torch.tensor([prompt])).logits[0] - ours(
            row_from([prompt]), logits=True
        )
    assert difference.abs().max() < 1e-4
    assert encoder.turn_end in theirs.generation_config.eos_token_id


def test_a_run_folder_or_its_export_starts_another_run(finished, world):
    """--init takes either; the model, the tokenizer and the template come with it."""
    _, folder = finished
    weights = []
    for init in (folder, folder / "export"):
        c = SFT(init=str(init), seq_len=512)
        config, encoder = stage.model_and_encoder(c)
        model = stage.build_model(c, config, world)
        assert model.layers[0].dropout.p == c.dropout and encoder.template.name == "chatml"
        weights.append([*model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_folder_that_is_written_to_is_left_alone(tmp_path, world):
    from nanomed.run.log import RunFolder

    first = RunFolder(SFT(out=str(tmp_path / "x")), world)
    (tmp_path / "x/config.json").unlink()
    with pytest.raises(InputError, match="another process is writing"):
        RunFolder(SFT(out=str(tmp_path / "x")), world)
    first.close()


def test_without_out_the_next_free_folder(tmp_path, world, monkeypatch):
    from nanomed.run.log import RunFolder

    monkeypatch.chdir(tmp_path)
    paths = [RunFolder(SFT(), world).path.as_posix() for _ in range(2)]
    assert paths == ["runs/sft-001", "runs/sft-002"]
    assert (tmp_path / "runs/sft").resolve().name == "sft-002"  # so that DPO finds the newest


# ---------------------------------------------------------------- it learns, and stops


def test_eight_chats_are_learned_by_heart_and_every_answer_ends(tmp_path, encoder, world):
    """Greedy generation gives all 8 last answers of multi-turn chats, and stops by itself on all
    8."""
    chats = long_chats(encoder, 8)
    data_file = write(tmp_path / "chats.jsonl", *chats)
    data = store.chats([data_file], encoder, 1024, 0.0)
    n = 64  # epochs of one step
    c = SFT(batch_size=8, micro_tokens=4096, lr=8e-3, dropout=0.0, seq_len=1024, epochs=n,
            warmup_ratio=0.1, min_lr_ratio=0.05, log_every=n, save_every=n, eval_every=n,
            out=str(tmp_path / "run"))  # fmt: skip
    config = dataclasses.replace(
        stage.MODELS["tiny"],
        vocab_size=encoder.tokenizer.vocab_size,
        n_layers=1,
        d_model=128,
        n_heads=2,
        n_kv_heads=1,
        d_ff=384,
    )
    with torch.device("meta"):
        model = Aquila(config)
    shard(model, world, torch.float32)
    model.to_empty(device="cpu")
    init_weights(model)
    loader = Loader(c, data, parts=(np.arange(8), np.arange(0)))
    run = train_sft.RunFolder(c, world)
    fit(c, model, loader, train_sft.next_token_loss, run)
    run.close()

    parsed = [chats_of(chat)[0] for chat in chats]
    prompts = [encoder.prompt(Chat(chat.turns[:-1])) for chat in parsed]
    answers = greedy_in_lockstep(model, prompts, {encoder.turn_end}, 120)
    assert all(len(ids) < 120 for ids in answers)  # stopped by itself
    assert [encoder.tokenizer.decode(ids) for ids in answers] == [c.turns[-1][1] for c in parsed]


def long_chats(encoder, n: int) -> list[dict]:
    """The n shortest multi-turn chats of samples/ whose answers all have 20 tokens or more, no
    two alike."""
    chats, seen = [], set()
    for line in sorted((ROOT / "samples/sft.jsonl").read_text().splitlines(), key=len):
        record = json.loads(line)
        answers = [m["content"] for m in record["messages"] if m["role"] == "assistant"]
        long = all(len(encoder.tokenizer.encode(answer)) >= 20 for answer in answers)
        if len(answers) > 1 and long and not seen & set(answers):
            seen |= set(answers)
            chats.append(record)
    assert len(chats) >= n
    return chats[:n]
