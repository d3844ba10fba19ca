"""Text to token ids and back. Text can never become a special token: special ids are put in by
nanomed/template.py alone.

    python -m nanomed.tokenizer train FILE... --out samples/tokenizer.model --vocab_size 6144
"""

import argparse
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Protocol

from nanomed.config import InputError

DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class Tokenizer(Protocol):
    """What the rest of nanomed asks of a tokenizer, whatever its kind."""

    path: Path
    vocab_size: int
    special: dict[str, int]  # the special tokens' ids, by how they are written

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def fingerprint(self) -> str: ...


class SentencePieceTokenizer:
    """A SentencePiece model file. Every string round-trips but for U+2581, which SentencePiece
    itself uses for a space: it comes back as a space."""

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self.model.vocab_size()
        ids = [i for i in range(self.vocab_size) if self.model.is_control(i)]
        self.special = {self.model.id_to_piece(i): i for i in ids}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Special tokens are written out, as they would be in a template."""
        text, plain, names = "", [], {i: name for name, i in self.special.items()}
        for i in ids:
            if i in names:
                text += self.model.decode(plain) + names[i]
                plain = []
            else:
                plain.append(i)
        return text + self.model.decode(plain)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or folder, its kind recognised by the files that are there."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.model"
    if not path.exists():
        raise InputError(f"no tokenizer at {path}; give --tokenizer a SentencePiece .model file")
    return SentencePieceTokenizer(path)


def train(texts: list[str], out: Path, vocab_size: int) -> None:
    """Trains a byte-pair model that loses nothing: no normalisation, no added space, and bytes
    for characters without a piece. The 3,755 common Chinese characters (GB 2312, level 1) are
    pieces whether they occur or not."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            required_chars=common_characters(),
            character_coverage=1.0,  # and every character that occurs
            control_symbols=[DOCUMENT_END, TURN_START, TURN_END],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=len(os.sched_getaffinity(0)),
            minloglevel=1,
        )
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces from these texts: {error}") from None
    out.write_bytes(model.getvalue())


def common_characters() -> str:
    """Level 1 of GB 2312: rows 16 to 55 of its code table, in the order of pronunciation."""
    codes = [(row + 160, cell + 160) for row in range(16, 56) for cell in range(1, 95)]
    return b"".join(map(bytes, codes)).decode("gb2312", "ignore")


def _texts(path: str) -> list[str]:
    """Every string in a JSONL file, or the lines of a text file."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    if not path.endswith(".jsonl"):
        return lines

    def strings(value):
        if isinstance(value, str):
            return [value]
        children = value.values() if isinstance(value, dict) else value
        return [s for child in children for s in strings(child)] if children else []

    return [s for line in lines for s in strings(json.loads(line))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="train a SentencePiece tokenizer")
    command.add_argument("files", nargs="+")
    command.add_argument("--out", required=True, type=Path)
    command.add_argument("--vocab_size", type=int, default=6144)
    arguments = parser.parse_args()
    texts = [text for path in arguments.files for text in _texts(path)]
    train(texts, arguments.out, arguments.vocab_size)
    print(f"{arguments.out}: {load(arguments.out).vocab_size} pieces")


if __name__ == "__main__":
    main()
