import gzip
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanomed.config import InputError
from nanomed.records import BadField, chats_of, files, read_chats, read_json

QA = [("user", "问"), ("assistant", "答")]


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return str(path)


def values(path) -> list:
    return [value for _, value, _ in read_json(str(path))]


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "record, turns",
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "问"},
                    {"role": "assistant", "content": "答"},
                ]
            },
            QA,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "问"}]},
                    {"role": "assistant", "content": "答"},
                ]
            },
            QA,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
                "id": 7,
            },
            QA,
        ),
        ({"instruction": "问", "input": "", "output": "答"}, QA),
        ({"instruction": "问", "input": None, "output": "答", "history": None}, QA),
        ({"instruction": "问", "output": "答", "history": []}, QA),
        ({"instruction": "问", "input": "b", "output": "答"}, [("user", "问\nb"), QA[1]]),
        (
            {"instruction": "c", "output": "d", "history": [["问", "答"]]},
            [*QA, ("user", "c"), ("assistant", "d")],
        ),
        ({"instruction": ["问"], "input": "", "output": ["答"]}, QA),
        ({"questions": [["问"]], "answers": ["答"]}, QA),
        ({"question": "问", "answer": "答"}, QA),
        ({"问": "问", "答": "答"}, QA),
    ],
)
def test_formats_are_recognised_by_their_fields(record, turns):
    (chat,) = chats_of(record)
    assert chat.turns == turns and not chat.dropped and not chat.notes


def test_system_texts():
    turns = [{"from": "system", "value": "医"}, {"from": "human", "value": "问"}]
    turns += [{"from": "gpt", "value": "答"}]
    assert chats_of({"conversations": turns})[0].system == "医"
    assert chats_of({"conversations": turns[1:], "system": "生"})[0].system == "生"
    assert chats_of({"instruction": "问", "output": "答", "system": "生"})[0].system == "生"


def test_several_wordings_of_a_question_become_several_chats_of_one_answer():
    chats = chats_of({"questions": ["a", ["b"]], "answers": ["答", "答2"], "group": "g"})
    assert [c.turns[0][1] for c in chats] == ["a", "b"]
    assert {c.group for c in chats} == {"g"}


def test_turns_that_frame_no_answer_are_dropped_and_counted():
    turns = [("gpt", "欢迎"), ("human", "问"), ("gpt", "答"), ("human", "谢谢")]
    record = {"conversations": [{"from": r, "value": t} for r, t in turns]}
    (chat,) = chats_of(record)
    assert chat.turns == QA
    assert chat.notes == [
        "assistant turn before the first question dropped",
        "user turn after the last answer dropped",
    ]


@pytest.mark.parametrize(
    "question, answer, why", [("问", " \n", "empty answer"), ("", "答", "empty question")]
)
def test_empty_texts_are_dropped_with_their_cause(question, answer, why):
    assert chats_of({"instruction": question, "output": answer})[0].dropped == why


def test_rewritten_questions_share_a_group():
    """Spaces and punctuation do not make another question."""
    groups = {
        chats_of({"instruction": q, "output": "x"})[0].group
        for q in ("头痛，怎么办?", "头痛 怎么办！")
    }
    assert groups == {"头痛怎么办"}


@pytest.mark.parametrize(
    "record, message",
    [
        ([1], "expected an object"),
        (
            {"prompt": "a", "txt": "b"},
            r"found 'prompt', 'txt'; known, the nearest first: .*prompt.* --fields answer=txt",
        ),
        ({"mesages": []}, "the nearest first: messages"),
        (
            {"instruction": "a", "outputs": "b"},
            r"question\|prompt.* \+ answer\|output.* --fields answer=outputs$",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
        ({"messages": "x"}, "expected a list of turns"),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            r"'messages\[0\].role': unknown role.*user",
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "unknown role 3"),
        ({"messages": [{"role": "user"}]}, "expected 'role' and 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "only parts of type text",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "expected text, found 5"),
        ({"instruction": "a", "output": ["b", "c"]}, "preference pair"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"history\[0\]"),
        ({"instruction": [], "output": "b"}, "an empty list"),
        (
            {"instruction": "a", "output": "cut \ud83d"},
            r"'output': a lone surrogate '\\ud83d' at character 4",
        ),
    ],
)
def test_what_cannot_be_read_names_its_field(record, message):
    with pytest.raises(BadField, match=message):
        chats_of(record)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "text", ['[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n', '\ufeff {"a":1} {"a":2}']
)
def test_arrays_and_lines(tmp_path, text):
    assert values(write(tmp_path / "x", text)) == [{"a": 1}, {"a": 2}]


def test_gz(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress('{"a": "糖"}\n'.encode()))
    assert values(path) == [{"a": "糖"}]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="after record"):
        values(path)


@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=20)), min_size=1, max_size=8),
    st.booleans(),
    st.integers(1, 50),
)
@example([{"": "\ufffd"}], False, 1)
@settings(max_examples=200, deadline=None)
def test_any_values_at_any_read_size(tmp_path_factory, records_, array, chunk):
    """Records that end anywhere in what is read at a time come out whole."""
    path = tmp_path_factory.mktemp("json") / "x"
    indent = 1 if chunk % 2 else None
    lines = [json.dumps(r, ensure_ascii=chunk % 3 == 0, indent=indent) for r in records_]
    write(path, f"[{','.join(lines)}]" if array else "\n".join(lines))
    before, files.CHUNK = files.CHUNK, chunk
    try:
        assert values(path) == records_
    finally:
        files.CHUNK = before


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "x holds no record: the file is empty"),
        (" \n", "the file is empty"),
        ("[]", "the file is empty"),
        ("hello", "record 1: broken JSON"),
        ('{"a": 1}\n{"a": \n{"a": 3}', "record 2: broken JSON"),
        ('{"a": 1}\n{"a": "b\n{"a": 3}', "record 2: broken JSON"),
        ('{"a": 1}\n{"a": "b', "record 2: broken JSON"),
        ('[{"a": 1}, {"a": 2}', "after record 2: the array is cut off"),
        ('[{"a": 1}, {"a": 2,}]', "record 2: broken JSON"),
        ('[{"a": 1} {"a": 2}]', "after record 1: expected"),
        ('[{"a": 1}] [{"a": 2}]', "text after the array's end"),
        ("[" + "[" * 100_000, "record 1: nested too deep"),
    ],
)
def test_broken_files_name_the_record(tmp_path, text, message):
    """The error names the file and the place in it."""
    with pytest.raises(InputError, match=message):
        values(write(tmp_path / "x", text))


