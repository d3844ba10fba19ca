"""The endpoint: OpenAI's own client, our labeller and our judge get what the model says."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial

import pytest
import torch

import evaluate
from nanomed.batches.packing import row_from
from nanomed.build.labeller import Endpoint, Request
from nanomed.config import InputError
from nanomed.hf import pretrained
from nanomed.model.generation import Sampling, generate
from nanomed.records import Chat
from nanomed.tools import serve, serve_jobs
from nanomed.tools.chat import SAFETY
from tests.evals.test_requests import write_lines
from tests.folders import write_model, write_rank_file
from tests.tools.serving import serving
from tests.training.test_signals import _until

QUESTION = [{"role": "user", "content": "头痛 and fever?"}]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model of random weights that reads bytes: many of its tokens are halves of characters."""
    path = tmp_path_factory.mktemp("model")
    write_model(path, "qwen2", max_position_embeddings=1024)
    write_rank_file(path)
    model = pretrained.load(path, torch.device("cpu"), torch.float32)
    return model, pretrained.describe(path)[1]


@pytest.fixture(scope="module")
def served(loaded):
    with serving(*loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    made = openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)
    return partial(made.chat.completions.create, model="any"), made


def ids_of(loaded, text: str, max_new: int) -> list[int]:
    model, encoder = loaded
    prompt = encoder.prompt(Chat([("user", text)]))
    stop = {encoder.turn_end, encoder.document_end}
    return generate(model, [prompt], stop, Sampling(max_new=max_new))[0][0]


def test_openais_client_gets_the_models_greedy_answer(client, loaded):
    ask, made = client
    assert [model.id for model in made.models.list()] == ["the-model"]
    ids = ids_of(loaded, QUESTION[0]["content"], 20)
    reply = ask(messages=QUESTION, temperature=0, max_tokens=20)
    assert reply.choices[0].message.content == loaded[1].tokenizer.decode(ids)
    assert reply.choices[0].finish_reason == "length" and reply.model == "the-model"
    assert reply.usage.completion_tokens == len(ids) == 20
    assert reply.usage.prompt_tokens == len(loaded[1].prompt(Chat([("user", "头痛 and fever?")])))
    parts = [{"type": "text", "text": "头痛"}, {"type": "text", "text": " and fever?"}]
    again = ask(messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=20)
    assert again.choices[0].message.content == reply.choices[0].message.content


def test_a_stream_is_the_same_text_in_parts(client):
    ask, _ = client
    whole = ask(messages=QUESTION, temperature=0).choices[0].message.content
    chunks = list(ask(messages=QUESTION, temperature=0, stream=True,
                      stream_options={"include_usage": True}))  # fmt: skip
    *chunks, end, usage = chunks
    deltas = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(deltas) == whole and len(deltas) > 5 and chunks[0].choices[0].delta.role
    assert end.choices[0].finish_reason == "length" and usage.usage.completion_tokens == 24
    # Half a character waits for its other half; what never becomes whole comes at the end.
    assert "\ufffd" in whole and not any(delta.endswith("\ufffd") for delta in deltas[:-1])


