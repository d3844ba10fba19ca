"""A record of a file becomes token ids: what each tokenising process does."""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nanomed.records import Chat, Document, read_records, texts_in
from nanomed.records.fields import strings_in
from nanomed.store.cache import group_key
from nanomed.store.tally import Facts
from nanomed.text.template import Encoder

BATCH = 1 << 20  # characters that a process is given at a time
RENDERED = "chat rendered by the template"  # its note in the report
NO_LIMIT = 1 << 62  # tokens of a chat: here it is cut into slices, not shortened


class Batch(NamedTuple):
    """Records of one file as they stand in it; once encoded, what they became."""

    file: int  # its number
    path: str
    n_bytes: int  # of the file read so far
    records: list[tuple[int, Any]]  # (number from 1, record); encoded: (number, list[Encoded])


class Encoded(NamedTuple):
    """A document, or a chat as one."""

    ids: bytes  # uint32; none if it is dropped
    key: int
    facts: Facts

    @property
    def n_tokens(self) -> int:
        return len(self.ids) // 4


def batches(files: list[str], fields: Sequence[str], start: tuple[int, int]) -> Iterator[Batch]:
    """The records of all files from start (the file's number, the record's) on. Files before it
    are not opened, records before it not looked at."""
    for file in range(start[0], len(files)):
        first = start[1] if file == start[0] else 1
        records, size = [], 0
        for number, record, n_bytes in read_records(files[file], fields):
            if number < first:
                continue
            records.append((number, record))
            size += 8 + sum(map(len, strings_in(record)))
            if size >= BATCH:
                yield Batch(file, files[file], n_bytes, records)
                records, size = [], 0
        if records:
            yield Batch(file, files[file], n_bytes, records)


def encode(batch: Batch, encoder: Encoder) -> Batch:
    """Raises InputError at the first record that cannot be read."""
    return batch._replace(
        records=[
            (number, [_encoded(text, encoder) for text in texts_in(batch.path, number, record)])
            for number, record in batch.records
        ]
    )


def _encoded(text: Document | Chat, encoder: Encoder) -> Encoded:
    facts = Facts.of(text, encoder)
    if isinstance(text, Chat):
        facts.notes.append(RENDERED)
    return Encoded(array("I", ids_of(text, encoder)).tobytes(), group_key(text.group), facts)


def ids_of(text: Document | Chat, encoder: Encoder) -> list[int]:
    """A document's text; a chat as the template renders it; nothing of what is dropped. Both end
    with the document-end id, of which a text itself has none, however it is spelt."""
    if text.dropped:
        return []
    if isinstance(text, Document):
        return [*encoder.tokenizer.encode(text.text), encoder.document_end]
    ids, _, _ = encoder.chat(text, NO_LIMIT)
    return ids if ids[-1] == encoder.document_end else [*ids, encoder.document_end]
