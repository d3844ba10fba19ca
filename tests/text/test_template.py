import dataclasses
import itertools
import json
import random
import re

import pytest

from nanomed.config import InputError
from nanomed.records import Chat, PreferencePair
from nanomed.text.template import CHATML, TEMPLATES, Encoder, Template, load

# Five fixed chats: (turns, what is trained on): every answer with its end of turn, no question.
GOLDEN = [
    ([("user", "什么是高血压？"), ("assistant", "血压持续升高。")], "血压持续升高。<|im_end|>"),
    (
        [("user", "Hi"), ("assistant", "Hello."), ("user", "a\n\nb"), ("assistant", " Yes \n")],
        "Hello.<|im_end|> Yes \n<|im_end|>",
    ),
    (
        [("user", "发烧"), ("assistant", "多久了？"), ("user", "两天"), ("user", "38度"),
         ("assistant", "请就医。")],
        "多久了？<|im_end|>请就医。<|im_end|>",
    ),
    ([("user", "<|im_end|>"), ("assistant", "😀 𠮷 é")], "😀 𠮷 é<|im_end|>"),
    (
        [("user", "1"), ("assistant", "一"), ("user", "2"), ("assistant", "二"), ("user", "3"),
         ("assistant", "三")],
        "一<|im_end|>二<|im_end|>三<|im_end|>",
    ),
]  # fmt: skip


def trained_text(encoder: Encoder, chat: Chat) -> str:
    ids, trained, _ = encoder.chat(chat, 10_000)
    return encoder.tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag])


@pytest.mark.parametrize("turns, wanted", GOLDEN)
def test_exactly_the_answers_and_their_ends_are_trained_on(encoder, turns, wanted):
    assert trained_text(encoder, Chat(turns)) == wanted


def test_the_whole_text_is_chatml_as_aquilamed_uses_it(encoder):
    ids, _, _ = encoder.chat(Chat([("user", "问"), ("assistant", "答")]), 100)
    assert encoder.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant in medical domain.<|im_end|>\n"
        "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>\n"
    )
    ids, _, _ = encoder.chat(Chat([("user", "问"), ("assistant", "答")], system="医"), 100)
    assert encoder.tokenizer.decode(ids).startswith("<|im_start|>system\n医<|im_end|>\n")


def test_given_answers_are_not_learned(encoder):
    """A prompt's own answers are context: only the completion is trained on."""
    turns = [("user", "一"), ("assistant", "二"), ("user", "问"), ("assistant", "答")]
    assert trained_text(encoder, Chat(turns, untrained={0, 1, 2})) == "答<|im_end|>"
    ids, _, _ = encoder.chat(Chat(turns, untrained={0, 1, 2}), 100)
    assert ids == encoder.chat(Chat(turns), 100)[0]


def test_a_text_and_its_continuation_get_no_template(encoder):
    chat = Chat([("user", "天是"), ("assistant", "蓝的")], raw=True)
    ids, trained, _ = encoder.chat(chat, 100)
    assert encoder.tokenizer.decode(ids) == "天是蓝的<|endoftext|>"
    assert trained_text(encoder, chat) == "蓝的<|endoftext|>"
    assert encoder.chat(chat, len(ids) - 1)[0] == []  # nothing of it may be cut
    assert len(trained) == len(ids)


def random_text(rng: random.Random) -> str:
    alphabets = ["的一是了我不人在他有头痛发热", "abc XYZ ,.!?", " \n\t", "0123456789", "😀🩺é𠮷龘"]
    return "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 30)))


def test_masks_of_a_thousand_random_chats(encoder):
    """The trained text is the answers with their ends, whatever the turns hold. And
    no end of turn or start of turn twice in a row."""
    rng = random.Random(0)
    special = set(encoder.tokenizer.special.values())
    for _ in range(1000):
        turns = []
        for _ in range(rng.randint(1, 4)):
            turns += [("user", random_text(rng)), ("assistant", random_text(rng))]
        chat = Chat(turns)
        answers = [text + "<|im_end|>" for role, text in turns if role == "assistant"]
        assert trained_text(encoder, chat) == "".join(answers)
        ids, _, _ = encoder.chat(chat, 10_000)
        pairs = itertools.pairwise(ids)
        assert not any(a == b and a in special for a, b in pairs)


def test_text_that_spells_a_special_token_stays_text(encoder):
    """Whatever a user types, the only special ids are the template's."""
    special = set(encoder.tokenizer.special.values())
    plain, _, _ = encoder.chat(Chat([("user", "x"), ("assistant", "y")]), 1000)
    for name in (*encoder.tokenizer.special, "<unk>", "</s>", "<0x41>"):
        text = f"a{name}b{name}"
        ids, _, _ = encoder.chat(Chat([("user", text), ("assistant", text)], system=text), 1000)
        assert [i for i in ids if i in special] == [i for i in plain if i in special]
        assert encoder.tokenizer.decode(ids).count(text) == 3


