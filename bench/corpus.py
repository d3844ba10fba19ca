"""Rules and MinHash beside datatrove, Data-Juicer, datasketch and rensa, on one core.

    python -m bench.corpus --python datatrove=ENV/bin/python datasketch=ENV/bin/python ...
                           [--real FOLDER] [--quick]

Each rival has an environment of its own, named by its Python. All read the same JSON lines, with
the same tokens (a Chinese character, a run of letters or digits), runs of 5 of them, and 14 bands
of 8 rows. Seconds are of the processor, after the imports, on one thread; sides take turns. The
rules are the same three definitions for nanomed and datatrove, and must keep the same documents;
Data-Juicer has rules of its own that are near to them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
BANDS, ROWS, N, RUN = 14, 8, 5, 10
FEWEST, SPECIAL, REPEATED = 20, 0.2, 0.3  # the limits of the rules
CONVENTION = "Seconds of the processor on one thread, without imports"
BROKEN = ("锟斤拷", "烫烫烫", "屯屯屯")  # text in another encoding, which is special too
ALONE = "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u9fff"
TOKEN = re.compile(f"[{ALONE}]|[^\\W_{ALONE}]+")


# ---------------------------------------------------------------- what rivals share


def words(text: str) -> list[str]:
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str) -> list[str]:
    found = words(text)
    return [" ".join(found[i : i + N]) for i in range(max(1, len(found) - N + 1))]


def passes(text: str, common: set[str]) -> bool:
    """The three rules, as one writes them for a pipeline that asks document by document."""
    found = words(text)
    runs = [tuple(found[i : i + RUN]) for i in range(max(1, len(found) - RUN + 1))]
    special = sum(not (c.isalnum() or c in common) for c in text)
    special += sum(len(mark) * text.count(mark) for mark in BROKEN)
    again = 1 - len(set(runs)) / len(runs)
    return len(found) >= FEWEST and special <= SPECIAL * len(text) and again <= REPEATED


# ---------------------------------------------------------------- sides


def nanomed_minhash(texts: list[str]) -> int:
    from nanomed.build.duplicates import near_keys

    return sum(len(near_keys(part)) for part in parts(texts))


def nanomed_rules(texts: list[str]) -> list[bool]:
    from nanomed.build import rules
    from nanomed.build.text import tokens

    kept: list[bool] = []
    for part in parts(texts):
        found = tokens(part)
        fits = (found.lengths >= FEWEST) & (rules.special(part) <= SPECIAL)
        kept += (fits & (rules.repetition(found) <= REPEATED)).tolist()
    return kept


def parts(texts: list[str]) -> list[list[str]]:
    from nanomed.build.shards import batched

    docs = (SimpleNamespace(text=text) for text in texts)
    return [[doc.text for doc in part] for part in batched(docs)]


def datatrove_minhash(texts: list[str]) -> int:
    from datatrove.pipeline.dedup import minhash

    plain = type("Plain", (), {"word_tokenize": staticmethod(words)})
    minhash.load_word_tokenizer = lambda language: plain()
    made = minhash.MinhashDedupSignature(tempfile.mkdtemp(), minhash.MinhashConfig(N, BANDS, ROWS))
    return sum(len(made.get_signature(found)) > 0 for text in texts
               if len(found := made.get_shingles(text)))  # fmt: skip


def datatrove_rules(texts: list[str]) -> list[bool]:
    from datatrove.data import Document
    from datatrove.pipeline.filters import LambdaFilter

    common = set(os.environ["ORDINARY"])
    step = LambdaFilter(lambda document: passes(document.text, common))
    return [step.filter(Document(text, str(i))) for i, text in enumerate(texts)]


def datasketch_minhash(texts: list[str]) -> int:
    from datasketch import MinHash

    sets = ([s.encode() for s in shingles(text)] for text in texts)
    return len(MinHash.bulk(sets, num_perm=BANDS * ROWS))


def rensa_minhash(texts: list[str]) -> int:
    from rensa import RMinHash

    made = RMinHash.digest_matrix_from_token_sets(map(shingles, texts), BANDS * ROWS, 1)
    return made.len()


def juicer_rules(texts: list[str]) -> int:
    from data_juicer.ops.filter import character_repetition_filter as repetition
    from data_juicer.ops.filter import special_characters_filter as special
    from data_juicer.ops.filter import text_length_filter as length

    steps = [length.TextLengthFilter(FEWEST), special.SpecialCharactersFilter(0, SPECIAL),
             repetition.CharacterRepetitionFilter(RUN, 0, REPEATED)]  # fmt: skip
    samples = {"text": texts, "__dj__stats__": [{} for _ in texts]}
    for step in steps:
        samples = step.compute_stats_batched(samples)
    kept = [list(step.process_batched(samples)) for step in steps]
    return sum(all(flags) for flags in zip(*kept, strict=True))


SIDES = {  # the rival whose Python it takes; from the texts to what it found
    "MinHash: nanomed": ("nanomed", nanomed_minhash),
    "MinHash: nanomed again": ("nanomed", nanomed_minhash),
    "MinHash: datasketch": ("datasketch", datasketch_minhash),
    "MinHash: datatrove": ("datatrove", datatrove_minhash),
    "MinHash: rensa": ("rensa", rensa_minhash),
    "rules: nanomed": ("nanomed", nanomed_rules),
    "rules: nanomed again": ("nanomed", nanomed_rules),
    "rules: datatrove": ("datatrove", datatrove_rules),
    "rules: Data-Juicer": ("juicer", juicer_rules),
}


def one_side(name: str, path: str) -> None:
    """In the side's own Python: prints its seconds and what it found."""
    texts = [json.loads(line)["text"] for line in open(path, encoding="utf-8")]
    work = SIDES[name][1]
    work(texts[:20])  # imports and tables
    started = time.process_time()
    found = work(texts)
    print(json.dumps([time.process_time() - started, found]))


