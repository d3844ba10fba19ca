"""Small folders of every published kind, written by transformers itself, and texts to try."""

import base64
import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nanomed.batches.packing import row_from
from nanomed.model.generation import Sampling, generate
from nanomed.text import tokenizer
from nanomed.text.tokenizer_files import QWEN_PATTERN, byte_letters

# The real Aquila tokenizer, in shared/ beside or above the checkout; tests skip without it.
_PLACES = [p / "shared/data/aquila_tokenizer" for p in Path(__file__).resolve().parents]
AQUILA = next((place for place in _PLACES if place.is_dir()), _PLACES[0])

SENTENCES = [
    "高血压患者应当低盐饮食，每天测量血压，按时服药，不要自行停药。",
    "糖尿病的典型症状是多饮、多尿、多食和体重下降，应检查空腹血糖。",
    "Patients with hypertension should reduce salt and measure blood pressure every day.",
    "The typical symptoms of diabetes are thirst, polyuria and weight loss; check glucose.",
    "患者，男，58岁，胸痛3小时，ECG 提示 ST 段抬高，troponin 0.8 ng/mL。",
    "What should I do if the child's fever stays above 39.5 degrees for 3 days?\n\n",
]
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t\r\n",
    "don't I'LL we've",
    "👩‍⚕️🧬😀 emoji",
    "龘䶮𠮷𪚥㐀 rare",
    "\x00\x01\x07\x1b\x7f\u200b\ufeff control",
    "e\u0301 \u212b ﬁ ａ combining",
    "1234567890 3.14",
    "العربية हिन्दी ไทย",
]
LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA31 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SPECIAL_TEXTS = ["<|endoftext|>", "<|im_start|>system\nobey<|im_end|>", "</s>", "[CLS]", "<unk>"]


def random_texts(n: int, seed: int = 0) -> list[str]:
    """Strings of all planes but surrogates and U+2581, which SentencePiece keeps for itself."""
    rng = random.Random(seed)
    ranges = [(0, 128), (0x20, 0x250), (0x3000, 0x3100), (0x4E00, 0xA000), (0x1F300, 0x1FA00)]
    ranges += [(0, 0x2500), (0xE000, 0x110000)]

    def letter() -> str:
        return chr(rng.randrange(*rng.choice(ranges)))

    return ["".join(letter() for _ in range(rng.randrange(1, 30))) for _ in range(n)]


def write_rank_file(folder: Path, vocab_size: int = 500) -> Path:
    """A file of qwen.tiktoken's form, learned from the sentences above."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([cut, by_byte])
    trained.decoder = decoders.ByteLevel()
    alphabet = list(byte_letters().values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    back = {letter: b for b, letter in byte_letters().items()}
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = []
    for name, rank in by_id:
        token = bytes(back[letter] for letter in name)
        lines.append(base64.b64encode(token) + b" %d\n" % rank)
    path = folder / "qwen.tiktoken"
    path.write_bytes(b"".join(lines))
    return path


def write_sentencepiece(folder: Path) -> Path:
    path = folder / "tokenizer.model"
    tokenizer.train(SENTENCES * 20, path, 4400)
    return path


def write_model(folder: Path, kind: str, vocab_size: int = 900, seed: int = 0, **changes):
    """A model of random weights, biases and norms, saved by transformers; returns it."""
    import transformers

    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0},
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    make_config = getattr(transformers, f"{kind.title()}Config")
    make_model = getattr(transformers, f"{kind.title()}ForCausalLM")
    dtype = changes.pop("dtype", torch.float32)
    save = {"max_shard_size": changes.pop("max_shard_size", "5GB")}
    o_bias = changes.pop("o_bias", 0.0)  # its standard deviation
    torch.manual_seed(seed)
    model = make_model(make_config(**shape | changes)).to(dtype).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                param.normal_(std=0.5 if "o_proj" not in name else o_bias)
            else:
                param.normal_(std=0.15)
    model.save_pretrained(folder, **save)
    return model


# ---------------------------------------------------------------- looking into them


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_model(theirs, ours, vocab_size: int) -> None:
    ids = torch.randint(0, vocab_size, (33,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        got = ours(row_from([ids.tolist()]), logits=True)
    assert (expected - got).abs().max() < 1e-4
    new = theirs.generate(
        ids[None, :9], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert (
        generate(ours, [ids[:9].tolist()], set(), Sampling(max_new=20))[0][0] == new[0, 9:].tolist()
    )


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def edit_config(folder: Path, drop=(), **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def shard_with(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit_index(folder: Path, **changes) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def edit_tensor(folder: Path, name: str, change) -> None:
    path = shard_with(folder, name)
    tensors = load_file(path)
    save_file({k: change(v) if k == name else v for k, v in tensors.items()}, path)
