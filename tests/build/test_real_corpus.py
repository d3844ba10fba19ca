"""A corpus out of real texts: which of them are kept, and how far a clean one is from benchmarks.
`pytest -m slow -s tests/build/test_real_corpus.py` prints the figures of docs/data.md."""

import json
import random
from collections import Counter

import pytest

from tests.build import corpora
from tests.build.real import MEDICAL, sources

# The other medical sources beside the checkout are benchmarks: they are protected, never kept.
POOL = ("chats zh", "fever zh", "alpaca zh", "sharegpt zh", "dpo zh", "alpaca en", "c4 en")
POOL += ("dpo en", "wiki en")
LABELLED = 60  # of each source
BENCHMARKS = ("pubmedqa_labeled.json", "cmtmedqa_multi_turn.json", "huatuo26m_single_turn.json")
BENCHMARKS += ("general/ma_*.jsonl", "general/mediq_medqa.jsonl", "benchmarks/mmlu_med/test/*.csv")
BENCHMARKS += ("benchmarks/cmmlu_med/test/*.csv", "benchmarks/apollo/test/*.jsonl")


@pytest.mark.slow
def test_medical_texts_are_kept_and_others_are_not(shared_data, tmp_path):
    """Labels are the sources': what is about medicine in the others is found all the same."""
    rng, files, labels = random.Random(0), [], []
    for name in POOL:
        texts = [text for text in sources(shared_data)[name] if len(text) > 40]
        rng.shuffle(texts)
        records = [{"text": text, "source": name} for text in texts]
        files.append(corpora.write(tmp_path / f"{name}.jsonl", records[LABELLED:]))
        domain = "medicine" if name in MEDICAL else "other"
        labels += [record | {"domain": domain} for record in records[:LABELLED]]
    corpora.exam(tmp_path)
    benchmarks = [str(path) for name in BENCHMARKS for path in sorted(shared_data.glob(name))]
    given = ["--labels", corpora.write(tmp_path / "labels.jsonl", labels), "--stop_after"]
    given += ["decontaminate", "--decontaminate", *benchmarks]
    out = corpora.build(files, tmp_path / "out", *given)

    before, after = (Counter(record["source"] for record in corpora.kept(out, stage))
                     for stage in ("2-rules", "final"))  # fmt: skip
    print()
    for name in POOL:
        print(
            f"{name:<12} {before[name]:>5} after the rules, {after[name] / before[name]:.1%} kept"
        )
        assert (after[name] > 0.98 * before[name]) == (name in MEDICAL)
        assert name in MEDICAL or after[name] < 0.08 * before[name]
    stages = {
        stage["name"]: stage for stage in json.loads((out / "report.json").read_text())["stages"]
    }
    print({name: stage["dropped"] for name, stage in stages.items()})
    assert all(stage["read"] == stage["kept"] + sum(stage["dropped"].values())
               for stage in stages.values())  # fmt: skip
