"""What public files mean by their fields: exam questions, verdicts, marked turns, system texts,
lists of answers, null, prompts that stand twice."""

import pytest

from nanomed.config import InputError
from nanomed.records import BadField, chats_of, names_of, pair_of
from nanomed.records.fields import renamed
from tests.formats import QA, RAW, document_of, gpt, openai, turns

OPTIONS = {"A": "氨氯地平", "B": "缬沙坦", "C": "美托洛尔", "D": "氢氯噻嗪"}
ASKED = "哪种是β受体阻滞剂？\nA. 氨氯地平\nB. 缬沙坦\nC. 美托洛尔\nD. 氢氯噻嗪"


def one(record: dict):
    (chat,) = chats_of(record)
    return chat


# ---------------------------------------------------------------- exam questions

Q = {"question": "哪种是β受体阻滞剂？"}


@pytest.mark.parametrize(
    "record",
    [
        Q | {"answer": "C", "option": OPTIONS | {"E": ""}, "exam_type": 1},  # CMB
        Q | {"answer": "C", **OPTIONS, "id": "0"},  # C-Eval
        Q | {"answer": "C", "choices": [*OPTIONS.values()]},  # MMLU
        Q | {"cop": "c", **{f"op{k.lower()}": v for k, v in OPTIONS.items()}},  # MedMCQA
        Q | {"answer": "opc", **{f"op{k.lower()}": v for k, v in OPTIONS.items()}},
        Q | {"answer": "美托洛尔", "answer_idx": "C", "options": OPTIONS},  # MedQA
        {"instruction": Q["question"], "output": "C", "options": OPTIONS},
        {"Question": Q["question"], "Answer": "C", **OPTIONS},  # CMMLU
        {"query": Q["question"], "response": "C. 美托洛尔", "options": OPTIONS},
    ],
)
def test_an_exam_question_is_asked_with_its_options(record):
    assert one(record).turns == [("user", ASKED), ("assistant", "C。美托洛尔")]
    assert one(record).unread == [] and one(record).group == "哪种是β受体阻滞剂"


@pytest.mark.parametrize(
    "record",
    [
        Q | {"answer": 2, "choices": [*OPTIONS.values()]},
        Q | {"answer": "2", **OPTIONS},  # a number may count from 0 or from 1
        Q | {"cop": 2, **OPTIONS},
        Q | {"answer": "E", **OPTIONS},
        Q | {"answer": "C", "answer_idx": "B", "options": OPTIONS},  # they contradict each other
        Q | {"answer": "the third", "options": OPTIONS},
    ],
)
def test_an_exam_question_that_is_not_certain_is_refused(record):
    with pytest.raises(BadField, match=r"an exam question, .* of its options A, B, C, D is right"):
        chats_of(record)


def test_what_is_no_exam_question_though_it_has_such_fields():
    """Columns A and B beside an answer in words; a letter with options that hold nothing."""
    chat = one({"question": "问", "answer": "多休息，少吃盐。", "A": "甲组", "B": "乙组"})
    assert chat.turns[1][1] == "多休息，少吃盐。" and chat.unread == ["A", "B"]
    assert one({"question": "问", "answer": "B", "options": {}}).dropped.startswith("exam question")
    assert one(Q | {"answer": None, "options": OPTIONS}).dropped == "empty answer"


# ---------------------------------------------------------------- unpaired preferences


@pytest.mark.parametrize(
    "record",
    [
        {"messages": openai("问", "答")},
        {"conversations": gpt("问", "答")},
        {"instruction": "问", "output": "答"},
        {"question": "问", "answer": "答"},
        {"query": "问", "response": "答"},
        {"prompt": "问", "completion": "答"},
        {"prompt": openai("问"), "completion": openai("问", "答")[1:]},
        {"data": ["问：甲", "答：乙"]},
        {"ask": "问", "answer": "答"},
        Q | {"answer": "C", "options": OPTIONS},
    ],
)
@pytest.mark.parametrize("verdict", [True, False, 0, 1, "False", "true", "0", "1", 0.0])
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_an_answer_with_a_verdict_is_an_unpaired_preference(record, name, verdict):
    for read in (chats_of, pair_of):
        with pytest.raises(BadField, match=f"'{name}': .* an unpaired preference"):
            read(record | {name: verdict})


