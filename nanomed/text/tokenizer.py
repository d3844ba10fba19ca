"""Text to token ids and back. Text can never become a special token: special ids are put in by
nanomed/text/template.py alone.

The kind is recognised by the files in a folder: tokenizer.model (SentencePiece), a .tiktoken file
(byte pairs by rank, as AquilaMed's), tokenizer.json, or vocab.json with merges.txt (Aquila's).

    python -m nanomed.text.tokenizer train FILE... --out samples/tokenizer.model --vocab_size 6144
"""

import hashlib
import io
import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

from nanomed.arguments import command_line
from nanomed.config import InputError, optional
from nanomed.processes import n_cores
from nanomed.records.fields import strings_in
from nanomed.records.files import kind_of, read_json, read_lines
from nanomed.text.tokenizer_files import (
    DOCUMENT_END,
    QWEN_PATTERN,
    QWEN_SPECIAL,
    SYSTEM,
    TURN_END,
    TURN_START,
    read_ranks,
    read_tokenizer_json,
    read_vocab_and_merges,
)

PROBES = (
    "患者，男，58岁：胸痛3小时。",
    "The patient's BP is 140/90 mmHg.\n",
    "  a\t\u9f98 \U0001f9ec",
)


class Tokenizer:
    """What the rest of nanomed asks of a tokenizer, whatever its kind."""

    path: Path
    files: dict[str, Path]  # what it was read from, by the name that a folder must give it
    vocab_size: int  # every id is below
    special: dict[str, int]  # the special tokens' ids, by how they are written
    model: Any  # of the package that reads its kind

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def n_bytes(self) -> list[int]:  # [vocab_size] of UTF-8 that each id stands for
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Special tokens are written out, as they would be in a template. A model may have more
        rows than its tokenizer has ids: those come out as U+FFFD."""
        text, plain = "", []
        names = {i: name for name, i in self.special.items()}
        names |= {i: "\ufffd" for i in ids if i >= self.vocab_size}
        for i in ids:
            if i in names:
                text += self._decode_plain(plain) + names[i]
                plain = []
            else:
                plain.append(i)
        return text + self._decode_plain(plain)

    def _decode_plain(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def fingerprint(self) -> str:
        content = b"".join(self.files[name].read_bytes() for name in sorted(self.files))
        return hashlib.sha256(content).hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file. Every string round-trips but for U+2581, which SentencePiece
    itself uses for a space: it comes back as a space."""

    def __init__(self, path: Path):
        import sentencepiece

        self.path, self.files = path, {"tokenizer.model": path}
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path} is not a SentencePiece model: {error}") from None
        self.vocab_size = self.model.vocab_size()
        ids = [i for i in range(self.vocab_size) if self.model.is_control(i)]
        self.special = {self.model.id_to_piece(i): i for i in ids}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def n_bytes(self) -> list[int]:
        """A special token and the unknown one stand for none."""
        none = set(self.special.values()) | {self.model.unk_id()}
        return [0 if i in none else self._n_bytes(i) for i in range(self.vocab_size)]

    def _n_bytes(self, i: int) -> int:
        return 1 if self.model.is_byte(i) else _spaced(self.model.id_to_piece(i))

    def keeps_text(self) -> bool:
        """Whether it neither normalises nor puts a space before a text. Else ids of a text's parts
        are not those of the text, and templates, which are built of parts, would go wrong."""
        probes = (" a", "a  b ", "\uff21\ufb01", "\n")  # full width A, the ligature fi
        prefixed = self.model.encode("a", out_type=str)[0].startswith("\u2581")
        return not prefixed and all(self.decode(self.encode(text)) == text for text in probes)


