"""Our tokenizers as the files that transformers' AutoTokenizer loads with no custom code."""

import json
import shutil
from pathlib import Path

from nanomed.config import InputError
from nanomed.template import Template
from nanomed.tokenizer import SentencePieceTokenizer, Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space in a piece


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: Template, max_seq_len: int
) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json, and
    the original file and template for nanomed itself."""
    _write(folder / "tokenizer.json", sentencepiece_json(tokenizer))
    document_end = tokenizer.special[template.document_end]
    turn_end = tokenizer.special[template.turn_end]
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": template.turn_end,
            "pad_token": template.document_end,
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
            "chat_template": jinja(template),
        },
    )
    # Whoever serves the model stops at the end of a turn, and of a document.
    generation = {"eos_token_id": [turn_end, document_end], "pad_token_id": document_end}
    _write(folder / "generation_config.json", generation)
    (folder / "template.json").write_text(template.to_json() + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


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
    names = {"<unk>": model.unk_id()} | tokenizer.special
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, i in sorted(names.items(), key=lambda item: item[1])
        ],
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
    """The chat template that transformers and vLLM render; json.dumps quotes as Jinja does."""

    def turn(role: str, content: str) -> str:
        before, after = json.dumps(template.before[role]), json.dumps(template.after[role])
        return f"{{{{ {before} + {content} + {after} }}}}"

    lines = []
    if template.system:
        lines.append(
            "{% if messages[0]['role'] != 'system' %}"
            + turn("system", json.dumps(template.system))
            + "{% endif %}"
        )
    lines.append("{% for message in messages %}")
    for role in template.before:
        condition = f"{{% if message['role'] == '{role}' %}}"
        lines.append(condition + turn(role, "message['content']") + "{% endif %}")
    lines.append("{% endfor %}{% if add_generation_prompt %}")
    lines.append(f"{{{{ {json.dumps(template.before['assistant'])} }}}}{{% endif %}}")
    return "".join(lines)
