"""Nothing that a record says is lost in silence: every text is rendered, or the ledger names its
field, or its turn or example is counted as dropped."""

import itertools
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanomed.records import FORMATS, BadField, PreferencePair, chats_of, pair_of
from nanomed.records.chats import ANSWER_FIRST
from nanomed.records.fields import KNOWN_AS, LABELS, NAMES
from nanomed.records.turns import MARKS
from tests.formats import document_of

READERS = {"chat": chats_of, "pair": lambda r: [pair_of(r)], "document": lambda r: [document_of(r)]}
# Notes that stand for one text each that is not rendered.
LEFT_OUT = (
    ANSWER_FIRST,
    "another " + ANSWER_FIRST,
    "user turn after the last answer dropped",
    "further answer to the same question left out",
)
KNOWN = sorted(
    {n for f in FORMATS for n in (*re.split("[ |]", f.fields), *f.besides)} | {*KNOWN_AS}
)
OTHERS = ["reasoning", "Complex_CoT", "notes", "label", "id", "tools", "meta", "score"]


@st.composite
def record_of(draw, shape: str) -> dict:
    """A record of a format of this shape with other fields beside it. Every text is another one."""
    count = itertools.count()
    text = lambda: f"text{next(count)}x"  # noqa: E731

    def turns(n: int) -> list[dict]:
        keys = draw(st.sampled_from([("role", "content"), ("from", "value")]))
        first = draw(st.sampled_from([0, 0, 0, 1]))  # sometimes the assistant's
        said = [
            {keys[0]: ("user", "assistant")[(first + i) % 2], keys[1]: text()} for i in range(n)
        ]
        for turn in said:
            for name in draw(st.sets(st.sampled_from(["reasoning_content", "name", "weight"]))):
                turn[name] = draw(st.sampled_from([0, 1])) if name == "weight" else text()
        if draw(st.booleans()):
            said.insert(0, {keys[0]: "system", keys[1]: text()})
        return said

    def value(name: str):
        known = KNOWN_AS.get(name, name)
        if known == "messages":
            return turns(draw(st.integers(1, 5)))
        if known == "history":
            return [[text(), text()] for _ in range(draw(st.integers(0, 2)))]
        if known == "data":
            return ["问：" + text(), "答：" + text()]
        if known == "options":
            return {"A": text(), "B": text()}
        if known in ("chosen", "rejected", "prompt", "completion") and draw(st.booleans()):
            return turns(draw(st.integers(1, 3)))
        if known in ("question", "answer", "instruction", "context") and draw(st.booleans()):
            return [text() for _ in range(draw(st.integers(1, 3)))]
        if known == "output" and shape == "pair":
            return [text(), text()]
        return draw(st.sampled_from([text(), text(), text(), None, "", {"inner": [text()]}, 7]))

    known = draw(st.sampled_from([f for f in FORMATS if f.shape == shape]))
    names = [draw(st.sampled_from(group.split("|"))) for group in known.fields.split()]
    names += draw(st.lists(st.sampled_from(KNOWN + OTHERS), max_size=4))
    if known.besides and draw(st.booleans()):
        names.append(draw(st.sampled_from(sorted(known.besides))))
    others = {n: NAMES[n].split() for n in names if n in NAMES}
    names = [draw(st.sampled_from([n, n, *others.get(n, [])])) for n in names]
    record = {name: value(name) for name in names}
    if "options" in known.fields or "A B" in known.fields:
        record["answer_idx"] = "B"
        record |= {name: None for name in ("answer", "output") if name in record}
    return record


def rendered(examples: list, encoder) -> str:
    """What the model gets of them; of one that is dropped, its texts, for it is counted."""
    ids, dropped = [], []
    for example in examples:
        if example.dropped or hasattr(example, "text"):
            dropped.append(repr(example))
        elif isinstance(example, PreferencePair):
            ids += [i for side, _ in encoder.pair(example, 10**6)[0] for i in side]
        else:
            ids += encoder.chat(example, 10**6)[0]
    return encoder.tokenizer.decode(ids) + "".join(dropped)


def texts_by_place(value, place: str):
    """(where in the record, text): of a turn's field `messages[].name`."""
    if isinstance(value, str):
        yield from ((place, text) for text in re.findall(r"text\d+x", value))
    elif isinstance(value, list):
        for entry in value:
            is_turn = isinstance(entry, dict) and {"role", "from"} & {*entry}
            for name, inner in entry.items() if is_turn else []:
                own = name in ("role", "from", "content", "value")
                yield from texts_by_place(inner, place if own else f"{place}[].{name}")
            if not is_turn:
                yield from texts_by_place(entry, place)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_by_place(inner, place)


def check_nothing_is_lost(shape: str, encoder, record: dict) -> bool:
    """False if the record is refused, which is no silence."""
    try:
        examples = READERS[shape](record)
    except BadField:
        return False
    if all(example.dropped for example in examples):
        return True  # and counted with its cause
    shown = rendered(examples, encoder)
    counted = {name for example in examples for name in example.unread} | LABELS | {*MARKS}
    lost = [
        (place, text)
        for name, value in record.items()
        for place, text in texts_by_place(value, name)
        if text not in shown and place not in counted and name not in counted
    ]
    notes = [note for example in examples for note in getattr(example, "notes", [])]
    allowed = sum(note in LEFT_OUT for note in notes) // max(
        1, len(examples) if shape == "x" else 1
    )
    assert len(lost) <= allowed, f"lost: {lost}, of {json.dumps(record, ensure_ascii=False)}"
    return True


def run(shape: str, encoder, n: int) -> None:
    read = []

    # The suite's cases are the same in every run, the long test's are new ones.
    @settings(max_examples=n, deadline=None, database=None, derandomize=n < 1000,
              suppress_health_check=[*HealthCheck])  # fmt: skip
    @given(record_of(shape))
    def each(record: dict) -> None:
        read.append(check_nothing_is_lost(shape, encoder, record))

    each()
    assert sum(read) > len(read) / 5  # the others were refused by name


@pytest.mark.parametrize("shape", READERS)
def test_no_text_is_lost_in_silence(shape, encoder):
    run(shape, encoder, 300)


@pytest.mark.slow
@pytest.mark.parametrize("shape", READERS)
def test_no_text_is_lost_in_silence_in_10_000_cases(shape, encoder):
    run(shape, encoder, 10_000)


def test_an_object_beside_a_prompt_of_turns_is_counted():
    """Found by the long test: `input` holds no text, so the prompt does not take it."""
    turn = {"role": "user", "content": "question"}
    pair = pair_of({"input": {"inner": ["lost?"]}, "output": ["a", "b"], "prompt": [turn]})
    assert pair.unread == ["input"]
