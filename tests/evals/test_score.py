"""Log-probabilities beside transformers, which gets one request at a time, and lm-eval's own."""

import dataclasses
import json

import pytest
import torch

from nanomed.config import InputError
from nanomed.distributed import World
from nanomed.evals.items import Item
from nanomed.evals.requests import Request, requests_of
from nanomed.evals.score import bos_of, encode
from nanomed.evals.tasks import tasks as all_tasks
from nanomed.hf import pretrained
from nanomed.model import scoring
from nanomed.model.packed import pack_linears
from nanomed.model.scoring import Scorer, plan
from nanomed.records import Chat
from nanomed.text import tokenizer
from tests.conftest import ROOT
from tests.evals.test_requests import GOLDEN, RECORDED, write_golden
from tests.folders import edit_config, write_model

ALONE = World(0, 1, torch.device("cpu"))
TOKENIZER = tokenizer.load(ROOT / "samples/tokenizer.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, "qwen2", TOKENIZER.vocab_size)
    tokenizer.copy(TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list[Request]:
    """Letters of one and of two tokens, and shots that are shared and that are not."""
    found = []
    for golden in (GOLDEN[0], GOLDEN[2]):
        data = tmp_path_factory.mktemp("data")
        write_golden(golden, data)
        found += requests_of(all_tasks()[golden["task"]], data, 2)[0][:5]
    return found


def theirs(folder, requests, longest=512) -> list[list[float]]:
    """One forward of transformers for each context with each continuation, as lm-eval cuts them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logp(context: str, continuation: str) -> float:
        before = TOKENIZER.encode(context)
        targets = TOKENIZER.encode(context + continuation)[len(before) :]
        ids = torch.tensor((before + targets)[-(longest + 1) :])
        with torch.no_grad():
            logps = model(ids[None, :-1]).logits[0].log_softmax(-1)
        return logps[-len(targets) :].gather(1, ids[-len(targets) :, None]).sum().item()

    return [[logp(r.context, text) for text in r.continuations] for r in requests]


def ours(folder, requests, capacity=4096, longest=512, world=ALONE, packed=False):
    model = pretrained.load(folder, world.device, torch.float32)
    if packed:
        pack_linears(model)
    encoded = [encode(request, TOKENIZER, [], longest) for request in requests]
    rows = Scorer(model, world).run(encoded, plan(encoded, capacity))
    return [logps for row in rows for logps in row]


def worst(a: list[list[float]], b: list[list[float]]) -> float:
    pairs = zip(a, b, strict=True)
    return max(abs(x - y) for one, two in pairs for x, y in zip(one, two, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_log_probabilities_are_those_of_one_request_at_a_time(folder, requests, packed):
    wanted = theirs(folder, requests)
    assert worst(ours(folder, requests[:5], packed=packed), wanted[:5]) < 2e-5  # a shared beginning
    assert worst(ours(folder, requests, packed=packed), wanted) < 2e-5


def test_they_do_not_depend_on_the_packing(folder, requests):
    wide = ours(folder, requests)
    assert worst(ours(folder, requests, capacity=1), wide) < 1e-5  # a row for each request
    assert worst(ours(folder, requests[::-1])[::-1], wide) < 1e-5


def test_a_long_input_is_cut_on_the_left_as_lm_eval_cuts_it(folder, requests):
    lengths = sorted(len(TOKENIZER.encode(request.context)) for request in requests)
    longest = lengths[5] + 1  # some of the ten are longer, some are not
    cut = [encode(request, TOKENIZER, [], longest).truncated for request in requests]
    assert {n > 0 for n in cut} == {True, False}
    wanted = theirs(folder, requests, longest)
    assert worst(ours(folder, requests, longest=longest), wanted) < 2e-5
    assert worst(ours(folder, requests, longest=longest - 1), wanted) > 1e-3  # one token is seen


def test_the_shared_beginning_runs_once(folder, requests, monkeypatch):
    """The model sees it in a row of its own, and afterwards only what follows it."""
    rows = []
    from_segments = scoring.row_from
    monkeypatch.setattr(scoring, "row_from", lambda s: rows.append(s) or from_segments(s))
    ours(folder, requests[:5], capacity=150)
    encoded = [encode(request, TOKENIZER, [], 512) for request in requests[:5]]
    prefix = plan(encoded, 150).prefix
    assert len(prefix) > 60 and rows.count([prefix]) == 1 and len(rows) > 3
    seen = sum(len(segment) for row in rows for segment in row)
    whole = sum(len(ids) for request in encoded for ids in request.inputs)
    assert seen == whole - (sum(len(r.inputs) for r in encoded) - 1) * len(prefix)


def text_request(context: str, *continuations: str) -> Request:
    item = Item(None)
    return Request("made/0", context, list(continuations), [], 0, item, list(continuations))


def test_letters_of_one_token_need_one_input():
    one = encode(text_request("Answer:", " A", " B", " C"), TOKENIZER, [], 99)
    assert len(one.inputs) == 1 and one.n_tokens == [1, 1, 1]
    two = encode(text_request("Answer:", " A", " D"), TOKENIZER, [], 99)  # " D" has two tokens
    assert len(two.inputs) == 1 and two.n_tokens == [1, 2]
    assert len(two.inputs[0]) == len(one.inputs[0]) + 1  # the shorter input begins the longer
    apart = encode(text_request("Answer:", " yes", " maybe"), TOKENIZER, [], 99)
    assert len(apart.inputs) == 2


def test_spaces_at_the_contexts_end_belong_to_the_continuation():
    request = text_request("Answer: ", "A")
    (read,) = encode(request, TOKENIZER, [], 99).reads
    assert [token for _, _, token in read] == TOKENIZER.encode("Answer: A")[
        len(TOKENIZER.encode("Answer:")) :
    ]


def test_a_continuation_without_a_token_has_no_score():
    with pytest.raises(InputError, match="no token of its own"):
        encode(text_request("Answer:", ""), TOKENIZER, [], 99)
    for context, longest in (("", 99), ("Answer:", 3)):
        with pytest.raises(InputError, match="its first token has no score"):
            encode(text_request(context, " a longer text than that"), TOKENIZER, [], longest)


def _on_ranks(world, folder, requests, capacity):
    return ours(folder, requests, capacity, world=world)


def test_three_ranks_give_the_same_bits(folder, requests, pool):
    alone = ours(folder, requests, 150)
    assert pool(3, _on_ranks, folder, requests, 150) == [alone] * 3


def test_recorded_log_probabilities():
    """lm-eval's own numbers, within 1e-5 nats; the model stands beside the recorded requests."""
    if not (RECORDED / "model/model.safetensors").exists():
        pytest.skip("../shared/golden/lm_eval/model is absent")
    model = pretrained.load(RECORDED / "model", ALONE.device, torch.float32)
    tok, n = tokenizer.load(RECORDED / "model"), 0
    for file in sorted(RECORDED.glob("*shot.json")):
        recorded = json.loads(file.read_text(encoding="utf-8"))
        shots = recorded["num_fewshot"]
        found, _ = requests_of(all_tasks()[recorded["task"]], RECORDED / "data", shots)
        items = recorded["items"][:5]
        encoded = [encode(r, tok, [], model.config.max_seq_len) for r in found[: len(items)]]
        rows = Scorer(model, ALONE).run(encoded, plan(encoded, 4096))
        logps = [row for rows_of in rows for row in rows_of]
        assert worst(logps, [item["logprobs"] for item in items]) < 1e-5
        for request, item in zip(encoded, items, strict=True):
            assert [[t for _, _, t in read] for read in request.reads] == item["continuation_ids"]
        n += len(items)
    assert n == 24 * 5


@pytest.mark.parametrize("asked", ["auto", "yes", "no"])
def test_the_begin_token_is_put_where_transformers_puts_it(asked, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    made = Tokenizer(
        models.BPE({"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate("abc")}}, [])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{}")
    edit_config(tmp_path, model_type="llama")
    theirs = AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids
    assert theirs[:1] == [0]
    checkpoint = tmp_path / "checkpoints/step-1"  # if that is a run, its checkpoints say the same
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    tok = pretrained.tokenizer_of(checkpoint)
    before = bos_of(tok, asked)
    assert before == ([] if asked == "no" else [0])
    assert asked == "no" or before + tok.encode("abc") == theirs


def test_a_folder_without_a_begin_token(folder):
    tok = tokenizer.load(folder)
    assert bos_of(tok, "auto") == []
    with pytest.raises(InputError, match=r"--bos yes: .* names no begin token"):
        bos_of(tok, "yes")


def test_in_a_chat_the_letter_follows_the_assistants_header(encoder):
    request = text_request("Which?", "A", "B")
    asked = dataclasses.replace(request, chat=Chat([("user", "Which?")], "Be brief."))
    encoded = encode(asked, encoder.tokenizer, [5], 99, encoder)
    assert encoded.inputs == [tuple(encoder.prompt(asked.chat))] and encoded.n_tokens == [1, 1]
