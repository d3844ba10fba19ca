"""The token stores that every stage reads: files that are tokenised once, and whose
ids are then read from disk (memory-mapped).

examples.py    chats and preference pairs, with the tokens that are trained on
stream.py      documents for continued pre-training on disk, read as streams of tokens
writing.py     files into such a store: in order, resumable
tokenising.py  records become token ids, in many processes
tally.py       what became of the records, for the report
cache.py       which store belongs to which files, tokenizer and code

python -m nanomed.store FILES --tokenizer DIR --out STORE
"""

from nanomed.store.cache import group_key
from nanomed.store.examples import Store, chats, pairs
from nanomed.store.stream import Documents, Part, Piece
from nanomed.store.writing import build, documents

__all__ = [
    "Documents", "Part", "Piece", "Store",
    "build", "chats", "documents", "group_key", "pairs",
]  # fmt: skip