def test_what_is_no_verdict():
    for value in ("内科", 2, None, "", ["a"]):
        assert not one({"question": "问", "answer": "答", "label": value}).dropped
    assert document_of({"text": "文", "label": 1}).text == "文"
    pair = {"prompt": "问", "chosen": "好", "rejected": "坏", "label": 1}
    assert pair_of(pair).chosen == "好"
    kind = renamed({"question": "问", "answer": "答", "label": 1}, names_of(["kind=label"]))
    assert one(kind).turns == QA  # the remedy that the message names


# ---------------------------------------------------------------- turns that are not learned


@pytest.mark.parametrize("mark", ["weight", "loss", "train", "trainable", "loss_mask"])
@pytest.mark.parametrize("no, yes", [(0, 1), (False, True), ("false", "True"), (0.0, 1.0)])
def test_a_marked_turn_is_context(mark, no, yes):
    said = openai("一", "不知道", "二", "好")
    said[1][mark], said[3][mark] = no, yes
    assert (one({"messages": said}).untrained, one({"messages": said}).notes) == ({1}, [])
    before = [{"role": "assistant", "content": "迎"}, *said]
    assert one({"messages": before}).untrained == {1}  # counted without the one that is dropped
    assert one({"history": [["甲", "乙"]], "messages": said}).untrained == {3}
    said[3][mark] = no
    assert one({"messages": said}).dropped == "no turn is to be learned"


def test_a_weight_between_is_said():
    said = openai("问", "答")
    said[1]["weight"] = 0.5
    assert one({"messages": said}).notes == ["weight of a turn that is neither 0 nor 1 read as 1"]
    sides = {"chosen": openai("问", "好"), "rejected": openai("问", "坏")}
    sides["chosen"][1]["weight"] = 0
    assert pair_of(sides).dropped == "an answer is not to be learned"


# ---------------------------------------------------------------- system, history, context

BESIDE = {"system": "医", "history": [["一", "二"]]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": openai("问", "答")},
        {"conversation": gpt("问", "答")},
        {"conversation": [{"human": "问", "assistant": "答"}]},
        {"instruction": "问", "output": "答"},
        {"question": ["问"], "answer": ["答"]},
        {"prompt": "问", "completion": "答"},
        {"data": ["问：问", "答：答"]},
        {"ask": "问", "answer": "答"},
    ],
)
def test_system_and_history_are_read_in_every_chat(record):
    chat = one(BESIDE | record)
    assert (chat.system, chat.turns, chat.raw) == ("医", turns("一", "二", "问", "答"), False)
    exam = one(BESIDE | Q | {"answer": "C", "options": OPTIONS})
    assert exam.system == "医" and exam.turns[:2] == turns("一", "二")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {"instruction": "问", "output": ["好", "坏"]},
        {"conversations": gpt("问"), "chosen": "好", "rejected": "坏"},
        {"chosen": openai("问", "好"), "rejected": openai("问", "坏")},
        {"prompt": openai("问"), "chosen": "好", "rejected": "坏"},
        {"query": "问", "response": "好", "rejected_response": "坏"},
        {"messages": openai("问", "好"), "rejected_response": "坏"},
        {"messages": openai("问", "好"), "rejected_messages": openai("问", "坏")},
    ],
)
def test_system_and_history_are_read_in_every_pair(record):
    pair = pair_of(BESIDE | record)
    assert (pair.system, pair.raw, pair.unread) == ("医", False, [])
    assert (pair.turns, pair.chosen, pair.rejected) == (turns("一", "二", "问"), "好", "坏")


def test_several_system_texts_are_joined():
    system = [{"role": "system", "content": text} for text in ("医", "短", "医")]
    record = {"messages": [*system, *openai("问", "答")], "system": "慢", "instruction": "短"}
    assert one(record).system == "慢\n\n短\n\n医"
    nothing = {"role": "system", "content": ""}
    assert one({"system": "医", "messages": [nothing, *openai("问", "答")]}).system == "医"
    sides = {side: [*system[:1], *openai("问", side)] for side in ("chosen", "rejected")}
    assert pair_of(sides | {"system": "慢"}).system == "慢\n\n医"
    sides["rejected"][0] = system[1]
    assert pair_of(sides).dropped == "the two sides have different system texts"


