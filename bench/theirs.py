"""What a user would pick instead: a plain transformers loop and TRL's trainers.

They do one optimizer step at each call. transformers, TRL and datasets are imported here alone."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import utils

from bench.ours import LR, casts
from nanomed.config import DPO, ModelConfig, Run
from nanomed.hf.reading import hf_name
from nanomed.hf.tokenizer import write_tokenizer
from nanomed.model.decoder import Aquila
from nanomed.text.segment import IGNORE, Segment
from nanomed.text.template import Encoder
from nanomed.training.optim import BETAS, EPS, adamw
from tests.data import Examples

# Else transformers takes our folder kernels/ for the published package of that name.
utils.is_kernels_available = utils.import_utils.is_kernels_available = lambda *a, **k: False
utils.logging.set_verbosity_error()
datasets.disable_progress_bars()  # they would be drawn into our tables

import trl  # noqa: E402


def qwen2(config: ModelConfig, ours: Aquila, device: torch.device):
    """transformers' model of the same shape with the same weights, float32, SDPA."""
    shape = transformers.Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )  # fmt: skip
    with device:
        theirs = transformers.Qwen2ForCausalLM(shape)
    theirs.load_state_dict({hf_name(n): p.detach() for n, p in ours.named_parameters()})
    return theirs.train()


def tokenizer_of(encoder: Encoder, folder: Path):
    """Ours, as transformers reads it from a folder."""
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, encoder.tokenizer, encoder.template, 1 << 20, is_qwen2=False)
    return transformers.AutoTokenizer.from_pretrained(folder)


def padded(segments: list[Segment]) -> dict[str, Tensor]:
    """As every collator does: on the right, to the longest."""
    pad = partial(pad_sequence, batch_first=True)
    ids = [torch.as_tensor(s.ids) for s in segments]
    labels = [torch.from_numpy(np.where(s.trained, s.ids, IGNORE)) for s in segments]
    return {
        "input_ids": pad(ids),
        "attention_mask": pad([torch.ones_like(one) for one in ids]),
        "labels": pad(labels, padding_value=IGNORE),
    }


class Plain:
    """The loop that one writes around transformers: a padded batch, loss, backward, clip, AdamW.
    `block` tokens: documents one after another in rows without padding, as run_clm.py does, which
    lets a document see the one before it."""

    def __init__(self, model, data: Examples, c: Run, dtype, order: Callable, block: int = 0):
        """order(k) has the examples of step k."""
        self.model, self.data, self.c, self.dtype = model, data, c, dtype
        self.order, self.block, self.k, self.tokens = order, block, 0, []
        self.optimizer = adamw(model, c.weight_decay)

    @property
    def setting(self) -> str:
        rows = "padded to the longest of the batch"
        if self.block:
            rows = f"full rows of {self.block:,} tokens, documents see the one before them"
        return f"transformers {transformers.__version__}: {rows}, {casts(self.dtype)}"

    def batch(self, k: int) -> dict[str, Tensor]:
        """Of step k."""
        segments = [s for i in self.order(k) for s in self.data[i]]
        if not self.block:
            return padded(segments)
        ids = torch.cat([torch.as_tensor(s.ids) for s in segments])
        ids = ids[: len(ids) // self.block * self.block].view(-1, self.block)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def __call__(self) -> None:
        batch = self.batch(self.k)
        self.k += 1
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.c.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens.append(int(batch["attention_mask"].sum()))


class Stepped(transformers.TrainerCallback):
    """A Trainer that runs its own train() in a thread, from the end of one optimizer step to the
    end of the next at each call: its loop, its data loader and its logging are all in the time.
    `gate` is called with the first inputs, their loss and what it was divided by."""

    def __init__(
        self, trainer: transformers.Trainer, dtype: torch.dtype, setting: str,
        gate: Callable | None = None,
    ):  # fmt: skip
        self.trainer, self.dtype, self.setting, self.gate = trainer, dtype, setting, gate
        self.tokens, self.error, self.over = [], None, False
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._train, daemon=True)
        training_step = trainer.training_step

        def counted(model, inputs, *rest):
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
            self.tokens[-1] += ids.numel() if mask is None else mask.sum()  # no wait for a GPU
            loss = training_step(model, inputs, *rest)
            if self.gate:
                self.gate(inputs, loss, *rest)
                self.gate = None
            return loss

        trainer.training_step = counted
        trainer.add_callback(self)
        trainer.remove_callback(transformers.PrinterCallback)

    def on_step_end(self, args, state, control, **_) -> None:
        self.done.release()
        self.go.acquire()
        control.should_training_stop = self.over

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
        self.done.release()

    def __call__(self) -> None:
        self.tokens.append(0)
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go.release()
        self.done.acquire()
        if self.error:
            raise self.error

    def close(self) -> None:
        self.over = True
        self.go.release()
        self.thread.join()


def trl_trainer(
    model, data: Examples, c: Run, tokenizer, folder: Path, device: str,
    optimizers: tuple = (None, None), **given,
):  # fmt: skip
    """TRL's trainer over the same token ids and labels, with its defaults but for the recipe, which
    all sides share, and for what writes and prints. Of DPO its tokenisation alone is left out."""
    recipe = dict(
        per_device_train_batch_size=c.batch_size, max_length=c.micro_tokens, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=c.weight_decay, max_grad_norm=c.grad_clip,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, max_steps=100_000,
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", use_cpu=device == "cpu",
    )  # fmt: skip
    if isinstance(c, DPO):
        build, arguments = Tokenised, trl.DPOConfig(**recipe | {"beta": c.beta} | given)
        rows = [_pair(*example) for example in data]
        model.save_pretrained(folder / "start")  # its reference is read from there
        model = type(model).from_pretrained(folder / "start", dtype=torch.float32)
    else:
        build, arguments = trl.SFTTrainer, trl.SFTConfig(**recipe | given)
        labels = (np.where(s.trained, s.ids, IGNORE).tolist() for [s] in data)
        ids = (s.ids.tolist() for [s] in data)
        rows = [{"input_ids": i, "labels": k} for i, k in zip(ids, labels, strict=True)]
    data = datasets.Dataset.from_list(rows)
    how = dict(train_dataset=data, processing_class=tokenizer, optimizers=optimizers)
    return build(model, args=arguments, **how)


class Tokenised(trl.DPOTrainer):
    def _prepare_dataset(self, dataset, *_, **__):
        return dataset


def _pair(chosen: Segment, rejected: Segment) -> dict[str, list[int]]:
    n = int(chosen.trained.argmax())  # the prompt's tokens
    return {
        "prompt_ids": chosen.ids[:n].tolist(),
        "chosen_ids": chosen.ids[n:].tolist(),
        "rejected_ids": rejected.ids[n:].tolist(),
    }