# ---------------------------------------------------------------- the comparison


def texts_of(folder: Path) -> list[str]:
    """Those of more than 100 characters that hold no tags."""
    from nanomed.text.tokenizer import texts_in

    paths = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    found = (text for path in paths for text in texts_in(str(path)))
    return [text for text in found if len(text) > 100 and not set("<&") & set(text)]


def measured(sides: dict[str, str], path: Path, rounds: int) -> tuple[dict, dict]:
    """(seconds of each side in each round, what it found)."""
    from nanomed.build.text import ORDINARY

    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "ORDINARY": "".join(ORDINARY)}
    seconds, found = {name: [] for name in sides}, {}
    for _ in range(rounds):
        for name, python in sides.items():
            command = [python, "-m", "bench.corpus", "--side", name, str(path)]
            done = subprocess.run(command, env=os.environ | one, cwd=ROOT, capture_output=True)
            if done.returncode:
                sys.exit(f"{name}:\n{done.stderr.decode()[-2000:]}")
            took, found[name] = json.loads(done.stdout.splitlines()[-1])
            seconds[name].append(took)
    return seconds, found


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        return one_side(*sys.argv[2:4])
    from bench.data import write
    from bench.measure import Results, quartiles, ratio, show
    from bench.setting import flags

    parser = flags(__doc__)
    parser.add_argument("--python", nargs="*", default=[], metavar="RIVAL=PYTHON")
    parser.add_argument("--real", type=Path, help="folder of JSON files; default: samples")
    given = parser.parse_args()
    pythons = {"nanomed": sys.executable} | dict(entry.split("=", 1) for entry in given.python)
    sides = {name: pythons[rival] for name, (rival, _) in SIDES.items() if rival in pythons}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        texts = texts_of(given.real or ROOT / "samples")
        n_bytes = write(path, texts, 1 << (16 if given.quick else 22))
        n_texts = len(path.read_bytes().splitlines())
        seconds, found = measured(sides, path, 1 if given.quick else 5)
    if "rules: datatrove" in found:
        assert found["rules: datatrove"] == found["rules: nanomed"], "they keep other documents"
    results, source = Results(given.results), "real" if given.real else "samples"
    shapes = {"source": source, "documents": n_texts, "MB": round(n_bytes / 1e6, 1)}
    again = {side: seconds.pop(f"{side} again") for side in ("MinHash: nanomed", "rules: nanomed")}
    for name, samples in seconds.items():
        middle, ours = quartiles(samples)[1], f"{name.split(':')[0]}: nanomed"
        facts = {"MB_per_s": n_bytes / 1e6 / middle, "documents_per_s": n_texts / middle}
        if name != ours:
            facts["nanomed_is_faster_by"] = str(ratio(samples, seconds[ours], again[ours]))
        results.add("corpus", name, samples, shapes=shapes, convention=CONVENTION, **facts)
    show(results.lines)


if __name__ == "__main__":
    main()
