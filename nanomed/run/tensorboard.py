"""metrics.jsonl's numbers for TensorBoard, too, under the names that TRL gives them there."""

from importlib.util import find_spec
from pathlib import Path

from nanomed.config import InputError

# TRL's names where ours differ. Loss, grad_norm, rewards/chosen, logps/chosen, ... are the same.
NAMES = {"lr": "learning_rate", "accuracy": "mean_token_accuracy"}


def check() -> None:
    """Raises InputError if it is not installed."""
    if find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs TensorBoard: pip install tensorboard")


class Board:
    """Writes into RUN/tensorboard; what an earlier attempt wrote after `step` is hidden."""

    def __init__(self, run: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def add(self, values: dict[str, float]) -> None:
        """A line of metrics.jsonl. It is on the disk when this returns. Raises OSError."""
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(named(name), value, values["step"])
        self.writer.flush()


def named(name: str) -> str:
    """val_loss is eval/loss, lr is train/learning_rate."""
    group = "eval" if name.startswith("val_") else "train"
    own = name.removeprefix("val_")
    return f"{group}/{NAMES.get(own, own)}"
