"""Generation: cached is uncached, batched is alone, sampling is what it says, files go on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanomed import locks
from nanomed.batches.packing import row_from
from nanomed.config import InputError, ModelConfig
from nanomed.hf import pretrained
from nanomed.model import generation as g
from nanomed.model.cache import LayerCache
from nanomed.model.decoder import Aquila
from nanomed.model.generation import Sampling, choose, generate
from nanomed.tools import generate as command
from tests.folders import SENTENCES, write_model, write_rank_file

ROOT = Path(__file__).parents[2]


def make(n_kv_heads=2, seed=0, max_seq_len=128):
    config = ModelConfig(200, 2, 32, 4, n_kv_heads, 48, max_seq_len, 1e4, 1e-5, True)
    model = Aquila(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.3)  # sharp enough that no two tokens tie
    return model


@pytest.fixture(scope="module")
def model():
    return make()


def prompts(n=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (n,), generator=rng).tolist()
    return [torch.randint(0, 200, (m,), generator=rng).tolist() for m in lengths]


@torch.no_grad()
def uncached(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(row_from([ids]), logits=True)[-1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_cached_is_uncached_and_batched_is_alone(n_kv_heads):
    model = make(n_kv_heads)
    batch = generate(model, prompts(), set(), Sampling(max_new=25))
    for prompt, (ids, end) in zip(prompts(), batch, strict=True):
        assert end == "length" and len(ids) == 25
        assert ids == uncached(model, prompt, 25)
        assert ids == generate(model, [prompt], set(), Sampling(max_new=25))[0][0]


def test_a_cache_that_is_one_position_off_is_noticed(model, monkeypatch):
    """The comparison above can fail."""
    attend = LayerCache._attend_to_past
    off = lambda self, q, positions: attend(self, q, (positions - 1).clamp(0))  # noqa: E731
    monkeypatch.setattr(LayerCache, "_attend_to_past", off)
    prompt = prompts()[1]
    assert generate(model, [prompt], set(), Sampling(max_new=25))[0][0] != uncached(
        model, prompt, 25
    )


@torch.no_grad()
def test_logits_of_the_cache_entry(model):
    """Each sequence's last logits, after the prompts and after one more token of each."""
    rows = prompts(3)
    cache = [LayerCache(3, 60) for _ in model.layers]
    after_prompts = g._next(model, row_from(rows), cache)
    more = torch.tensor([5, 6, 7])
    step = g._one_each(more, [len(row) for row in rows])
    after_step = g._next(model, step, cache)
    for i, row in enumerate(rows):
        logits = model(row_from([[*row, int(more[i])]]), logits=True)
        assert torch.allclose(after_prompts[i], logits[-2], atol=1e-5)
        assert torch.allclose(after_step[i], logits[-1], atol=1e-5)


def test_stops_at_a_stop_token_and_leaves_it_out(model):
    free = [ids for ids, _ in generate(model, prompts(), set(), Sampling(max_new=30))]
    stop = {free[0][4], free[3][9]}
    for whole, (ids, end) in zip(
        free, generate(model, prompts(), stop, Sampling(max_new=30)), strict=True
    ):
        at = next((i for i, token in enumerate(whole) if token in stop), None)
        assert ids == whole[:at]
        assert end == ("length" if at is None else "stop")
    assert any(end == "stop" for _, end in generate(model, prompts(), stop, Sampling(max_new=30)))


def test_the_models_length_is_a_limit(model):
    ids, end = generate(model, [[3] * 120], set(), Sampling(max_new=50))[0]
    assert len(ids) == 8 and end == "length"  # 128 in all
    for bad in ([3] * 128, []):
        with pytest.raises(InputError, match=r"prompt 1 has \d+ tokens; the model reads 1 to 127"):
            generate(model, [[1], bad], set(), Sampling())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, max_new=20, seed=3),
        Sampling(temperature=1.5, top_k=7, max_new=20),
        Sampling(temperature=1.0, top_p=0.7, repetition_penalty=1.3, max_new=20),
    ],
)
def test_seeds_decide_and_neighbours_do_not(model, sampling):
    batch = generate(model, prompts(), set(), sampling)
    assert batch == generate(model, prompts(), set(), sampling)
    for i, prompt in enumerate(prompts()):
        assert generate(model, [prompt], set(), sampling, first=i) == [batch[i]]
    other = Sampling(**{**vars(sampling), "seed": sampling.seed + 1})
    assert batch != generate(model, prompts(), set(), other)
    for seed in (2**63, -1):  # more than a generator takes, times what parts seeds
        generate(model, prompts(2), set(), Sampling(temperature=1.0, max_new=1, seed=seed))


def draw(logits, sampling, n=4000, seen=None):
    v = len(logits)
    seen = torch.zeros(v, dtype=torch.bool) if seen is None else seen
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor(logits).expand(n, v)
    tokens = choose(rows, seen.expand(n, v), sampling, [generator] * n)
    return torch.bincount(tokens, minlength=v) / n


def test_frequencies_are_the_probabilities():
    logits = [0.0, 1.0, 2.0, -1.0]
    wanted = (torch.tensor(logits) / 0.7).softmax(0)
    assert torch.allclose(draw(logits, Sampling(temperature=0.7)), wanted, atol=0.03)
    assert not torch.allclose(draw(logits, Sampling(temperature=1.0)), wanted, atol=0.03)


