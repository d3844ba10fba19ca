"""CMB-Exam: questions answered in words, the letters that an answer names, and the score by class.

The benchmark's own script takes every capital letter from A to G for an option, so "Answer: D" is A
and "CT" is C. Its reading is here to the byte, for comparison, and a strict one beside it.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanomed.config import InputError
from nanomed.evals.answers import Dialogue
from nanomed.evals.stats import mean, stderr
from nanomed.records import read_json

SEVERAL = "多项选择题"  # the type of a question that may have several right letters
ASKED = (
    "以下是中国{exam_type}中{exam_class}考试的一道{question_type}，不需要做任何分析和解释，"
    "直接输出答案选项。\n{question}\n{options}"
)
FIELDS = ("exam_type", "exam_class", "question_type", "answer")


def questions(path: Path, key_path: Path) -> tuple[list[Dialogue], dict[str, dict]]:
    """The questions as dialogues of one turn, and the key by id. Raises InputError unless each
    question has exactly one entry in the key, of the same class and type, and each entry one
    question."""
    key = {}
    for number, entry, _ in read_json(str(key_path)):
        where = f"{key_path}, record {number}"
        for name in ("id", *FIELDS):
            if not isinstance(entry, dict) or entry.get(name) in (None, ""):
                raise InputError(f"{where}: field {name!r} is missing; is this the answer key?")
        if not re.fullmatch("[A-G]+", entry["answer"]):
            raise InputError(
                f"{where}: field 'answer': {entry['answer']!r} is no key; expected letters"
            )
        if str(entry["id"]) in key:
            raise InputError(f"{where}: field 'id': {entry['id']} stands there twice")
        key[str(entry["id"])] = entry
    dialogues = []
    for number, record, _ in read_json(str(path)):
        name = str(record.get("id", number) if isinstance(record, dict) else record)
        if name not in key:
            raise InputError(f"{path}, record {number}: {key_path} has no answer to id {name}")
        for field in FIELDS[:3]:
            if record.get(field) != key[name][field]:
                raise InputError(
                    f"{path}, record {number}: field {field!r} is {record.get(field)!r}, but "
                    f"{key[name][field]!r} in {key_path}: they do not belong together"
                )
        if not isinstance(record.get("option"), dict) or not isinstance(
            record.get("question"), str
        ):
            raise InputError(
                f"{path}, record {number}: fields 'question', a text, and 'option', letters with "
                f"their texts, are wanted; its fields are {', '.join(record)[:200]}"
            )
        shown = [f"{k}. {v}" for k, v in record["option"].items() if v and str(v).strip()]
        asked = ASKED.format(**record | {"options": "\n".join(shown)})
        dialogues.append(Dialogue(name, [(asked, key[name]["answer"])]))
    if sorted(d.id for d in dialogues) != sorted(key):
        twice = [name for name, n in Counter(d.id for d in dialogues).items() if n > 1][:5]
        raise InputError(
            f"{path} asks {len(dialogues)} questions, {key_path} answers {len(key)}; ids that are "
            f"asked twice: {', '.join(twice) or 'none'}"
        )
    return dialogues, key


def official(text: str, several: bool) -> tuple[str, str]:
    """(letters, rule) as CMB's match_choice() and extract_ans() read one answer."""
    stated = re.search(r"(?:答案|正确选项)(?:是|：|为|应该是|应该为)(.*?)(?:。|\.|$)", text, re.S)
    letters = "".join(re.findall("[A-G]", stated[1] if stated else text))
    rule = "statement" if stated else "any letter"
    return (letters if several else letters[:1]), rule if letters else "none"


# Letters side by side or with a separator between them; no Latin letter stands right before or
# after, so the C of CT is none.
_LETTERS = r"(?<![A-Za-z])([A-G](?:[\s、,，和与及/]*[A-G])*)(?![A-Za-z])"
_STATED = re.compile(
    r"(?:答案|正确选项|(?<!不)选择?|[Aa]nswer)(?:是|为|应该?是|应该?为|应选|项|is|[\s:：])*[(（]?"
    + _LETTERS
)
_ALONE = re.compile(r"\s*[(（]?" + _LETTERS + r"\s*(?:[.．。、,，:：;；)）]|$)")


def strict(text: str, several: bool) -> tuple[str, str]:
    """(letters, rule): the last explicit statement, else letters that the answer begins with; of
    letters outside words only, in alphabetical order. A single-answer question with several
    letters is not read."""
    stated = _STATED.findall(text)
    found = stated[-1:] or [m[1] for m in [_ALONE.match(text)] if m]
    letters = "".join(sorted(set(re.findall("[A-G]", found[0])))) if found else ""
    if not letters or (len(letters) > 1 and not several):
        return "", "none"
    return letters, "statement" if stated else "begins with it"


READINGS = {"official": official, "strict": strict}


def results(answers: Sequence[dict], key: dict[str, dict]) -> dict[str, Any]:
    """By reading: micro accuracy, the mean of classes and, as CMB's score.py prints it, by exam
    type the mean of its classes. The official reading compares strings, as score.py does (four keys
    are not in alphabetical order); the strict one compares sets."""
    found: dict[str, Any] = {"n": len(answers)}
    for name, read in READINGS.items():
        classes: dict[tuple[str, str], list[bool]] = {}
        rules, several = Counter(), []
        for answer in answers:
            entry = key[answer["id"]]
            has_several = entry["question_type"] == SEVERAL
            letters, rule = read(answer["answer"], has_several)
            wanted = entry["answer"] if name == "official" else "".join(sorted(entry["answer"]))
            classes.setdefault((entry["exam_type"], entry["exam_class"]), []).append(
                letters == wanted
            )
            rules[rule] += 1
            if has_several:
                several.append(letters == wanted)
        shares = {names: mean(right) for names, right in classes.items()}
        types: dict[str, list[float]] = {}
        for (exam_type, _), share in shares.items():
            types.setdefault(exam_type, []).append(share)
        every = [right for part in classes.values() for right in part]
        found[name] = {
            "acc": mean(every),
            "stderr": stderr(every),
            "class_macro": mean([*shares.values()]),
            "types": {exam_type: mean(part) for exam_type, part in types.items()},
            "classes": {"/".join(names): share for names, share in shares.items()},
            "several_answers": {"n": len(several), "acc": mean(several) if several else None},
            "rules": dict(rules),
        }
    return found
