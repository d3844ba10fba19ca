"""Our tokenizers as the files that transformers' AutoTokenizer loads with no custom code."""

from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.hf.chat_template import jinja
from nanomed.hf.tensors import write_json
from nanomed.text.template import Template
from nanomed.text.tokenizer import (
    JsonTokenizer,
    RankTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    copy,
)
from nanomed.text.tokenizer_files import (
    added_json,
    byte_letters,
    byte_pair_json,
    cuts_as_qwen,
    merges_of,
)

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
    added, unk = content["added_tokens"], content["model"].get("unk_token")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer" if is_qwen2 else "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "eos_token": template.turn_end,
            "pad_token": template.document_end,
            # Named here, it would become a special token that text can spell.
            "unk_token": unk if unk in [token["content"] for token in added] else None,
            # llama.cpp's converter takes what it is not told for true.
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
            "added_tokens_decoder": {
                str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
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
    added = content["added_tokens"] + added_json(tokenizer.special)
    added.sort(key=lambda token: token["id"])
    return content | {"added_tokens": added, "model": model}


def _rank_json(tokenizer: RankTokenizer) -> dict[str, Any]:
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    vocab = {spell(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(spell(a), spell(b)) for a, b in merges_of(tokenizer.ranks, tokenizer.path)]
    return byte_pair_json(vocab, merges, qwen=True)


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
    vocab = {piece: i for i, piece in enumerate(pieces)}
    content = byte_pair_json(vocab, _merges([pieces[i] for i in plain]), qwen=False)
    content["model"] |= {
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return content | {
        "added_tokens": added_json(tokenizer.special),  # <unk> is none: typed, it stays text
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
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
