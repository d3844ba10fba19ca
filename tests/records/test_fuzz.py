"""Whatever a data file holds, its reader gives shapes or an InputError that names the file."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomed.config import InputError
from nanomed.records import FORMATS, read_chats, read_pairs
from tests.formats import CHATS, DOCUMENTS, PAIRS, read_documents

READERS = {read_chats: CHATS, read_pairs: PAIRS, read_documents: DOCUMENTS}
NAMES = sorted({n for f in FORMATS for n in f.fields.replace("|", " ").split()})
NAMES += ["role", "from", "value", "system", "history", "input", "label", "group", "kind", "lang"]
NAMES += ["tool_calls", "tools", "source", "type", "title", "options"]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["user", "assistant", "system", "gpt", "human", "tool", "text", "问：甲"])
VALUES = st.recursive(
    LEAVES | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=12,
)
# A turn or a list of turns that is nearly right gets deeper than chance alone would.
TURN = st.fixed_dictionaries({"role": WORDS, "content": LEAVES | WORDS})
RECORDS = st.dictionaries(
    st.sampled_from(NAMES), VALUES | st.lists(TURN, max_size=4), min_size=1, max_size=6
)


def only_named_errors(reader, path) -> None:
    try:
        for _, shape, _ in reader(str(path)):
            assert shape.dropped or all(isinstance(text, str) for _, text in getattr(
                shape, "turns", [("", "")]))  # fmt: skip
    except InputError as error:
        assert str(path) in str(error)


def fuzz_records(reader, folder, data) -> None:
    path = folder / "x.json"
    path.write_text(json.dumps(data.draw(st.lists(RECORDS, min_size=1, max_size=3))))
    only_named_errors(reader, path)


def fuzz_bytes(reader, folder, data) -> None:
    """A good file with a piece replaced."""
    name, content, _ = data.draw(st.sampled_from(list(READERS[reader].values())))
    at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 12))
    new = data.draw(st.binary(max_size=12))
    path = folder / name
    path.write_bytes(content[:at] + new + content[at + length :])
    only_named_errors(reader, path)


def fuzz(reader, fuzzer, folder, n: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    # The suite's cases are the same in every run, the long test's are new ones.
    @settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000,
              suppress_health_check=quiet)  # fmt: skip
    @given(st.data())
    def run(data) -> None:
        fuzzer(reader, folder, data)

    run()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fuzzer", [fuzz_records, fuzz_bytes])
def test_only_named_errors(reader, fuzzer, tmp_path):
    fuzz(reader, fuzzer, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fuzzer", [fuzz_records, fuzz_bytes])
def test_only_named_errors_in_10_000_cases(reader, fuzzer, tmp_path):
    fuzz(reader, fuzzer, tmp_path, 10_000)