def test_the_parts_of_a_question_stand_in_one_order():
    parts = {"input": "丁", "context": ["乙一", "乙二"], "instruction": "甲", "question": "丙"}
    expected = "甲\n乙一\n乙二\n丙\n丁"
    assert one(parts | {"answer": "答"}).turns[0][1] == expected
    assert pair_of(parts | {"chosen": "好", "rejected": "坏"}).turns == [("user", expected)]


def test_history_as_turns_or_as_text():
    for history in (openai("一", "二"), '[["一", "二"]]', gpt("一", "二")):
        chat = one({"question": "问", "answer": "答", "history": history})
        assert chat.turns == turns("一", "二", "问", "答")
    assert one({"messages": '[{"role": "user", "content": "问"}, {"role": "gpt", "content": "答"}]'}
               ).turns == QA  # fmt: skip


# ---------------------------------------------------------------- lists, null, empty texts

LEFT = "further answer to the same question left out"


@pytest.mark.parametrize(
    "questions, answers, pairs, n_left",
    [
        (["a", "b", "c"], ["1", "2", "3"], ["a1", "b2", "c3"], 0),
        ([["a", "b"], ["c"]], [["1"], ["2"]], ["a1", "b1", "c2"], 0),
        ([["a", "b"]], [["1", "2"]], ["a1", "b2"], 0),
        (["a", "b", "c"], ["1", "2"], ["a1", "b1", "c1"], 1),
        (["a", "b"], "1", ["a1", "b1"], 0),
        ("a", ["1", "2", "3"], ["a1"], 2),
        ("a", ["A", "B", "D"], ["aA、B、D"], 0),
    ],
)
@pytest.mark.parametrize("names", ["questions answers", "instruction output", "query response"])
def test_lists_of_one_length_belong_together(questions, answers, pairs, n_left, names):
    question, answer = names.split()
    if names == "instruction output" and isinstance(questions, str):
        return  # with a list of outputs that is a preference pair
    chats = chats_of({question: questions, answer: answers})
    assert ["".join(text for _, text in chat.turns) for chat in chats] == pairs
    assert chats[0].notes == [LEFT] * n_left and not any(chat.notes for chat in chats[1:])


@pytest.mark.parametrize(
    "empty", [None, "", " \n", "\u200b", "\ufeff\u200d", "\u3000\u00a0", "\u2800"]
)
def test_null_and_invisible_texts_are_empty(empty):
    assert one({"instruction": "问", "input": "", "output": empty}).dropped == "empty answer"
    assert one({"question": empty, "answer": "答"}).dropped == "empty question"
    assert one({"messages": openai("问", empty)}).dropped == "empty answer"
    assert pair_of({"prompt": "问", "chosen": empty, "rejected": "坏"}).dropped == "empty answer"
    assert (
        pair_of({"question": empty, "chosen": "好", "rejected": "坏"}).dropped == "empty question"
    )
    assert document_of({"text": empty}).dropped == "empty text"


def test_fields_of_other_formats_that_are_null_are_not_there():
    """As in files that were merged out of several formats."""
    nothing = {"messages": None, "conversations": [], "chosen": None, "rejected": "", "text": None}
    assert one(nothing | {"instruction": "问", "output": "答"}).turns == QA
    merged = [t | {"from": None, "value": None} for t in openai("问", "答")]
    assert one({"messages": merged, "answer": None}).turns == QA
    assert one({"question": "", "query": "问", "answer": None, "response": "答"}).turns == QA


def test_odd_answers_are_counted():
    for address in ("http://example.org/1.html", " https://a.b/c ", "www.example.org"):
        assert one({"question": "问", "answer": address}).notes == [
            "answer is a web address alone, kept"
        ]
    assert not one({"question": "问", "answer": "见 http://example.org"}).notes
    assert one({"prompt": "天是", "completion": "蓝的"}).notes == [RAW]


# ---------------------------------------------------------------- prompts of pairs


def test_a_prompt_beside_whole_sides_is_compared():
    sides = {"chosen": openai("一", "二", "问", "好"), "rejected": openai("一", "二", "问", "坏")}
    same = ["问\n", "一", "问 ", openai("问"), openai("一", "二", "问"), openai("一 ", "二", "问")]
    for prompt in same:
        pair = pair_of(sides | {"prompt": prompt})
        assert (pair.turns, pair.unread) == (turns("一", "二", "问"), [])
    for prompt in ("另一", openai("另一")):
        pair = pair_of(sides | {"prompt": prompt})
        assert (pair.turns, pair.unread) == (turns("一", "二", "问"), ["prompt"])


