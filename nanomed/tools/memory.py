"""What a stage takes on each GPU, by part, what passes over the link, and the settings to take.

    python -m nanomed.tools.memory --hardware 8xA100-40G --config configs/sft.toml --model aquilamed-7b
    python -m nanomed.tools.memory --stage dpo --hardware 1x80,989,450 --init FOLDER --recompute full:12

All other flags are the stage's own (`python train_sft.py --help`). nanomed/stages/memory.py and link.py
are the formulas.
"""  # noqa: E501

import dataclasses

from nanomed import arguments
from nanomed.config import MODELS, InputError, Run
from nanomed.distributed import launch
from nanomed.hf import pretrained
from nanomed.model.recompute import POLICIES
from nanomed.stages import link
from nanomed.stages.hardware import parse_hardware
from nanomed.stages.link import Step
from nanomed.stages.memory import lines


def main(argv: list[str] | None = None) -> None:
    stages = {cls.stage: cls for cls in Run.__subclasses__()}
    parser = arguments.command_line("python -m nanomed.tools.memory", __doc__)
    parser.add_argument("--stage", choices=stages, default="sft", help="default sft")
    parser.add_argument("--gpus", type=int, help="another number than --hardware's")
    parser.add_argument("--gpu_memory", type=float, help="another number of GiB than --hardware's")
    given, rest = parser.parse_known_args(argv)
    c = arguments.parse(stages[given.stage], rest)
    hw = parse_hardware(c.hardware)
    hw = dataclasses.replace(hw, n_gpus=given.gpus if given.gpus is not None else hw.n_gpus)
    hw = dataclasses.replace(hw, gib=given.gpu_memory or hw.gib)
    if hw.n_gpus < 1:
        raise InputError(f"--gpus is {hw.n_gpus}; it must be at least 1")
    config = pretrained.config_of(c.init) if c.init else MODELS[c.model or "tiny"]
    print(
        f"{c.stage}, {config.n_params():,} parameters on {hw.n_gpus} x GPU, --kernels {c.kernels}"
    )
    segments, length = c.batch_size * (2 if c.stage == "dpo" else 1), c.seq_len
    step = Step(segments * length, segments * length**2)
    c = link.decided(config, c, hw)
    n = hw.n_gpus // link.copies(c, hw)
    print("\n".join(lines(config, c, n, hw.gib, link.remedy(config, c, hw, step))))
    for recompute in POLICIES:
        other = dataclasses.replace(c, recompute=recompute)
        print(f"  with --recompute {recompute}: {link.gib(config, other, hw):.1f} GiB")
    print(f"for a step of {c.batch_size} examples of full length:")
    print("\n".join(link.lines(config, c, hw, step)))


if __name__ == "__main__":
    launch(main)