def test_top_k_and_top_p_keep_the_most_likely():
    logits = torch.tensor([0.1, 0.2, 0.4, 0.3]).log().tolist()
    two = torch.tensor([0, 0, 4 / 7, 3 / 7])
    assert torch.allclose(draw(logits, Sampling(temperature=1, top_k=2)), two, atol=0.03)
    assert torch.allclose(draw(logits, Sampling(temperature=1, top_p=0.6)), two, atol=0.03)
    only = draw(logits, Sampling(temperature=1, top_p=0.01))
    assert only[2] == 1  # never none


def test_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3], [4, 4, 4], [7, 8, 9]])
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    ids[0, 0] = logits[0].argmax()
    seen[0, ids[0, 0]] = True
    wanted = RepetitionPenaltyLogitsProcessor(5.0)(ids, logits.clone()).argmax(-1)
    greedy = Sampling(repetition_penalty=5.0)
    assert choose(logits, seen, greedy, []).tolist() == wanted.tolist()
    assert wanted[0] != logits[0].argmax()


@pytest.mark.parametrize(
    "name, value", [("temperature", -1), ("top_p", 0.0), ("top_k", -1), ("max_new", 0)]
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(InputError, match=f"--{name} is"):
        Sampling(**{name: value})


# ---------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_model(path, "qwen2")
    write_rank_file(path)
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    command.main()


def write_prompts(path, n=5):
    records = [{"prompt": s, "id": i} for i, s in enumerate(SENTENCES[:n])]
    records[1] = {"messages": [{"role": "system", "content": "短"}, *turns("问", "答", "再问")]}
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return records


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_file_of_prompts_is_answered_and_gone_on_with(folder, tmp_path, monkeypatch):
    records = write_prompts(tmp_path / "in.jsonl")
    out = tmp_path / "new/out.jsonl"
    given = ("--model", folder, "--prompts", tmp_path / "in.jsonl", "--max_new", 8)
    given += ("--temperature", 0.9, "--seed", 4, "--device", "cpu")
    run(monkeypatch, *given, "--out", out, "--batch_size", 2)
    whole = out.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{k: line[k] for k in record} for line, record in zip(lines, records, strict=True)] == (
        records
    )
    assert {line["end"] for line in lines} <= {"stop", "length"}

    # Killed in the middle of the third line: the next call ends with the same file.
    third = len("".join(whole.splitlines(keepends=True)[:2])) + 10
    out.write_text(whole[:third])
    run(monkeypatch, *given, "--out", out, "--batch_size", 3)
    assert out.read_text() == whole
    run(monkeypatch, *given, "--out", out)
    assert out.read_text() == whole

    with pytest.raises(InputError, match="other settings"):
        run(monkeypatch, *given, "--out", out, "--seed", 5)
    write_model(tmp_path / "other", "qwen2", seed=1)  # as runs/sft leads to another run in time
    write_rank_file(tmp_path / "other")
    with pytest.raises(InputError, match=r"other settings: weights was \w+, is"):
        run(monkeypatch, *given, "--out", out, "--model", tmp_path / "other")
    with locks.take(out), pytest.raises(InputError, match="another process is writing to"):
        run(monkeypatch, *given, "--out", out)
    (tmp_path / "in.jsonl").write_text('{"prompt": "another"}\n')
    with pytest.raises(InputError, match="other settings: prompts was"):
        run(monkeypatch, *given, "--out", out)
    assert out.read_text() == whole


def test_answers_of_the_command_are_those_of_the_library(folder, tmp_path, monkeypatch):
    write_prompts(tmp_path / "in.jsonl")
    given = ("--model", folder, "--prompts", tmp_path / "in.jsonl", "--device", "cpu")
    run(monkeypatch, *given, "--out", tmp_path / "out.jsonl", "--max_new", 6)
    _, encoder = pretrained.describe(folder)
    model = pretrained.load(folder, torch.device("cpu"), torch.float32)
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
    ids = encoder.prompt(command.chat_of({"messages": line["messages"]}, ""))
    assert encoder.tokenizer.decode(ids) == (
        "<|im_start|>system\n短<|im_end|>\n<|im_start|>user\n问<|im_end|>\n"
        "<|im_start|>assistant\n答<|im_end|>\n<|im_start|>user\n再问<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    stop = {encoder.turn_end, encoder.document_end}
    answer = generate(model, [ids], stop, Sampling(max_new=6))[0][0]
    assert line["answer"] == encoder.tokenizer.decode(answer)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "x"}, "'messages' or 'prompt'"),
        ({"prompt": 3}, r"messages\[0\].content': expected text, found 3"),
        ({"prompt": "\ud83d"}, "a lone surrogate"),
        ({"messages": turns("a", "b")}, "the last turn must be the user's"),
        ({"messages": []}, "the last turn must be the user's"),
        ({"messages": "x"}, "expected a list of turns"),
        ({"prompt": "x", "system": 1}, "'system': expected text, found 1"),
        ({"prompt": "x", "history": [["a", "b"]]}, "history: this cannot be followed here"),
        ({"messages": [{**turns("a")[0], "name": "Ann"}]}, r"messages\[\].name: this cannot"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(record, message, folder, tmp_path, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "good"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=f"in.jsonl, record 2.*{message}"):
        run(monkeypatch, "--model", folder, "--prompts", path, "--out", tmp_path / "out.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}


def test_the_command_says_what_is_wrong_in_one_line(folder, tmp_path):
    write_prompts(tmp_path / "in.jsonl", 2)
    command = [sys.executable, "-m", "nanomed.tools.generate", "--model", str(folder / "nothing")]
    command += ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 1 and end.stderr.count("\n") == 1
    assert end.stderr.startswith("error: ") and end.stderr.endswith("nothing: no such folder\n")
    assert not (tmp_path / "out.jsonl").exists()
