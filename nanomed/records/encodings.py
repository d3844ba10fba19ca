"""What the first bytes of a file say: how to unpack it, that it is something else, its encoding."""

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable
from typing import BinaryIO

from nanomed.config import InputError, optional

HEAD = 1 << 20  # bytes that are looked at
UNPACKED_BY = {
    b"PK\x03\x04": "a zip archive, or a workbook: unzip {path}, or save the sheet as CSV",
    b"BZh": "compressed with bzip2: bunzip2 {path}",
    b"\xfd7zXZ\0": "compressed with xz: unxz {path}",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: 7z x {path}",
    b"Rar!": "a RAR archive: unrar x {path}",
    b"%PDF": "a PDF: pdftotext {path}",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
}
ALONE = re.compile(rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])")  # accents between letters
HTML = re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)


def unpacked(path: str, file: BinaryIO) -> BinaryIO:
    """The file's content, of .gz and .zst the unpacked one. Raises InputError for what holds no
    records, with the command that helps."""
    head = file.peek(4)
    if head.startswith(b"\x1f\x8b"):
        file = io.BufferedReader(gzip.GzipFile(fileobj=file), HEAD)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        zstandard = optional("zstandard", path)
        stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        file = io.BufferedReader(stream, HEAD)
    head = file.peek(HEAD)[:HEAD].removeprefix(codecs.BOM_UTF8)
    for magic, remedy in UNPACKED_BY.items():
        if head.startswith(magic):
            raise InputError(f"{path}: {remedy.format(path=path)}")
    if head[257:262] == b"ustar":
        raise InputError(f"{path}: a tar archive: tar -xf {path}")
    if HTML.match(head):
        raise InputError(f"{path}: an HTML page, not data; fetch the raw file")
    return file


def packing_errors() -> tuple[type[Exception], ...]:
    """What reading a broken compressed file raises."""
    zstandard = sys.modules.get("zstandard")
    return gzip.BadGzipFile, zlib.error, EOFError, getattr(zstandard, "ZstdError", EOFError)


# ---------------------------------------------------------------- encodings

# The Chinese characters that are used most, and punctuation: two in five of a medical text's, and
# next to none of what another encoding makes of its bytes.
FREQUENT = set(
    "，。？！、：；（）“”的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过"
    "发后作里用道行所然家事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心本前开但因只从想实无力它与"
    "把十吃药医這個們來為國時說會對發過後經學現當沒動還進樣開從實無與長機問關點業間將體種嗎醫藥應請給"
)


def _is_kana(c: str) -> bool:
    return "\u3041" <= c <= "\u30ff"


# name -> (Python's name, what is typical of it, what share at least of all that is not ASCII)
CODECS = {
    "Shift-JIS": ("cp932", _is_kana, 0.3),
    "EUC-JP": ("euc_jp", _is_kana, 0.3),
    "EUC-KR": ("euc_kr", lambda c: "\uac00" <= c <= "\ud7a3", 0.85),
    "GB18030": ("gb18030", FREQUENT.__contains__, 0.15),
    "Big5": ("big5", FREQUENT.__contains__, 0.15),
}


BAD = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as surrogateescape shows them


def encoding_of(path: str, file: BinaryIO) -> str:
    """Python's name of the file's encoding: UTF-8 where the first megabyte is that but for a few
    bytes; GB18030 only where that gives Chinese as it is written. Raises InputError that names any
    other."""
    head = file.peek(HEAD)[:HEAD]
    likely = _utf_16(head)
    if not likely:
        decoder = codecs.getincrementaldecoder("utf-8")
        try:
            decoder().decode(head)
            return "utf-8-sig"
        except UnicodeDecodeError:  # not "replace": a text may hold U+FFFD, which is no fault
            text = decoder("surrogateescape").decode(head)
        n_odd = sum(c > "\x7f" for c in text)
        if n_odd >= 10 * len(BAD.findall(text)):
            return "utf-8-sig"
        likely = next((name for name in CODECS if _fits(head, *CODECS[name])), "")
        if likely == "GB18030":
            return "gb18030"
    if not likely and len(ALONE.findall(head)) > n_odd / 2:
        likely = "Windows-1252"
    raise InputError(
        f"{path}: the text is no UTF-8, "
        + (f"and likely {likely}" if likely else "and its encoding is not recognised (GB18030?)")
        + f": iconv -f {likely or 'ENCODING'} -t UTF-8 {path} > NEW_FILE"
    )


def _fits(head: bytes, codec: str, is_typical: Callable[[str], bool], share: float) -> bool:
    try:
        odd = [c for c in codecs.getincrementaldecoder(codec)().decode(head) if c > "\x7f"]
    except UnicodeDecodeError:
        return False
    return sum(map(is_typical, odd)) >= share * max(1, len(odd))


def _utf_16(head: bytes) -> str:
    """UTF-16 by its mark, or by what is ASCII or frequent in it: there the bytes hold zeros."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for name in ("UTF-16LE", "UTF-16BE") if b"\0" in head else ():
        text = head[: len(head) // 2 * 2].decode(name, "replace")
        if sum(c.isascii() or c in FREQUENT for c in text) > len(text) / 4:
            return name
    return ""