# A record of 200 characters, with so many x as fit, stands second in each.
AS_LARGE_AS_CAN_BE = {
    "x.jsonl": '{"a": "b"}\n{"a": "%s"}\n',
    "x.json": '[{"a": "b"}, {"a": "%s"}]',
    "x.jsonl.gz": '{"a": "b"}\n{"a": "%s"}\n',
    "x.txt": "b\n\n%s\n",
    "x.csv": "a,c\nb,d\n%s,d\n",
}
NEVER_ENDS = {
    "quote.json": '[{"a": "b"}, {"a": "' + "x," * 1000,
    "bracket.jsonl": '{"a": "b"}\n{"a": [' + '"x",' * 1000,
    "line.txt": "b\n" + "x" * 1000,
    "line.csv": "a,c\nb,d\n" + "x" * 1000,
    "quote.csv": 'a,c\nb,d\n"' + "x\n" * 1000,
    "columns.csv": "a,c\nb,d\n" + "x," * 1000,
}


def records_before_the_error(path, message: str) -> list[int]:
    found = []
    with pytest.raises(InputError) as error:
        found.extend(number for number, *_ in files.read_records(str(path)))
    assert str(error.value).startswith(f"{path}, {message}")
    return found


@pytest.mark.parametrize("chunk", [50, 1 << 20])
@pytest.mark.parametrize("name", AS_LARGE_AS_CAN_BE)
def test_a_record_over_the_limit_is_named(tmp_path, monkeypatch, name, chunk):
    """Wherever a read ends; one character less is read."""
    monkeypatch.setattr(files, "MAX_RECORD", 200)
    monkeypatch.setattr(files, "CHUNK", chunk)
    path, text = tmp_path / name, AS_LARGE_AS_CAN_BE[name]
    save = gzip.compress if name.endswith(".gz") else bytes
    ends = name in ("x.txt", "x.csv")  # of lines count
    room = 200 - len('{"a": ""}' if "json" in name else ",d" * ("csv" in name)) - ends
    path.write_bytes(save((text % ("x" * room)).encode()))
    assert [number for number, *_ in files.read_records(str(path))] == [1, 2]
    path.write_bytes(save((text % ("x" * (room + 1))).encode()))
    message = "record 2: over 200 characters; a quote, a bracket or a line's end may be missing, "
    assert records_before_the_error(path, message + "else split the record") == [1]


@pytest.mark.parametrize("chunk", [50, 1 << 20])
@pytest.mark.parametrize("name", NEVER_ENDS)
def test_a_record_that_never_ends_is_named(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(files, "MAX_RECORD", 200)
    monkeypatch.setattr(files, "CHUNK", chunk)
    (tmp_path / name).write_text(NEVER_ENDS[name])
    assert records_before_the_error(tmp_path / name, "record 2: over 200 characters") == [1]


def test_a_book_in_a_csv_file(tmp_path):
    """Python's own limit for a field is 131,072 characters."""
    path = write(tmp_path / "x.csv", "text,n\n" + "糖" * 200_000 + ",1\n")
    ((_, row, _),) = files.read_records(path)
    assert len(row["text"]) == 200_000


def test_missing_files_folders_and_other_encodings(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        values(tmp_path / "none")
    with pytest.raises(InputError, match="Is a directory"):
        values(tmp_path)


def test_errors_name_file_record_and_field(tmp_path):
    good = {"instruction": "a", "output": "b"}
    path = write(tmp_path / "x.json", json.dumps([good, {**good, "output": 5}]))
    with pytest.raises(
        InputError, match=r"x.json, record 2: field 'output': expected text, found 5"
    ):
        list(read_chats(path))


@pytest.mark.parametrize(
    "name, n_chats, n_turns",
    [
        ("medical_sft_sharegpt.jsonl", 1000, 2000),
        ("cmtmedqa_multi_turn.json", 520, 3000),
        ("huatuo26m_single_turn.json", 2000, 4000),
        ("medical_corpus_zh.txt", 87, 174),
    ],
)
def test_real_files(shared_data, name, n_chats, n_turns):
    chats = [chat for _, chat, _ in read_chats(str(shared_data / name))]
    assert len(chats) == n_chats and sum(len(c.turns) for c in chats) >= n_turns


@pytest.mark.parametrize("head", ["", "[", " \n[\n"])
def test_a_text_file_that_holds_json_is_json(tmp_path, head):
    """Else each of its lines is a document: also one that begins like JSON."""
    path = tmp_path / "x.txt"
    path.write_text(head + '{"question": "a",\n "answer": "b"}' + "]" * bool(head))
    assert [record["answer"] for _, record, _ in files.read_records(str(path))] == ["b"]
    path.write_text('[1] A reference\n"quoted"\n{braces}\n7\n')
    texts = [record["text"] for _, record, _ in files.read_records(str(path))]
    assert texts == ["[1] A reference", '"quoted"', "{braces}", "7"]