class RankTokenizer(Tokenizer):
    """A rank file, as in `qwen.tiktoken`: one line per token, base64 of its bytes and its rank,
    which is its id. Qwen's special tokens follow the last rank. Text is NFC-normalised first, as
    Qwen's own code does, and then round-trips."""

    def __init__(self, path: Path):
        tiktoken = optional("tiktoken", path)
        self.path, self.files = path, {path.name: path}
        self.ranks = read_ranks(path)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(QWEN_SPECIAL)}
        self.vocab_size = len(self.ranks) + len(self.special)
        self.model = tiktoken.Encoding(
            path.stem, pat_str=QWEN_PATTERN, mergeable_ranks=self.ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        return self.model.encode_ordinary(unicodedata.normalize("NFC", text))

    def n_bytes(self) -> list[int]:
        return [*map(len, sorted(self.ranks, key=self.ranks.get)), *[0] * len(self.special)]


class JsonTokenizer(Tokenizer):
    """What Hugging Face's tokenizers package reads: tokenizer.json, or vocab.json and merges.txt.

    Its added tokens are special here, declared so or not, and text never becomes one; only runs of
    white space, which some vocabularies add, stay text. What its file says should be put around
    every text (a begin token, say) is left to the template.
    """

    def __init__(self, path: Path):
        tokenizers = optional("tokenizers", path)
        self.path = path
        reader = read_vocab_and_merges if path.name == "vocab.json" else read_tokenizer_json
        self.json, self.special, self.files = reader(path)
        try:
            self.model = tokenizers.Tokenizer.from_str(json.dumps(self.json))
        except Exception as error:  # the package raises bare Exception
            raise InputError(f"{path}: {error}") from None
        for token in self.json["added_tokens"]:
            if (i := self.model.token_to_id(token["content"])) != token["id"]:
                raise InputError(f"{path}: its added token {token} gets the id {i} when it is read")
        ids = (*self.special.values(), *self.model.get_vocab().values())
        self.vocab_size = max(ids) + 1

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def _decode_plain(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)

    def n_bytes(self) -> list[int]:
        """Byte-level vocabularies write each byte as one character; others write a space as
        U+2581 and a byte as <0x0A>."""
        byte_level = '"ByteLevel"' in json.dumps(self.json)
        added = {token["content"] for token in self.json["added_tokens"]}
        counts = [0] * self.vocab_size
        for piece, i in self.model.get_vocab().items():
            if i in self.special.values():
                continue
            plain = piece in added or not byte_level
            is_byte = not byte_level and re.fullmatch("<0x[0-9A-F]{2}>", piece)
            counts[i] = 1 if is_byte else _spaced(piece) if plain else len(piece)
        return counts


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or folder. Raises InputError, naming what was looked for."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no tokenizer at {path}; give --tokenizer a file or folder")
    if path.is_dir():
        path = _file_in(path)
    kinds = {".json": JsonTokenizer, ".tiktoken": RankTokenizer}
    tokenizer = kinds.get(path.suffix, SentencePieceTokenizer)(path)
    if isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.keeps_text():
        if (other := path.with_name("tokenizer.json")).exists():
            return JsonTokenizer(other)
        raise InputError(
            f"{path} puts a space before each text or normalises it, so a chat cannot be built of "
            "parts; save a tokenizer.json beside it (transformers does)"
        )
    return tokenizer


def _file_in(folder: Path) -> Path:
    ranks = sorted(path.name for path in folder.glob("*.tiktoken"))
    for name in ("tokenizer.model", *ranks, "tokenizer.json", "vocab.json"):
        if (folder / name).exists():
            return folder / name
    raise InputError(
        f"{folder} holds no tokenizer: none of tokenizer.model, *.tiktoken, tokenizer.json, "
        "vocab.json with merges.txt; give --tokenizer a file or folder"
    )


def copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Its files into a folder that load() then reads."""
    for name, path in tokenizer.files.items():
        shutil.copyfile(path, folder / name)


def same(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers, perhaps of different kinds, give the same ids."""
    if a.fingerprint() == b.fingerprint():
        return True
    alike = a.vocab_size == b.vocab_size and a.special == b.special
    return alike and all(a.encode(text) == b.encode(text) for text in PROBES)


def check_rows(tokenizer: Tokenizer, n_rows: int) -> None:
    """Raises InputError if a model's embedding has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > n_rows:
        raise InputError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, the model's embedding "
            f"only {n_rows} rows: they do not belong together"
        )


def _spaced(piece: str) -> int:
    """Bytes of a piece in which U+2581 stands for a space."""
    return len(piece.replace("\u2581", " ").encode())


def train(texts: list[str], out: Path, vocab_size: int) -> None:
    """Trains a byte-pair model that loses nothing: no normalisation, no added space, and bytes
    for characters without a piece. Pieces whatever the texts are: the 3,755 common Chinese
    characters (GB 2312, level 1), and the words that a template puts around every turn."""
    import sentencepiece

    model = io.BytesIO()
    frame = [f"system\n{SYSTEM}", "user\n", "assistant\n"]
    texts = [*texts, *frame * (1 + len(texts) // 20)]
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
            num_threads=n_cores(),
            minloglevel=1,
        )
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces from these texts: {error}") from None
    out.write_bytes(model.getvalue())


def common_characters() -> str:
    """Level 1 of GB 2312: rows 16 to 55 of its code table, in the order of pronunciation."""
    codes = [(row + 160, cell + 160) for row in range(16, 56) for cell in range(1, 95)]
    return b"".join(map(bytes, codes)).decode("gb2312", "ignore")


def texts_in(path: str) -> list[str]:
    """Every string in a file of JSON, or the lines of a text file."""
    if kind_of(path) not in (".json", ".jsonl"):
        return [line for _, line, _ in read_lines(path)]
    return [text for _, record, _ in read_json(path) for text in strings_in(record)]


def main() -> None:
    parser = command_line("python -m nanomed.text.tokenizer", __doc__)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="train a SentencePiece tokenizer")
    training.add_argument("files", nargs="+", help="JSON files or plain texts")
    training.add_argument("--out", required=True, type=Path, help="the file, NAME.model")
    training.add_argument("--vocab_size", type=int, default=6144, help="pieces; default 6144")
    arguments = parser.parse_args()
    texts = [text for path in arguments.files for text in texts_in(path)]
    train(texts, arguments.out, arguments.vocab_size)
    print(f"{arguments.out}: {load(arguments.out).vocab_size} pieces")


if __name__ == "__main__":
    main()
