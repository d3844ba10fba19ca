"""Writes folders in the layout of Hugging Face.

    python -m nanomed.hf export RUN_OR_CHECKPOINT NEW_FOLDER      a run's best checkpoint, or one
    python -m nanomed.hf convert FOLDER NEW_FOLDER                .bin shards into safetensors

A .bin file is a pickle: tensors are read from it and nothing else.
"""

import argparse
from pathlib import Path

import torch

from nanomed.arguments import command_line
from nanomed.distributed import launch
from nanomed.hf import pretrained
from nanomed.hf.convert import convert
from nanomed.hf.writing import export

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = command_line("python -m nanomed.hf", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="a run or checkpoint to a Hugging Face folder")
    command.add_argument("source", help="run folder (its best checkpoint) or checkpoint folder")
    command.add_argument("folder", help="a new folder")
    command.add_argument("--dtype", choices=DTYPES, help="default: bf16, or as in a source folder")
    command = commands.add_parser("convert", help=".bin shards to safetensors")
    command.add_argument("source", help="folder with pytorch_model.bin or its shards")
    command.add_argument("folder", help="a new folder")
    c = parser.parse_args()
    if c.command == "convert":
        convert(Path(c.source), Path(c.folder))
    else:
        _export_command(c)
    print(f"{c.command}: {c.source} -> {c.folder}")


def _export_command(c: argparse.Namespace) -> None:
    dtype = DTYPES[c.dtype] if c.dtype else pretrained.dtype_of(c.source)
    _, encoder = pretrained.describe(c.source)
    model = pretrained.load(c.source, torch.device("cpu"), dtype)
    about = pretrained.settings_of(c.source)
    export(model, encoder.tokenizer, c.folder, dtype, encoder.template, about=about)


if __name__ == "__main__":
    launch(main)
