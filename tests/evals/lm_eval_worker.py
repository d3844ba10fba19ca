"""lm-eval 0.4.13 on local files, asked line by line; run by a Python that has it.

    PYTHON tests/evals/lm_eval_worker.py MODEL DATA

DATA has PATH/NAME/SPLIT.jsonl for each data set that a task asks for; nothing else is changed. Each
line of standard input, {"samples": {TASK: [item, ...]}, "shots": 3, "batch": 1}, is answered by a
line: the seconds that the requests took by the clock and of the processor, and by task each item's
log-probabilities and verdict, and the accuracy with its standard error.
"""

import json
import sys
import time
from pathlib import Path

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM


def load_local(path: str, name: str | None = None, **_):
    folder = Path(sys.argv[2]) / path / (name or "")
    return datasets.DatasetDict(
        {file.stem: datasets.Dataset.from_json(str(file)) for file in folder.glob("*.jsonl")}
    )


def answer(lm: HFLM, asked: dict) -> dict:
    lm.batch_size_per_gpu, scored, took = asked["batch"], lm.loglikelihood, {}

    def timed(requests, **named):
        clock, cpu = time.perf_counter(), time.process_time()
        answers = scored(requests, **named)
        took["seconds"], took["cpu"] = time.perf_counter() - clock, time.process_time() - cpu
        return answers

    lm.loglikelihood = timed
    samples = asked["samples"]
    found = lm_eval.simple_evaluate(
        model=lm, tasks=list(samples), num_fewshot=asked["shots"], samples=samples
    )
    lm.loglikelihood = scored
    items = {
        task: [
            {"logprobs": [pair[0] for pair in sample["filtered_resps"]], "acc": sample["acc"]}
            for sample in sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        ]
        for task in samples
    }
    names = ("acc,none", "acc_stderr,none")
    results = {task: [found["results"][task][name] for name in names] for task in samples}
    return took | {"items": items, "results": results}


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # lm-eval prints, too
    datasets.load_dataset = load_local
    lm = HFLM(pretrained=sys.argv[1], device="cpu", dtype="float32", batch_size=1)
    for line in sys.stdin:
        print(json.dumps(answer(lm, json.loads(line)), default=str), file=replies, flush=True)


if __name__ == "__main__":
    main()
