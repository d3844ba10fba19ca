"""Every kind of tokenizer: the ids of the published code, text that comes back, and no way from
text to a special token."""

import importlib
import json
import unicodedata
from pathlib import Path

import pytest

from nanomed.config import InputError
from nanomed.records import Chat
from nanomed.text import tokenizer, tokenizer_files
from nanomed.text.template import AQUILA_V1, CHATML, Encoder, fitting
from nanomed.text.template import load as load_template
from tests.folders import (
    AQUILA,
    SPECIAL_TEXTS,
    TEXTS,
    random_texts,
    write_rank_file,
    write_sentencepiece,
)

needs_aquila = pytest.mark.skipif(not AQUILA.is_dir(), reason="the real tokenizer is not here")
ALL_TEXTS = TEXTS + random_texts(1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kind -> tokenizer, each loaded from a folder of its own."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("ranks", "sentencepiece", "json"):
        (root / kind).mkdir()
    write_rank_file(root / "ranks")
    write_sentencepiece(root / "sentencepiece")
    from nanomed.hf.tokenizer import tokenizer_json

    content = tokenizer_json(tokenizer.load(root / "ranks"))
    (root / "json/tokenizer.json").write_text(json.dumps(content))
    kinds = {kind: tokenizer.load(root / kind) for kind in ("ranks", "sentencepiece", "json")}
    if AQUILA.is_dir():
        kinds["aquila"] = tokenizer.load(AQUILA)
    return kinds


def test_text_comes_back(made):
    for kind, tok in made.items():
        nfc = kind in ("ranks", "json")
        for text in ALL_TEXTS:
            expected = unicodedata.normalize("NFC", text) if nfc else text
            assert tok.decode(tok.encode(text)) == expected, (kind, text)
            assert all(0 <= i < tok.vocab_size for i in tok.encode(text))


def test_ids_stand_for_the_bytes_of_their_text(made, tmp_path):
    """What bits per byte are counted by; of tokenizer.json both kinds, byte level and not."""
    from nanomed.hf.tokenizer import tokenizer_json

    content = tokenizer_json(made["sentencepiece"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for kind, tok in {**made, "pieces": tokenizer.load(tmp_path)}.items():
        table, nfc = tok.n_bytes(), kind in ("ranks", "json")
        assert len(table) == tok.vocab_size and not any(table[i] for i in tok.special.values())
        for text in ALL_TEXTS:
            text = unicodedata.normalize("NFC", text) if nfc else text
            assert sum(table[i] for i in tok.encode(text)) == len(text.encode()), (kind, text)


def test_text_never_becomes_a_special_token(made):
    for kind, tok in made.items():
        special = set(tok.special.values())
        for name in [*tok.special, *SPECIAL_TEXTS]:
            text = f"我问 {name} and{name}{name}"
            assert not special & set(tok.encode(text)), (kind, name)
            assert tok.decode(tok.encode(text)) == text


def test_a_chat_that_spells_special_tokens_has_as_many_as_its_template(made):
    for tok in made.values():
        encoder = Encoder(fitting(tok), tok)
        special = set(tok.special.values())

        def count(text, encoder=encoder, special=special):
            chat = Chat([("user", text), ("assistant", text)], system=text)
            return sum(i in special for i in encoder.chat(chat, 10_000)[0])

        assert count("".join(tok.special)) == count("x") > 0


def test_special_tokens_come_out_of_decode_as_they_are_written(made):
    for tok in made.values():
        name, i = next(iter(tok.special.items()))
        assert tok.decode([*tok.encode("好"), i, *tok.encode("好")]) == f"好{name}好"


def test_spare_rows_of_a_model_do_not_break_decoding(made):
    for tok in made.values():
        assert tok.decode([*tok.encode("好"), tok.vocab_size + 5]) == "好\ufffd"


def test_ranks_and_their_rebuilt_merges_give_the_same_ids(made):
    assert [made["ranks"].encode(t) for t in ALL_TEXTS] == [
        made["json"].encode(t) for t in ALL_TEXTS
    ]
    assert tokenizer.same(made["ranks"], made["json"])
    assert not tokenizer.same(made["ranks"], made["sentencepiece"])


def test_qwen_special_ids_follow_the_ranks(made):
    tok = made["ranks"]
    n = len(tok.ranks)
    assert tok.special["<|endoftext|>"] == n and tok.special["<|im_end|>"] == n + 2
    assert tok.special["<|extra_204|>"] == n + 207 == tok.vocab_size - 1
    # With AquilaMed's 151,643 ranks: pad, begin and end of its config.json, and its vocabulary.
    at = 151_643 - n
    names = ("<|endoftext|>", "<|extra_203|>", "<|extra_204|>")
    assert [tok.special[name] + at for name in names] == [151_643, 151_849, 151_850]
    assert tok.vocab_size + at == 151_851


@needs_aquila
def test_aquila_has_the_ids_of_transformers(made):
    from transformers import GPT2Tokenizer

    files = {"vocab": str(AQUILA / "vocab.json"), "merges": str(AQUILA / "merges.txt")}
    reference, tok = GPT2Tokenizer(**files), made["aquila"]
    for text in ALL_TEXTS:
        assert tok.encode(text) == reference.encode(text, add_special_tokens=False), text
    assert tok.vocab_size == 100_008
    assert (tok.special["[CLS]"], tok.special["</s>"]) == (100_006, 100_007)
    assert tok.special["<|endoftext|>"] == 0


@needs_aquila
def test_aquilas_own_template(made):
    encoder = Encoder(AQUILA_V1, made["aquila"])
    chat = Chat([("user", "问"), ("assistant", "答"), ("user", "再问"), ("assistant", "再答")])
    ids, trained, _ = encoder.chat(chat, 100)
    text = "<|startofpiece|>问<|endofpiece|>答</s><|startofpiece|>再问<|endofpiece|>再答</s>"
    assert made["aquila"].decode(ids) == text
    learned = [i for i, flag in zip(ids, trained, strict=True) if flag]
    assert made["aquila"].decode(learned) == "答</s>再答</s>"
    assert fitting(made["aquila"]) is AQUILA_V1


def test_template_is_chosen_by_special_tokens(made):
    assert fitting(made["ranks"]) is CHATML
    made["ranks"].special, kept = {"<s>": 1}, made["ranks"].special
    try:
        with pytest.raises(InputError, match=r"<s>.*--template a JSON file"):
            fitting(made["ranks"])
    finally:
        made["ranks"].special = kept


def test_the_template_that_the_docs_show_can_be_used(made, tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs/aquilamed.md").read_text()
    (tmp_path / "mine.json").write_text(docs.split("```json\n")[1].split("```")[0])
    tok = made["ranks"]
    monkeypatch.setattr(tok, "special", {"<s>": tok.vocab_size, "</s>": tok.vocab_size + 1})
    monkeypatch.setattr(tok, "vocab_size", tok.vocab_size + 2)
    encoder = Encoder(load_template(str(tmp_path / "mine.json")), tok)
    ids, trained, _ = encoder.chat(Chat([("user", "问"), ("assistant", "答")], "系"), 100)
    assert tok.decode(ids) == "<s>系\n<s>Q: 问\nA: 答</s>"
    assert tok.decode([i for i, flag in zip(ids, trained, strict=True) if flag]) == "答</s>"


@pytest.mark.parametrize("package", ["tiktoken", "tokenizers"])
def test_a_missing_package_is_named_with_its_install_command(made, monkeypatch, package):
    def without(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", without)
    kind = {"tiktoken": "ranks", "tokenizers": "json"}[package]
    with pytest.raises(InputError, match=f"pip install {package}"):
        tokenizer.load(made[kind].path.parent)


def test_damaged_files_are_named(tmp_path):
    path = write_rank_file(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged, message in [
        (lines[:100] + lines[101:], "without gap"),
        ([*lines[:-1], b"!!! 3\n"], "line 500"),
        ([], "without gap"),
    ]:
        path.write_bytes(b"".join(damaged))
        with pytest.raises(InputError, match=message):
            tokenizer.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(InputError, match="known is BPE"):
        tokenizer.load(tmp_path)


def small_vocab(folder, **config):
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<end>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load(folder)


def test_vocabulary_entries_that_no_merge_makes_are_special(tmp_path):
    tok = small_vocab(tmp_path, added_tokens_decoder={"7": {"content": "<x>"}})
    assert tok.special == {"<end>": 3, "<x>": 7} and tok.vocab_size == 8
    assert tok.encode("ab") == [2]


RUNS = (" " * 8, " " * 4, "\t\t", "  ")
CODE = ["def f():\n        return 1", "a    b  c\t\td", " " * 31, "\n    \n  x<|im_end|>"]


@pytest.mark.parametrize("special_first", [True, False])
def test_added_runs_of_white_space_keep_the_ids_of_their_file(special_first, made, tmp_path):
    """As GPT-NeoX and CodeGen have them: every id, and every text's ids, here and in an export."""
    from tokenizers import AddedToken, Tokenizer

    from nanomed.hf.tokenizer import tokenizer_json

    names = list(made["ranks"].special)[:3]
    content = tokenizer_json(made["ranks"])
    content["added_tokens"] = []
    vocab = content["model"]["vocab"]
    for name in made["ranks"].special:
        del vocab[name]
    theirs = Tokenizer.from_str(json.dumps(content))
    for what in (names, RUNS) if special_first else (RUNS, names):
        theirs.add_tokens([AddedToken(x, normalized=False, special=x in names) for x in what])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    ids = {name: theirs.token_to_id(name) for name in (*names, *RUNS)}
    assert {name: ours.special[name] for name in names} == {name: ids[name] for name in names}
    assert ours.vocab_size == theirs.get_vocab_size()
    export = Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    assert export.get_vocab() == theirs.get_vocab()
    for text in [*CODE, *ALL_TEXTS, *(f"{run}x{run}" for run in RUNS)]:
        wanted = ours.encode(text)
        assert ours.decode(wanted) == unicodedata.normalize("NFC", text)
        if not any(name in text for name in names):
            assert wanted == theirs.encode(text).ids == export.encode(text).ids


def test_added_tokens_beside_a_vocabulary_keep_their_ids(tmp_path):
    """The same runs where only vocab.json, merges.txt and added_tokens.json are there."""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 9, "  ": 7, "    ": 8}))
    tok = small_vocab(tmp_path)
    assert tok.special == {"<end>": 3, "<x>": 9}
    assert tok.encode("a    b  a") == [0, 8, 1, 7, 0]


def test_an_added_token_that_gets_another_id_is_an_error(made, tmp_path, monkeypatch):
    content = json.loads((made["json"].path).read_text())
    token = {"id": content["model"]["vocab"]["a"], "content": "  "} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized", "special"), False
    )
    monkeypatch.setattr(
        tokenizer_files, "_keep", lambda content, added: content.update(added_tokens=added)
    )
    content["added_tokens"].append(token)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"its added token .* gets the id"):
        tokenizer.load(tmp_path)


def test_contradictions_between_tokenizer_files_are_errors(tmp_path):
    with pytest.raises(InputError, match="'<x>' is given the id 2, which elsewhere is 'ab'"):
        small_vocab(tmp_path, added_tokens_decoder={"2": {"content": "<x>"}})
    with pytest.raises(InputError, match="how a 'BertTokenizer' cuts text"):
        small_vocab(tmp_path, tokenizer_class="BertTokenizer")


def test_a_tokenizer_that_adds_spaces_is_refused(made, tmp_path):
    content = made["json"].json | {"normalizer": {"type": "Prepend", "prepend": "\u2581"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="puts a space before every text"):
        tokenizer.load(tmp_path)


def test_copy_makes_a_folder_that_loads_the_same(made, tmp_path):
    for kind, tok in made.items():
        (tmp_path / kind).mkdir()
        tokenizer.copy(tok, tmp_path / kind)
        again = tokenizer.load(tmp_path / kind)
        assert again.fingerprint() == tok.fingerprint() and tokenizer.same(again, tok)


def test_the_sample_tokenizer_is_short_on_real_text(shared_data, encoder):
    """At most 1.2 tokens per character on every file beside the checkout."""
    files = [path for path in shared_data.iterdir() if path.is_file()]
    texts = {path.name: path.read_text(encoding="utf-8")[:100_000] for path in files}
    rates = {name: len(encoder.tokenizer.encode(text)) / len(text) for name, text in texts.items()}
    assert len(rates) >= 7 and max(rates.values()) <= 1.2, rates


def test_the_texts_that_a_tokenizer_is_trained_on(tmp_path):
    """Strings at any depth of records that hold other values, too; U+2028 ends no line of JSON."""
    records = [{"a": "糖", "ok": True, "n": 3, "none": None}, {"b": [["x\u2028y"], {"c": "z"}]}]
    lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "a.jsonl").write_text(lines, "utf-8")
    (tmp_path / "a.txt").write_text("one\n\ntwo", "utf-8")
    assert tokenizer.texts_in(str(tmp_path / "a.jsonl")) == ["糖", "x\u2028y", "z"]
    assert tokenizer.texts_in(str(tmp_path / "a.txt")) == ["one", "two"]
