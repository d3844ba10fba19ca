"""What a file is by its bytes: read right, or refused by its name with the remedy; never guessed in
silence."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import zipfile

import pytest

from nanomed.config import InputError
from nanomed.records import read_chats
from nanomed.records.files import encoding
from tests.formats import read_documents

CHINESE = "孩子咳嗽三天，需要拍片吗？如无高热和气促，可先观察；若持续一周以上请就诊。"
TRADITIONAL = "孩子咳嗽三天，需要照X光嗎？如果沒有發燒和氣促，可以先觀察；若持續一週以上請就診。"
JAPANESE = "咳が三日続いています。熱がなければ水分を取って休んでください。"
KOREAN = "삼일 동안 기침을 하고 있습니다. 열이 없으면 쉬면서 물을 많이 드세요."
FRENCH = "La fièvre a été élevée ; le médecin a prescrit du repos à l'hôpital."
GERMAN = "Der Patient hat über 38°C Fieber, müde Füße und Übelkeit."
QUOTES = "Patient 0: it’s 38.5°C since Monday and she can’t sleep"
TURKISH = "Hastanın ateşi yüksek, öksürüğü üç gündür sürüyor."


def csv_of(text: str) -> str:
    return f"question,answer\n{text},{text}\n" * 1


@pytest.mark.parametrize(
    "text, codec, name",
    [
        (TRADITIONAL, "big5", "Big5"),
        (TRADITIONAL, "big5hkscs", "Big5"),
        (JAPANESE, "shift_jis", "Shift-JIS"),
        (JAPANESE, "cp932", "Shift-JIS"),
        (JAPANESE, "euc_jp", "EUC-JP"),
        (KOREAN, "euc_kr", "EUC-KR"),
        *[(text, "cp1252", "Windows-1252") for text in (FRENCH, GERMAN, QUOTES)],
        (FRENCH, "latin-1", "Windows-1252"),
        (TURKISH, "cp1254", "Windows-1252"),  # a sibling
        *[(text, "utf-16", "UTF-16") for text in (CHINESE, FRENCH)],
        *[(text, "utf-16-le", "UTF-16LE") for text in (CHINESE, FRENCH, "plain English")],
        *[(text, "utf-16-be", "UTF-16BE") for text in (CHINESE, FRENCH, "plain English")],
    ],
)
@pytest.mark.parametrize("file", ["a.csv", "a.txt", "a.jsonl"])
def test_other_encodings_are_refused_by_name(text, codec, name, file, tmp_path):
    content = {"a.csv": csv_of(text.replace(",", "")), "a.txt": text + "\n" + text + "\n"}
    record = json.dumps({"text": text, "question": text, "answer": text}, ensure_ascii=False)
    path = tmp_path / file
    path.write_bytes(content.get(file, record + "\n").encode(codec))
    read = read_chats if file == "a.csv" else read_documents
    with pytest.raises(InputError, match=f"likely {name}: iconv -f {name} -t UTF-8"):
        list(read(str(path)))


@pytest.mark.parametrize("text", [CHINESE, TRADITIONAL])
def test_gb18030_is_read_where_it_gives_chinese(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(csv_of(text).encode("gb18030"))
    (chat,) = [chat for _, chat, _ in read_chats(str(path))]
    assert [said for _, said in chat.turns] == [text, text] and encoding(str(path)) == "gb18030"
    path.write_bytes(csv_of(text).encode())
    assert encoding(str(path)) == "utf-8"


def test_gb18030_that_gives_none_is_not_guessed(tmp_path):
    """Names of drugs have no common character; it may be anything."""
    (tmp_path / "a.csv").write_bytes(csv_of("阿莫西林胶囊").encode("gb18030"))
    with pytest.raises(InputError, match=r"not recognised \(GB18030\?\): iconv -f ENCODING"):
        list(read_chats(str(tmp_path / "a.csv")))


@pytest.mark.parametrize("name", ["medical_corpus_zh.txt", "huatuo26m_single_turn.json"])
def test_every_piece_of_real_text_is_known_by_its_encoding(name, shared_data, tmp_path):
    """100 characters are enough to see GB18030; and no piece in UTF-8 is taken for another."""
    text = (shared_data / name).read_text(encoding="utf-8")[:60_000]
    path = tmp_path / "a.txt"
    for at in range(0, len(text) - 100, 500):
        for codec in ("utf-8", "gb18030"):
            path.write_bytes(text[at : at + 100].encode(codec))
            assert encoding(str(path)) == codec


@pytest.mark.parametrize("at", [0, 17, 40_000])
def test_a_bad_byte_is_met_in_its_record_and_field(at, tmp_path):
    rows = [f"{CHINESE}{i},{CHINESE}\n".encode() for i in range(at + 3)]
    rows[at] = rows[at].replace("孩子".encode(), "孩子".encode()[:-1])
    (tmp_path / "a.csv").write_bytes(b"question,answer\n" + b"".join(rows))
    with pytest.raises(InputError, match=rf"record {at + 1}: field 'question'.* no UTF-8") as error:
        list(read_chats(str(tmp_path / "a.csv")))
    assert "gb18030" not in str(error.value)


def test_a_mark_in_the_middle_is_skipped(tmp_path):
    """Two files that were joined, each with its byte order mark."""
    line = json.dumps({"question": "问", "answer": "答"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n\ufeff{line}\n \ufeff", encoding="utf-8")
    assert len(list(read_chats(str(tmp_path / "a.jsonl")))) == 2
    (tmp_path / "a.txt").write_text("\ufeff痛风\n\ufeff糖尿病\n\ufeff\n", encoding="utf-8")
    texts = [document.text for _, document, _ in read_documents(str(tmp_path / "a.txt"))]
    assert texts == ["痛风", "糖尿病"]


# ---------------------------------------------------------------- what is no text


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", "{}")
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:91\nsize 79766423\n"


@pytest.mark.parametrize(
    "content, message",
    [
        (POINTER, "a Git LFS pointer.* git lfs pull"),
        (b"\xef\xbb\xbf" + POINTER, "git lfs pull"),
        (gzip.compress(POINTER), "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page"),
        (b"\n  <HTML><head>", "an HTML page"),
        (zipped(), "a zip archive.* unzip"),
        (tarred(), "a tar archive: tar -xf"),
        (gzip.compress(tarred()), "a tar archive: tar -xf"),
        (bz2.compress(b"{}"), "bunzip2"),
        (lzma.compress(b"{}"), "unxz"),
        (b"7z\xbc\xaf\x27\x1c\0", "7z x"),
        (b"Rar!\x1a\x07", "unrar x"),
        (b"%PDF-1.7", "pdftotext"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_what_is_no_text_is_refused_by_what_it_is(content, message, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_a_text_that_speaks_of_html_or_zip_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("PK is a drug\n<p>html</p>\nBZ h\n", encoding="utf-8")
    assert len(list(read_documents(str(tmp_path / "a.txt")))) == 3


# ---------------------------------------------------------------- compressed, Parquet, tabs

RECORDS = [{"question": f"问{i}", "answer": f"答{i}", "note": None} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def turns_in(path) -> list:
    return [chat.turns for _, chat, _ in read_chats(str(path))]


EXPECTED = [[("user", f"问{i}"), ("assistant", f"答{i}")] for i in range(5)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a.JSON"])
def test_gzip_is_unpacked_by_what_it_is(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(LINES))
    assert turns_in(tmp_path / name) == EXPECTED


def test_zstandard(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed)  # files that were joined
    assert turns_in(tmp_path / "a.jsonl.zst") == EXPECTED * 2
    (tmp_path / "b.jsonl.zst").write_bytes(packed[:-5])
    with pytest.raises(InputError):
        turns_in(tmp_path / "b.jsonl.zst")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match=r"a\.jsonl\.zst needs .* pip install zstandard"):
        turns_in(tmp_path / "a.jsonl.zst")


def test_parquet(tmp_path, monkeypatch):
    """Whole columns of null, nested lists and objects as data sets have them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    assert turns_in(path) == EXPECTED
    turn = {"role": "user", "content": "问", "from": None, "value": None}
    records = [{"messages": [turn, turn | {"role": "assistant", "content": "答"}], "output": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert turns_in(path) == [[("user", "问"), ("assistant", "答")]]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"train-00000\.parquet: "):
        turns_in(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        turns_in(path)


def test_tabs_between_columns(tmp_path):
    rows = [f'{r["question"]}\t"{r["answer"]}"' for r in RECORDS]
    (tmp_path / "a.tsv").write_text("question\tanswer\n" + "\n".join(rows), encoding="utf-8")
    assert turns_in(tmp_path / "a.tsv") == EXPECTED