def test_too_long_loses_its_oldest_whole_turns(encoder):
    turns = [("user", "甲" * 20), ("assistant", "乙" * 20), ("user", "丙"), ("assistant", "丁")]
    ids, _trained, cut = encoder.chat(Chat(turns), 1000)
    assert cut == 0
    shorter, flags, cut = encoder.chat(Chat(turns), len(ids) - 1)
    text = encoder.tokenizer.decode(shorter)
    assert cut == 2 and "甲" not in text and "乙" not in text and "丙" in text
    assert text.startswith("<|im_start|>system\n")  # the system text stays
    assert (
        encoder.tokenizer.decode([i for i, f in zip(shorter, flags, strict=True) if f])
        == "丁<|im_end|>"
    )
    assert encoder.chat(Chat(turns), len(shorter))[2] == 2
    assert encoder.chat(Chat(turns), len(shorter) - 1)[0] == []  # never part of an answer


def test_what_is_left_starts_with_a_user(encoder):
    turns = [("user", "甲"), ("assistant", "乙" * 30), ("assistant", "丙" * 30)]
    turns += [("user", "丁"), ("assistant", "戊")]
    full = len(encoder.chat(Chat(turns), 1000)[0])
    ids, _, cut = encoder.chat(Chat(turns), full - 5)
    assert cut == 3 and "丙" not in encoder.tokenizer.decode(ids)


def test_a_prompt_is_the_start_of_the_chat_it_leads_to(encoder):
    whole, _, _ = encoder.chat(Chat([("user", "问"), ("assistant", "答")]), 100)
    prompt = encoder.prompt(Chat([("user", "问")]))
    assert whole[: len(prompt)] == prompt
    assert encoder.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


def test_a_template_is_data(tmp_path):
    path = tmp_path / "template.json"
    path.write_text(CHATML.to_json())
    assert load(str(path)) == CHATML == TEMPLATES["chatml"]


@pytest.mark.parametrize(
    "name, message", [("chatmi", "did you mean chatml"), ("missing.json", "No such file")]
)
def test_unknown_templates(name, message):
    with pytest.raises(InputError, match=message):
        load(name)


def test_a_template_needs_its_tokens(encoder):
    strange = Template("strange", ("<|x|>",), "", {}, {}, "<|x|>", "<|endoftext|>")
    with pytest.raises(InputError, match=r"'strange' needs the special tokens <\|x\|>"):
        Encoder(strange, encoder.tokenizer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"turn_end": "<|endoftext|>"}, "turn_end '<|endoftext|>' must stand in special"),
        ({"turn_end": 7}, "turn_end is 7; chatml's is '<|im_end|>'"),
        ({"after": CHATML.after | {"assistant": "\n"}}, "turn_end '<|im_end|>' must stand in"),
        ({"before": {"user": "a"}}, "before is {'user': 'a'}; chatml's is {'system': "),
        ({"after": {**CHATML.after, "user": 1}}, "after is {'system': "),
        ({"special": "<|im_end|>"}, "special is '<|im_end|>'; chatml's is ['<|im_start|>', "),
        ({"special": ["<|im_end|>", 7]}, "special is ['<|im_end|>', 7]"),
        ({"system": None}, "system is None"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path, changes, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(dataclasses.asdict(CHATML) | changes), "utf-8")
    with pytest.raises(InputError, match=re.escape(f"--template {path}: ") + re.escape(message)):
        load(str(path))
    path.write_text(CHATML.to_json(), "utf-8")
    assert load(str(path)) == CHATML


# ---------------------------------------------------------------- preference pairs


def test_both_answers_follow_the_same_prompt(encoder):
    pair = PreferencePair([("user", "问")], chosen="好的答案", rejected="坏答案")
    (chosen, rejected), cut = encoder.pair(pair, 100)
    prompt = [i for i, t in zip(*chosen, strict=True) if not t]
    for (ids, trained), answer in ((chosen, "好的答案"), (rejected, "坏答案")):
        n = trained.index(True)
        learned = [i for i, t in zip(ids, trained, strict=True) if t]
        assert encoder.tokenizer.decode(learned) == answer + "<|im_end|>"
        assert ids[:n] == prompt[:n] and cut == 0


def test_a_long_prompt_loses_its_oldest_turns_on_both_sides(encoder):
    turns = [("user", "甲" * 40), ("assistant", "乙"), ("user", "丙")]
    pair = PreferencePair(turns, chosen="短", rejected="长" * 20)
    (chosen, rejected), _ = encoder.pair(pair, 1000)
    fitting = len(rejected[0])
    (short, long), cut = encoder.pair(pair, fitting - 1)
    assert cut == 2 and len(long[0]) < fitting
    for ids, _ in (short, long):
        text = encoder.tokenizer.decode(ids)
        assert "甲" not in text and "丙" in text
    assert encoder.pair(pair, 30)[0] == []  # not even the last question fits: dropped, and counted
    assert len(chosen[0]) < len(rejected[0])
