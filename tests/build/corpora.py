"""Small corpora for the tests of a build, and what a build has left behind."""

import gzip
import hashlib
import json
import random
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]

WORDS = {
    "zh": "患者应当注意休息饮食清淡多喝温水按时服药复查血压血糖如果出现头痛发热"
    "胸闷及时就医医生建议检查",
    "en": "patients should rest drink warm water take medicine on time check blood pressure "
    "glucose headache fever chest pain see a doctor early treatment follow advice sleep well",
}


def sentence(rng: random.Random, lang: str) -> str:
    if lang == "zh":
        return "".join(rng.choices(WORDS["zh"], k=rng.randint(8, 20))) + "。"
    words = rng.choices(WORDS["en"].split(), k=rng.randint(8, 16))
    return " ".join(words).capitalize() + "."


def text(rng: random.Random, lang: str, n: int = 0) -> str:
    return ("" if lang == "zh" else " ").join(
        sentence(rng, lang) for _ in range(n or rng.randint(4, 12))
    )


def corpus(folder: Path, n_files: int = 3, n: int = 70, seed: int = 0) -> list[str]:
    """Files of random documents, with copies, near copies, short, private and leaked ones."""
    rng = random.Random(seed)
    folder.mkdir(exist_ok=True)
    made: list[str] = []
    paths = []
    for f in range(n_files):
        records = []
        for _ in range(n):
            lang = rng.choice(("zh", "en"))
            new, kind = text(rng, lang), rng.random()
            if made and kind < 0.1:
                new = rng.choice(made)
            elif made and kind < 0.2:
                new = rng.choice(made)[:-3] + "!?"
            elif kind < 0.25:
                new = new[:9]
            elif kind < 0.3:
                new += " 13800138000 "
            elif kind < 0.35:
                new += LEAK
            made.append(new)
            records.append({"text": new, "source": f"source{f % 2}", "number": len(made)})
        path = folder / f"raw-{f}.jsonl.gz"
        write(path, records)
        paths.append(str(path))
    return paths


LEAK = " Which of the following drugs is used first in a patient with acute gout and renal failure?"


def write(path: Path, records: list) -> str:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = lines.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return str(path)


def exam(folder: Path) -> str:
    return write(folder / "exam.jsonl", [{"question": LEAK, "options": {"A": "x", "B": "y"}}])


def arguments(files: list[str], out: Path, *more: str) -> list[str]:
    """Of a build of many small shards."""
    fixed = ["--data", *files, "--out", str(out), "--shard_chars", "12000", "--show_text"]
    benchmark = str(Path(files[0]).parent / "exam.jsonl")
    return [*fixed, "--decontaminate", benchmark, *more]


def command(files: list[str], out: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "build_corpus.py"), *arguments(files, out, *more)]


def build(files: list[str], out: Path, *more: str) -> Path:
    """The same in this process."""
    import build_corpus

    given = arguments(files, out, "--workers", "1", *more)
    with mock.patch("sys.argv", ["build_corpus.py", *given]):
        build_corpus.main()
    return out


def read(path: Path) -> list[dict]:
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path)
    with opened as file:
        return [json.loads(line) for line in file]


def kept(out: Path, stage: str = "final") -> list[dict]:
    return [r for path in sorted((out / stage).glob("*.jsonl.gz")) for r in read(path)]


def dropped(out: Path, where: str = "*/*.dropped.jsonl") -> list[dict]:
    return [r for path in sorted(out.glob(where)) for r in read(path)]


def digests(out: Path) -> dict[str, str]:
    """Of every file that a build leaves."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
