"""The files of published byte-pair tokenizers: rank files, tokenizer.json, vocab.json + merges.txt.

The last two become one thing, the content of a tokenizer.json, and the special tokens apart: what
stays in it can be reached from text.
"""

import json
from base64 import b64decode
from binascii import Error as NotBase64
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanomed.config import InputError

DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful assistant in medical domain."  # what AquilaMed's chats begin with

# How Qwen cuts a text into words before it joins byte pairs (its published tokenization_qwen.py).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (DOCUMENT_END, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")

# (content of tokenizer.json without special tokens, special tokens' ids, files by name)
Parts = tuple[dict[str, Any], dict[str, int], dict[str, Path]]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes -> rank of a .tiktoken file. Raises InputError unless ranks are 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except (ValueError, NotBase64):
            raise InputError(f"{path}, line {number}: expected base64 and a rank") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: the ranks must be 0, 1, 2, ... without gap; file cut off?")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise InputError(f"{path}: the single bytes {missing} have no rank")
    return ranks


def read_tokenizer_json(path: Path) -> Parts:
    """Raises InputError for what templates could not be built with."""
    content = read_object(path)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise InputError(f"{path}: model type {model.get('type')!r}; known is BPE")
    added = content.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token["content"].strip()}
    for name in special:
        if name != model.get("unk_token"):
            model["vocab"].pop(name, None)
    spaces = [token for token in added if not token["content"].strip()]
    _keep(content, spaces)
    content |= {"post_processor": None, "truncation": None, "padding": None}
    for part in ("normalizer", "pre_tokenizer"):
        _no_space_in_front(path, part, content.get(part))
    return content, special, {"tokenizer.json": path}


def _keep(content: dict[str, Any], added: list[dict]) -> None:
    """Added tokens that text may become: in the vocabulary too, since the tokenizers package gives
    an added token that is not there an id of its own, whatever its file says."""
    content["added_tokens"] = added
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in added}


def _no_space_in_front(path: Path, part: str, step: dict | None) -> None:
    """A space put before every text would come again before each part of a chat. Where it is put
    before a text's first word only, a chat, which begins with a special token, has none."""
    if step is None:
        return
    for inner in step.get("normalizers") or step.get("pretokenizers") or ():
        _no_space_in_front(path, part, inner)
    if step.get("prepend_scheme") == "first":
        step["prepend_scheme"] = "never"
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space") else "never")
    if step.get("type") == "Prepend" or scheme != "never":
        raise InputError(
            f"{path}: its {part} puts a space before every text, so a chat cannot be built of "
            "parts; save the tokenizer with legacy=False or add_prefix_space=False"
        )


def read_vocab_and_merges(path: Path) -> Parts:
    """`path` is vocab.json; merges.txt stands beside it. Special tokens: those that the files of
    the folder name, and every entry of the vocabulary that no merge makes."""
    folder = path.parent
    vocab, merges_path = read_object(path), folder / "merges.txt"
    if not merges_path.exists():
        raise InputError(f"{path} needs merges.txt beside it")
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if wrong := [pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocab]:
        raise InputError(f"{merges_path}: {' '.join(wrong[0])!r} does not make an entry of {path}")
    reachable = {*byte_letters().values(), *("".join(pair) for pair in pairs)}
    special = {name: i for name, i in vocab.items() if name not in reachable}
    vocab = {name: i for name, i in vocab.items() if name in reachable}
    files = {"vocab.json": path, "merges.txt": merges_path}
    _add_named_specials(folder, vocab, special, files)
    settings = folder / "tokenizer_config.json"
    name = read_object(settings).get("tokenizer_class") if settings.exists() else None
    if name not in GPT2_CLASSES + QWEN_CLASSES:
        raise InputError(
            f"{settings}: how a {name!r} cuts text into words is unknown here; save a "
            "tokenizer.json beside it (transformers does)"
        )
    content = byte_pair_json(vocab, pairs, qwen=name in QWEN_CLASSES)
    spaces = {name: special.pop(name) for name in list(special) if not name.strip()}
    _keep(content, added_json(spaces, special=False))
    return content, special, files


def _add_named_specials(folder: Path, vocab: dict, special: dict, files: dict[str, Path]) -> None:
    named: list[tuple[Path, str, int]] = []
    if (path := folder / "added_tokens.json").exists():
        files[path.name] = path
        named += [(path, name, i) for name, i in read_object(path).items()]
    if (path := folder / "tokenizer_config.json").exists():
        files[path.name] = path
        added = read_object(path).get("added_tokens_decoder") or {}
        named += [(path, token["content"], int(i)) for i, token in added.items()]
    taken = {i: name for name, i in (vocab | special).items()}
    if (path := folder / "special_tokens.txt").exists():  # FlagScale's: one per line, ids follow
        files[path.name] = path
        names = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        new = [name for name in names if name not in special]
        named += [(path, name, max(taken) + 1 + i) for i, name in enumerate(new)]
    for path, name, i in named:
        if special.get(name, i) != i or taken.get(i, name) != name:
            raise InputError(
                f"{path}: {name!r} is given the id {i}, which elsewhere is "
                f"{taken.get(i, name)!r}; {name!r} is elsewhere {special.get(name)}"
            )
        special[name], taken[i] = i, name
        vocab.pop(name, None)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------- byte pairs


def byte_letters() -> dict[int, str]:
    """How byte-level vocabularies write each byte (GPT-2's convention): printable Latin-1 as
    itself, the others, in order, as the letters from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def byte_pair_json(vocab: dict[str, int], merges: list, qwen: bool) -> dict[str, Any]:
    """The tokenizer.json of a byte-level vocabulary, its words cut as by GPT-2 or by Qwen."""
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    cut = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated"}
    words = [cut | {"invert": False}, by_byte | {"use_regex": False}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if qwen else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words}
        if qwen
        else by_byte | {"use_regex": True},
        "post_processor": None,
        "decoder": by_byte | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def added_json(tokens: dict[str, int], special: bool = True) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, by id."""
    how = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    by_id = sorted(tokens.items(), key=lambda item: item[1])
    return [{"id": i, "content": name, **how, "special": special} for name, i in by_id]


def cuts_as_qwen(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json normalises and cuts text as transformers' Qwen2Tokenizer does."""
    ours = byte_pair_json({}, [], qwen=True)
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    regexes = [(step.get("pattern") or {}).get("Regex") for step in steps]
    return content.get("normalizer") == ours["normalizer"] and regexes == [QWEN_PATTERN, None]


def merges_of(ranks: dict[bytes, int], path: Path) -> list[tuple[bytes, bytes]]:
    """The merges behind a rank file: each token, taken apart by the tokens of lower rank, leaves
    the two parts that were joined. Raises InputError for a token that no merge can make."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _join(token, ranks, below=rank)
        if len(parts) != 2:
            raise InputError(
                f"{path}: the token {token!r} of rank {rank} is no merge of two others"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _join(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encoding with the tokens of rank < below: the best-ranked neighbours first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        best = min(joined)
        if best >= below:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
