"""Which version of the code a store's ids come from.

The code that turns a file into ids has parts. The version of a part is the number of its lines
below. A store keeps the versions that made it, and can be read as long as they are the same: so it
survives a change of code that does not change its ids. tests/store/test_versions.py knows the ids
of every version. If a change of code changes them it fails, and asks for a new line that says what
is different.
"""

from nanomed.config import InputError
from nanomed.text.template import Encoder

FIRST = "the first that has a number"
VERSIONS = {
    "documents": [FIRST],  # texts of files
    "chats": [FIRST],  # chats of files, rendered by a template
    "pairs": [FIRST],  # preference pairs, likewise
    "SentencePieceTokenizer": [FIRST],
    "RankTokenizer": [FIRST],
    "JsonTokenizer": [FIRST],
}


def versions(encoder: Encoder, *parts: str) -> dict[str, int]:
    """The numbers of these parts and of the tokenizer's kind."""
    named = (*parts, type(encoder.tokenizer).__name__)
    return {part: len(VERSIONS.get(part, ())) for part in named}


def check_versions(store: str, found: dict[str, int], wanted: dict[str, int]) -> None:
    """Raises InputError, saying what has changed since, if a store has other numbers than these."""
    for part, version in wanted.items():
        if (since := found.get(part, 0)) != version:
            changes = "; ".join(VERSIONS[part][since:]) or "a later nanomed has written it"
            raise InputError(
                f"{store} has ids of version {since or 'none'} of {part!r}, this nanomed makes "
                f"version {version} ({changes}); tokenise the files again"
            )