def test_logprobs_are_the_models_own(client, loaded):
    """Compared with one forward over prompt and answer, in float64."""
    ask, _ = client
    model, encoder = loaded
    ids = ids_of(loaded, QUESTION[0]["content"], 24)
    (choice,) = ask(messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3).choices
    prompt = encoder.prompt(Chat([("user", QUESTION[0]["content"])]))
    with torch.no_grad():
        logits = model.double()(row_from([prompt + ids]), logits=True)
    model.float()
    wanted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    assert len(choice.logprobs.content) == len(ids)
    for entry, row, token in zip(choice.logprobs.content, wanted, ids, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = [other.logprob for other in entry.top_logprobs]
        assert best == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert entry.token == encoder.tokenizer.decode([token])
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
    streamed = [
        entry.token
        for chunk in ask(messages=QUESTION, temperature=0, logprobs=True, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == [entry.token for entry in choice.logprobs.content]


def test_a_stop_ends_the_answer_before_it(client):
    ask, _ = client
    whole = ask(messages=QUESTION, temperature=0).choices[0].message.content
    stop = whole[7:10]
    at = whole.find(stop)
    for asked in (stop, ["not in it at all", stop]):
        kept = ask(messages=QUESTION, temperature=0, stop=asked, logprobs=True).choices[0]
        assert kept.message.content == whole[:at] and kept.finish_reason == "stop"
        deltas = list(ask(messages=QUESTION, temperature=0, stop=asked, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in deltas) == whole[:at]
        assert deltas[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_without_one_they_differ(client):
    ask, _ = client

    def text(**more):
        return ask(messages=QUESTION, temperature=1.2, **more).choices[0].message.content

    assert text(seed=5) == text(seed=5) != text(seed=6)
    assert len({text() for _ in range(3)}) == 3


def test_the_labellers_client_many_at_a_time(served, loaded, tmp_path):
    """Eight threads; batches of greedy answers of different lengths say what each says alone."""
    endpoint = Endpoint(served[0] + "/v1", "a-labeller", tmp_path / "answers.jsonl")
    texts = [f"question {'x' * i} 问" for i in range(12)]
    asked = [
        Request([{"role": "user", "content": t}], max_tokens=4 + i) for i, t in enumerate(texts)
    ]
    answers = endpoint.ask(asked)
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert answer.text == loaded[1].tokenizer.decode(ids_of(loaded, text, 4 + i))
        assert answer.served == "the-model" and answer.usage["completion_tokens"] == 4 + i


def test_the_judge(served, tmp_path, capsys):
    """evaluate.py judge sends all it has to ask, and keeps every reply; this model's cannot be
    read as a verdict, which is said."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        line = {"id": "0", "round": 1, "history": [], "question": "头痛?", "reference": "x",
                "dropped_turns": 0, "answer": f"answer {name}", "end": "stop"}  # fmt: skip
        write_lines(tmp_path / name / "answers.jsonl", [line])
    url = ["--judge", served[0] + "/v1", "--judge_model", "the-model"]
    evaluate.judge(["--answers", str(tmp_path / "a"), "--against", str(tmp_path / "b"), *url])
    assert "--retry_failed asks again" in capsys.readouterr().out
    kept = (tmp_path / "a/judged-against-b/replies.jsonl").read_text("utf-8").splitlines()
    assert len(kept) == 2 and {json.loads(line)["served"] for line in kept} == {"the-model"}


def post(url: str, body: bytes, **headers) -> tuple[int, str]:
    request = urllib.request.Request(url + "/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


WRONG = {
    "not JSON": (b"{", "Expecting"),
    "no object": (b"[]", "must be a JSON object"),
    "messages": ({}, "the last turn must be the user's"),
    "temperature": ({"temperature": "0"}, "temperature: '0' is no number"),
    "top_p": ({"top_p": 3}, "top_p is 3"),
    "max_tokens": ({"max_tokens": 2.5}, "max_tokens: 2.5 is no whole number"),
    "n": ({"n": 2}, "n: 2 cannot be followed"),
    "tools": ({"tools": [{"type": "function"}]}, "tools: "),
    "unknown": ({"tempurature": 0}, "tempurature: 0 cannot be followed"),
    "stop": ({"stop": [""]}, "stop: "),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs: 0 to 20, with logprobs: true"),
    "stream": ({"stream": "yes"}, "stream: 'yes' is no bool"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "only parts of type text",
    ),
    "name": ({"messages": [{**QUESTION[0], "name": "Ann"}]}, "messages[].name"),
    "tool": ({"messages": [{"role": "tool", "content": "x"}]}, "tool turn"),
    "last turn": ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
    "too long": ({"messages": [{"role": "user", "content": "x" * 1999}]}, "reads 1 to 1023"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_followed_is_refused_by_name(served, name):
    given, words = WRONG[name]
    if isinstance(given, dict):
        given = {} if name == "messages" else {"messages": QUESTION} | given
        given = json.dumps(given).encode()
    status, text = post(served[0], given)
    assert status == 400 and words in json.loads(text)["error"]["message"]


def test_what_asks_for_nothing_is_taken(served):
    messages = [{"role": "developer", "content": "Be brief."}, *QUESTION]
    body = {"messages": messages, "n": 1, "user": "x", "tools": None, "presence_penalty": 0.0}
    body["max_completion_tokens"] = 3
    status, text = post(served[0], json.dumps(body).encode())
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 3


def test_another_sites_page_is_turned_away(served):
    """One whose name leads to this machine: the browser sends that name."""
    body = json.dumps({"messages": QUESTION}).encode()
    assert post(served[0], body, Host="evil.example")[0] == 400


@pytest.mark.parametrize("streams", [True, False])
def test_who_is_gone_is_not_answered_to_the_end(streams, served, monkeypatch):
    """The browser's page is closed in the middle of an answer, of which a letter comes at a time,
    never a second without one."""
    url, server = served
    (letter,) = server.worker.encoder.tokenizer.encode("a")
    jobs, ask, go = [], server.worker.ask, threading.Event()
    stream = serve_jobs.stream

    def held(*arguments, **more):
        for n, item in enumerate(stream(*arguments, **more)):
            if n == 3 and streams:
                go.wait(30)
            time.sleep(0 if streams else 0.01)
            yield item[0], letter, item[2]

    monkeypatch.setattr(serve_jobs, "stream", held)
    monkeypatch.setattr(server.worker, "ask", lambda job: (jobs.append(job), ask(job)))
    body = json.dumps({"messages": QUESTION, "stream": streams, "max_tokens": 400}).encode()
    if streams:
        with urllib.request.urlopen(f"{url}/v1/chat/completions", body) as reply:
            assert reply.readline().startswith(b"data: {")
    else:
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=0.2)
    _until(jobs[0].cancelled.is_set)
    go.set()
    monkeypatch.undo()
    assert post(url, json.dumps({"messages": QUESTION, "max_tokens": 2}).encode())[0] == 200


def test_a_failing_model_is_said_and_the_next_is_answered(served, monkeypatch, capsys):
    def fails(*_, **__):
        raise MemoryError("no room")

    body = {"messages": QUESTION, "max_tokens": 2}
    monkeypatch.setattr(serve_jobs, "stream", fails)
    status, text = post(served[0], json.dumps(body).encode())
    assert status == 500 and "the model failed" in text
    assert "the model failed" in post(served[0], json.dumps(body | {"stream": True}).encode())[1]
    monkeypatch.undo()
    assert "MemoryError: no room" in capsys.readouterr().err
    assert post(served[0], json.dumps(body).encode())[0] == 200


def test_the_page_says_what_it_is_and_loads_nothing(served):
    with urllib.request.urlopen(served[0]) as reply:
        text, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    assert SAFETY in text and "the-model" in text and "default-src 'none'" in policy
    assert "http:" not in text and "https:" not in text and "src=" not in text


def test_without_its_packages_and_on_a_port_that_is_taken(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve", "--model", "none"])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "starlette", None)
        with pytest.raises(InputError, match="pip install starlette uvicorn"):
            serve.main()
    with serve.listen(0) as place, pytest.raises(InputError, match="choose another one"):
        serve.listen(place.getsockname()[1])
