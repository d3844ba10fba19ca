"""Our tokenizers as the files that transformers' AutoTokenizer loads with no custom code."""

import json
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.hf.tensors import write_json
from nanomed.text.template import Template
from nanomed.text.tokenizer import (
    JsonTokenizer,
    RankTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    copy,
)
from nanomed.text.tokenizer_files import byte_letters, byte_pair_json, cuts_as_qwen, merges_of

SPACE = "\u2581"  # how SentencePiece writes a space in a piece


def is_qwen(tokenizer: Tokenizer) -> bool:
    """Whether transformers' own tokenizer for model_type qwen2 gives the same ids."""
    if isinstance(tokenizer, JsonTokenizer):
        return cuts_as_qwen(tokenizer.json)
    return isinstance(tokenizer, RankTokenizer)


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: Template, max_seq_len: int, is_qwen2: bool
) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, and for nanomed itself
    template.json and the original file."""
    if not isinstance(tokenizer, JsonTokenizer):
        copy(tokenizer, folder)  # nanomed itself reads these with fewer packages
    content = tokenizer_json(tokenizer)
    write_json(folder / "tokenizer.json", content)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer" if is_qwen2 else "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "eos_token": template.turn_end,
            "pad_token": template.document_end,
            "unk_token": content["model"]["unk_token"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
            "added_tokens_decoder": {
                str(token["id"]): {k: v for k, v in token.items() if k != "id"}
                for token in content["added_tokens"]
            },
            "chat_template": jinja(template),
        },
    )
    (folder / "template.json").write_text(template.to_json() + "\n", encoding="utf-8")


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: the same ids for every text that spells no special token."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_json(tokenizer)
    content = _rank_json(tokenizer) if isinstance(tokenizer, RankTokenizer) else tokenizer.json
    model = content["model"] | {"vocab": content["model"]["vocab"] | tokenizer.special}
    added = content["added_tokens"] + _added(tokenizer.special)
    added.sort(key=lambda token: token["id"])
    return content | {"added_tokens": added, "model": model}


def _rank_json(tokenizer: RankTokenizer) -> dict[str, Any]:
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    vocab = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks, tokenizer.path)]
    return byte_pair_json(vocab, merges, qwen=True)


def _added(special: dict[str, int]) -> list[dict[str, Any]]:
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_id = sorted(special.items(), key=lambda item: item[1])
    return [{"id": i, "content": name, **how, "special": True} for name, i in by_id]


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict:
    """A byte-pair SentencePiece model as tokenizer.json, with the same ids for every text that
    does not spell a special token."""
    model = tokenizer.model
    pieces = [model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    plain = [
        i
        for i in range(tokenizer.vocab_size)
        if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))
    ]
    if [model.get_score(i) for i in plain] != [-float(n) for n in range(len(plain))]:
        raise InputError(f"{tokenizer.path} is no byte-pair model, so it has no merges to export")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added({"<unk>": model.unk_id()} | tokenizer.special),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges([pieces[i] for i in plain]),
        },
    }


def _merges(pieces: list[str]) -> list[list[str]]:
    """Every way to join two pieces into a third, the best-ranked result first. SentencePiece joins
    the neighbours whose joint piece ranks best, however that piece was learned."""
    known = set(pieces)
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def jinja(template: Template) -> str:
    """The chat template that transformers and vLLM render, byte for byte what template.py builds.
    Like there, a system text can only be the first, and an empty one counts as none."""

    def turn(role: str, content: str) -> str:
        return (
            f"{{{{ {_quoted(template.before[role])} + {content} + "
            f"{_quoted(template.after[role])} }}}}"
        )

    stated = "messages and messages[0]['role'] == 'system' and messages[0]['content']"
    lines = [f"{{% if {stated} %}}", turn("system", "messages[0]['content']")]
    if template.system:
        lines += ["{% else %}", turn("system", _quoted(template.system))]
    lines.append("{% endif %}{% for message in messages %}")
    for role in ("user", "assistant"):
        keyword = "if" if role == "user" else "elif"
        lines.append(f"{{% {keyword} message['role'] == '{role}' %}}")
        lines.append(turn(role, "message['content']"))
    lines.append("{% elif message['role'] != 'system' or not loop.first %}")
    lines.append("{{ raise_exception('a ' + message['role'] + ' turn cannot stand here') }}")
    lines.append("{% endif %}{% endfor %}{% if add_generation_prompt %}")
    lines.append(f"{{{{ {_quoted(template.before['assistant'])} }}}}{{% endif %}}")
    return "".join(lines)


def _quoted(text: str) -> str:
    """A string in Jinja, which reads the same escapes as JSON but no surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
