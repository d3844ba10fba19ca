"""Hugging Face folders in and out: safetensors, config.json and tokenizer files that transformers
and vLLM load with no custom code.

    python -m nanomed.hf export RUN_OR_CHECKPOINT NEW_FOLDER      a trained model, after the fact
    python -m nanomed.hf convert FOLDER NEW_FOLDER                .bin shards into safetensors

The tensors' names are ours with `model.` before all but lm_head. The architecture depends on the
tokenizer: for model_type qwen2 transformers always builds Qwen's, for llama it takes what
tokenizer.json says. So an export is a Qwen2 where the tokenizer is Qwen's and q, k and v alone have
a bias, a Qwen3 where q and k are normalised, else a Llama.
"""

from nanomed.hf.pretrained import load
from nanomed.hf.writing import export

__all__ = ["export", "load"]
