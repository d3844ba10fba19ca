"""Files as streams of values: JSON arrays, JSON lines, CSV, Parquet and plain text, compressed too.

Nothing is held whole or unpacked to disk. All readers yield (number from 1, value, bytes of the
file read so far) and raise InputError naming the file and the record.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TextIO

from nanomed.config import InputError, optional
from nanomed.records.encodings import HEAD, encoding_of, packing_errors, unpacked

CHUNK = 1 << 20  # characters read at a time
MAX_RECORD = 64 << 20  # characters; a larger record is a broken file

Numbered = Iterator[tuple[int, Any, int]]


def read_records(path: str) -> Numbered:
    """The records of a file of any kind: the rows of CSV and Parquet files as objects; the lines of
    a text file, unless it holds JSON, as documents."""
    kind = kind_of(path)
    if kind == ".txt" and not _holds_json(path):
        return ((number, {"text": line}, size) for number, line, size in read_lines(path))
    parsers = {".parquet": _parquet, ".csv": _objects, ".tsv": _objects}
    return _numbered(path, parsers.get(kind, _values))


def _holds_json(path: str) -> bool:
    """Whether the first value in it is a JSON object."""
    try:
        return isinstance(next(read_json(path))[1], dict)
    except InputError:
        return False


def kind_of(path: str) -> str:
    """The ending of the file's name, without that of its compression."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return name[name.rfind(".") :] if "." in name else ""


def read_json(path: str) -> Numbered:
    """Each element of a JSON array, or each of the JSON values that follow one another."""
    return _numbered(path, _values)


def read_lines(path: str) -> Numbered:
    """Each line that is not blank, without its end."""
    return _numbered(path, _lines)


def read_rows(path: str) -> Numbered:
    """Each row of a CSV file as a list of its columns, the header among them if there is one."""
    return _numbered(path, lambda *file: (row for _, row in _rows(*file)))


def encoding(path: str) -> str:
    """utf-8 or gb18030, as the readers take the file; "" if it holds no text."""
    if kind_of(path) == ".parquet":
        return ""
    with open(path, "rb", HEAD) as file:
        return encoding_of(path, unpacked(path, file)).removesuffix("-sig")


def _numbered(path: str, parse: Callable[[str, BinaryIO], Iterator[Any]]) -> Numbered:
    number = 0
    try:
        with open(path, "rb", HEAD) as raw:
            for number, value in enumerate(parse(path, unpacked(path, raw)), 1):
                yield number, value, raw.tell()
    except (*packing_errors(), csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}, after record {number}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if number == 0:
        raise InputError(f"{path} holds no record: the file is empty")


def _as_text(path: str, file: BinaryIO, newline: str | None = None) -> TextIO:
    """A byte that is no UTF-8 becomes a lone surrogate, which text_of() meets in its field."""
    found = encoding_of(path, file)
    errors = "surrogateescape" if found == "utf-8-sig" else "strict"
    return io.TextIOWrapper(file, found, errors, newline)


def _parquet(path: str, file: BinaryIO) -> Iterator[dict]:
    pyarrow = optional("pyarrow", path)
    parquet = optional("pyarrow.parquet", path)
    try:
        for batch in parquet.ParquetFile(file).iter_batches(1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _rows(path: str, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
    """(the number of its last line, its columns) of each row of a CSV file that is not empty."""
    text = _as_text(path, file, newline="")
    number, size = 0, 0  # of the row that is being read: the first, often a header, is 0

    def lines() -> Iterator[str]:
        nonlocal size
        while line := text.readline(MAX_RECORD + 1):
            size += len(line)
            if size > MAX_RECORD:
                raise _too_large(path, number)
            yield line

    csv.field_size_limit(MAX_RECORD)  # by default 131,072: less than a book
    # strict: else an open quote would swallow the rest unnoticed
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    rows = csv.reader(lines(), delimiter=delimiter, strict=True)
    for row in filter(None, rows):
        yield rows.line_num, row
        number, size = number + 1, 0


def _objects(path: str, file: BinaryIO) -> Iterator[dict[str, str]]:
    """Each row as an object with the header's names."""
    rows = _rows(path, file)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if len(set(header)) != len(header):
        raise InputError(f"{path}: the header names a column twice: {', '.join(header)}")
    for number, (line, row) in enumerate(rows, 1):
        if len(row) != len(header):
            raise InputError(
                f"{path}, record {number} (line {line}): {len(row)} columns, but the header has "
                f"{len(header)}: {', '.join(header)[:200]}"
            )
        yield dict(zip(header, row, strict=True))


def _lines(path: str, file: BinaryIO) -> Iterator[str]:
    text, number = _as_text(path, file), 1
    while line := text.readline(MAX_RECORD + 1):
        if len(line) > MAX_RECORD:
            raise _too_large(path, number)
        if line.strip("\ufeff \t\r\n\f"):
            yield line.rstrip("\n").lstrip("\ufeff")
            number += 1


def _values(path: str, file: BinaryIO) -> Iterator[Any]:
    text, decode = _as_text(path, file), json.JSONDecoder().raw_decode
    buffer = text.read(CHUNK)
    position = _NOT_SPACE.search(buffer).start()
    array = buffer[position : position + 1] == "["
    position += array
    number, closed, comma_due = 1, False, False
    while not closed:
        position = _NOT_SPACE.search(buffer, position).start()
        if position == len(buffer):
            buffer, position = text.read(CHUNK), 0
            if buffer:
                continue
            break
        if array and buffer[position] == "]":
            closed = True
        elif array and comma_due:
            if buffer[position] != ",":
                raise InputError(f"{path}, after record {number - 1}: expected ',' or ']'")
            position, comma_due = position + 1, False
        else:
            try:
                value, end = decode(buffer, position)
            except RecursionError:
                raise InputError(f"{path}, record {number}: nested too deep") from None
            except json.JSONDecodeError as error:
                goes_on = _may_go_on(error, buffer)
                if goes_on and len(buffer) - position > MAX_RECORD:
                    raise _too_large(path, number) from None
                if not (more := goes_on and text.read(CHUNK + len(buffer))):
                    near = buffer[max(position, error.pos - 30) : error.pos + 30]
                    problem = f"broken JSON: {error.msg} near {near!r}"
                    raise InputError(f"{path}, record {number}: {problem}") from None
                buffer, position = buffer[position:] + more, 0
                continue
            except ValueError as error:  # a number of thousands of digits
                raise InputError(f"{path}, record {number}: {error}") from None
            if end - position > MAX_RECORD:
                raise _too_large(path, number)
            yield value
            position, number, comma_due = end, number + 1, array
    if array and not closed:
        raise InputError(f"{path}, after record {number - 1}: the array is cut off, no ']'")
    if (buffer[position + 1 :] + text.read(CHUNK)).strip():
        raise InputError(f"{path}: text after the array's end")


_NOT_SPACE = re.compile(r"[^ \t\r\n\ufeff]|\Z")  # joined files have their marks in the middle


def _may_go_on(error: json.JSONDecodeError, buffer: str) -> bool:
    """Whether the value may be whole once more of the file is read: then the decoder fails at the
    buffer's end, or in a string without one."""
    return error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated")


def _too_large(path: str, number: int) -> InputError:
    return InputError(
        f"{path}, record {number}: over {MAX_RECORD:,} characters; a quote, a bracket or a line's "
        "end may be missing, else split the record"
    )
