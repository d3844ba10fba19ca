"""The model card that goes with an export: where it comes from, how it was trained, what it is
not for, and the licence of the model it started from, if that folder says it."""

from pathlib import Path
from typing import Any

import torch

from nanomed.config import ModelConfig

# Settings of a run that a reader of the card wants, in this order.
SHOWN = (
    "stage", "init", "model", "epochs", "steps", "batch_size", "seq_len", "lr", "warmup_ratio",
    "min_lr_ratio", "weight_decay", "grad_clip", "dropout", "beta", "seed",
)  # fmt: skip

HEAD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: [zh, en]
tags: [medical, nanomed]
"""
LIMITS = """\
## Limits

- Not a medical device and no substitute for a doctor: it states wrong things fluently. Do not use
  it to diagnose, to prescribe, to triage, or to decide about anybody's treatment.
- 本模型的回答可能有误，不能代替医生的诊断和治疗建议；如有不适，请及时就医。
- It was not evaluated for safety here. It may repeat what stands in its training data, private
  details included.
- Stop at both ids of `eos_token_id` in `generation_config.json`: the end of a turn and of a
  document.

## Licence

"""
STARTED = """\
The weights that it started from stand under the licence that the head of this page names, as their
own card does: read it before use, keep its text with copies, and name the source. Training data
have licences of their own.
"""
UNKNOWN = """\
Not known: FILL IN `license:` at the head of this page before you publish. Weights stand under the
licence of the model that they started from, if there is one; training data have licences of their
own.
"""


def model_card(
    config: ModelConfig, dtype: torch.dtype, architecture: str, about: dict[str, Any]
) -> str:
    """README.md of an export. Of paths only the last part is told."""
    files = [Path(path).name for name in ("data", "val_data") for path in about.get(name, ())]
    licence = licence_of(about.get("init", ""))
    about = about | {"init": Path(about.get("init", "")).name}
    settings = [f"- {name}: {about[name]}" for name in SHOWN if about.get(name)]
    return "\n".join(
        [
            HEAD + "".join(licence) + "---\n",
            "# A medical language model trained with nanomed\n",
            f"{config.n_params():,} parameters in {str(dtype).removeprefix('torch.')}, loaded as "
            f"{architecture}: {config.n_layers} layers, width {config.d_model}, "
            f"{config.n_heads} query and {config.n_kv_heads} key/value heads, vocabulary "
            f"{config.vocab_size:,}, at most {config.max_seq_len:,} tokens. Embedding and head "
            "are two tensors, also where the model it started from had tied them.\n",
            "## Data\n",
            *(f"- {name}" for name in files or ["not recorded"]),
            "\n## Recipe\n",
            *(settings or ["- not recorded"]),
            "",
            LIMITS + (STARTED if licence else UNKNOWN),
        ]
    )


def licence_of(folder: str) -> list[str]:
    """The lines of a model card's head that name its licence: of a Hugging Face folder, or of a
    run's export. None where there is no such card, or where it does not say."""
    for path in (Path(folder, "README.md"), Path(folder, "export/README.md")):
        if folder and path.is_file():
            parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
            head = parts[1].splitlines(keepends=True) if len(parts) == 3 and not parts[0] else []
            return [line for line in head if line.startswith("license")]
    return []
