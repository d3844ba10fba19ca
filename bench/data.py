"""Reading, tokenising and packing documents, beside datasets with transformers.

    python -m bench.data [--quick] [--real FILES]

Both sides read the same JSON lines, tokenise with the same tokenizer (that of samples/, exported
for transformers), end each document and leave memory-mapped files. Equal ids come first, time
after. Then the loader alone: does it keep up with eight GPUs?
"""

import json
import os
import shutil
import tempfile
from functools import partial
from itertools import count, cycle
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread for each process, on both sides

from bench.measure import ROOT, Results, against_first, interleaved, quartiles, show
from bench.setting import flags
from bench.theirs import datasets, tokenizer_of
from nanomed import store
from nanomed.batches.loader import Loader
from nanomed.batches.slices import read
from nanomed.config import CPT, MODELS
from nanomed.run.log import PEAK_FLOPS, flops_of
from nanomed.text.template import CHATML, Encoder
from nanomed.text.tokenizer import load

SEQ_LEN, MICRO_TOKENS, MFU, GPUS = 4096, 8192, 0.6, 8
OURS, THEIRS = "nanomed", "datasets + transformers"


def texts_of(files: list[Path]) -> list[str]:
    """Documents of about 2,500 bytes: shorter ones one after another."""
    found = [""]
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            found[-1] += json.loads(line)["text"] + "\n"
            if len(found[-1].encode()) > 2500:
                found.append("")
    return found[:-1]


def write(path: Path, texts: list[str], n_bytes: int) -> int:
    """The texts again and again, until there are so many bytes of them. Returns how many."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in cycle(texts):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            if written >= n_bytes:
                return written


class Work:
    """The two ways from one file to token ids, each into a folder of its own."""

    def __init__(self, folder: Path, file: Path, encoder: Encoder):
        self.folder, self.file, self.encoder = folder, file, encoder
        self.theirs = tokenizer_of(encoder, folder / "exported")

    def nanomed(self, n_processes: int) -> store.Documents:
        out = self.folder / "store"
        shutil.rmtree(out, ignore_errors=True)
        return store.build(out, [str(self.file)], self.encoder, n_processes=n_processes)

    def datasets(self, n_processes: int):
        cache, end = self.folder / "cache", self.encoder.document_end
        shutil.rmtree(cache, ignore_errors=True)

        def tokenise(batch: dict) -> dict:
            ids = self.theirs(batch["text"], add_special_tokens=False)["input_ids"]
            return {"input_ids": [[*document, end] for document in ids]}

        given = dict(data_files=str(self.file), split="train", cache_dir=str(cache))
        how = dict(batched=True, remove_columns=["text"], load_from_cache_file=False)
        return datasets.load_dataset("json", **given).map(tokenise, num_proc=n_processes, **how)

    def check(self) -> int:
        """Raises unless both give the same ids for every document. Returns how many tokens."""
        part = self.nanomed(1).split(0.0)[0]
        ours = {}
        for piece in part.read(0, part.n_tokens):
            ours[part.store.where(piece.document)[1]] = piece.ids.tolist()
        theirs = self.datasets(1)["input_ids"]
        assert [ours[k] for k in sorted(ours)] == list(theirs), "the two give different ids"
        return part.n_tokens


def tokenising(work: Work, n_bytes: int, name: str, rounds: int, results: Results) -> None:
    for n in (1, 2):
        works = {OURS: partial(work.nanomed, n), THEIRS: partial(work.datasets, n)}
        samples, faster = against_first(works, rounds, warmup=0)
        for side in works:
            rate = n_bytes / 1e6 / quartiles(samples[side])[1]
            results.add(
                "data", f"tokenising {name}: {side}", samples[side], rate=f"{rate:.1f} MB/s",
                shapes={"processes": n, "MB": round(n_bytes / 1e6, 1)},
                convention="MB/s are of the texts in UTF-8, with all processes' start; equal "
                "ids were asserted first",
                nanomed_is_faster_by=faster[side],
            )  # fmt: skip


def loading(folder: Path, encoder: Encoder, n_steps: int, results: Results) -> dict:
    """Rows of one process from the store, as one of a node's eight would build them."""
    how = dict(batch_size=64, micro_tokens=MICRO_TOKENS, epochs=1_000)
    c = CPT(data=[str(folder)], seq_len=SEQ_LEN, val_fraction=0.0, **how)
    data = read(c, encoder)
    loader = Loader(c, data, parts=(data.train, data.val))
    steps = count()

    def step() -> int:
        return sum(len(row.tokens) for row in loader.rows(loader.examples(next(steps))))

    n_tokens = step()
    samples = interleaved({OURS: step}, n_steps, warmup=1)[OURS]
    rate = n_tokens / quartiles(samples)[1]
    per_token = flops_of(MODELS["aquilamed-7b"], SEQ_LEN, SEQ_LEN**2) / SEQ_LEN
    needed = GPUS * MFU * PEAK_FLOPS["H200"] / per_token
    return results.add(
        "data", "rows of one process", samples, shapes={"tokens": n_tokens},
        convention=f"A node of {GPUS} H200 at {MFU:.0%} of {PEAK_FLOPS['H200'] / 1e12:.0f} "
        f"TFLOP/s eats {needed:,.0f} tokens/s of AquilaMed at {SEQ_LEN} tokens; each of its {GPUS} "
        "processes builds an eighth",
        rate=f"{rate / 1e3:,.0f} thousand tokens/s", of_what_a_node_eats=f"{rate / needed:.1f} x",
    )  # fmt: skip


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--real", type=Path, nargs="*", help="JSON lines with a field `text`")
    given = parser.parse_args()
    n_bytes, rounds, n_steps = (2_000_000, 3, 20) if given.quick else (10_000_000, 5, 100)
    results = Results(given.results)
    encoder = Encoder(CHATML, load(ROOT / "samples/tokenizer.model"))
    corpora = {"samples": [ROOT / f"samples/cpt_{name}.jsonl" for name in ("medical", "general")]}
    if given.real:
        corpora["real texts"] = given.real
    with tempfile.TemporaryDirectory() as name:
        for corpus, files in corpora.items():
            folder = Path(name) / corpus.replace(" ", "-")
            folder.mkdir()
            size = write(folder / "texts.jsonl", texts_of(files), n_bytes)
            work = Work(folder, folder / "texts.jsonl", encoder)
            print(f"{corpus}: {work.check():,} equal ids from {size / 1e6:.1f} MB", flush=True)
            tokenising(work, size, corpus, rounds, results)
            show(results.lines[-4:])
        line = loading(folder / "store", encoder, n_steps, results)
    show([line])
    print(line["convention"])


if __name__ == "__main__":
    main()