def test_a_prompt_that_texts_repeat_is_cut_off():
    asked = "\n\nHuman: Is cough bad?\n\nAssistant:"
    record = {"prompt": asked, "chosen": asked + " No.", "rejected": asked + " Yes."}
    pair = pair_of(record)
    cut = "prompt that an answer repeats cut off"
    assert (pair.chosen, pair.rejected, pair.raw) == (" No.", " Yes.", True)
    assert pair.notes == [cut, cut, RAW]
    assert pair_of(record | {"rejected": " Yes."}).notes == [cut, RAW]
    chat = {"question": "高血压", "chosen": "高血压是病", "rejected": "高血压\n不是病"}
    assert (pair_of(chat).chosen, pair_of(chat).rejected) == ("高血压是病", "\n不是病")


# ---------------------------------------------------------------- names


def test_roles_in_any_case_and_of_any_name():
    said = [{"role": "User", "content": "问"}, {"role": "ASSISTANT", "content": "答"}]
    assert one({"messages": said}).turns == QA
    said = [{"speaker": "Patient", "utterance": "问"}, {"speaker": "doctor", "utterance": "答"}]
    with pytest.raises(BadField, match=r"--fields messages=dialog role=speaker content=utterance$"):
        chats_of({"dialog": said})
    fields = ["messages=dialog", "role=speaker", "content=utterance"]
    named = renamed({"dialog": said}, names_of(fields))
    with pytest.raises(BadField, match=r"unknown role .*--fields user=Patient names it"):
        chats_of(named)
    fields += ["user=patient", "assistant=doctor"]
    assert one(renamed({"dialog": said}, names_of(fields))).turns == QA
    swapped = [{"from": "gpt", "value": "问"}, {"from": "human", "value": "答"}]
    with pytest.raises(BadField, match="as if the roles were swapped"):
        chats_of({"conversations": swapped})
    names = names_of(["user=gpt", "assistant=human"])
    assert one(renamed({"conversations": swapped}, names)).turns == QA


@pytest.mark.parametrize(
    "read, record, flag",
    [
        (chats_of, {"ask_text": "问", "reply": "答"}, "question=ask_text answer=reply"),
        (chats_of, {"question": "问", "reply": "答"}, "answer=reply"),
        (chats_of, {"id": "x", "n": 3, "reply": "答", "output": "o"}, "question=reply"),
        (pair_of, {"q": "问", "good": "好", "bad": "坏"}, "question=q chosen=good rejected=bad"),
        (pair_of, {"prompt": "问", "win": "好", "lose": "坏"}, "chosen=win rejected=lose"),
        (document_of, {"id": "x", "body": "文"}, "text=body"),
    ],
)
def test_unknown_fields_come_with_the_flag_that_reads_them(read, record, flag):
    with pytest.raises(BadField, match=f"--fields {flag}$"):
        read(record)
    found = read(renamed(record, names_of(flag.split())))
    assert not (found[0] if isinstance(found, list) else found).dropped


@pytest.mark.parametrize("entry", ["question", "question=", "quesion=query", "=query"])
def test_a_wrong_name_is_refused(entry):
    with pytest.raises(InputError, match=f"--fields {entry}: expected KNOWN=THEIRS"):
        names_of([entry])


def test_the_layouts_of_public_files():
    doctor = {"_id": "01-1", "source": "meddial", "conversation": openai("问", "答")}
    assert one(doctor).turns == QA  # DISC-MedLLM
    firefly = {"conversation_id": 1, "category": "x", "conversation": [
        {"human": "一", "assistant": "二"}, {"assistant": "答", "human": "问"}]}  # fmt: skip
    assert one(firefly).turns == turns("一", "二", "问", "答")
    swift = {"query": "问", "response": "答", "system": "医", "history": [["一", "二"]]}
    assert one(swift).turns == turns("一", "二", "问", "答") and one(swift).system == "医"
    o1 = {"Question": "问", "Complex_CoT": "先想一想", "Response": "答"}  # medical-o1
    assert (one(o1).turns, one(o1).unread) == (QA, ["Complex_CoT"])
    numbered = one({"question": "问", "answer": "答", "group": 3, "kind": 1})
    assert (numbered.group, numbered.source) == ("3", "1")
