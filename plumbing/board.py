"""TensorBoard beside metrics.jsonl, for those who watch many runs: the same names, and the pictures."""

from pathlib import Path
from typing import Any

from torch import Tensor

from plumbing.options import InputError
from plumbing.pictures import to_uint8


def need_tensorboard() -> None:
    """InputError unless the package is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError("--tensorboard: needs another package; pip install tensorboard") from None


class Board:
    """A folder for `tensorboard --logdir`; what it holds after `start` or more iterations is taken back."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(folder, purge_step=start)

    def line(self, done: int, **values: Any) -> None:
        """A line of metrics.jsonl, after so many iterations; what has a value for each quarter of the
        timesteps becomes name/1 to name/4."""
        for name, value in values.items():
            quarters = value if isinstance(value, list) else [value]
            for i, number in enumerate(quarters, start=1):
                if number is not None:
                    tag = f"{name}/{i}" if isinstance(value, list) else name
                    self.writer.add_scalar(tag, number, done)
        self.writer.flush()

    def pictures(self, name: str, images: Tensor, done: int) -> None:
        """Pictures (N, 3, H, W) in [-1, 1], after so many iterations."""
        self.writer.add_images(name, to_uint8(images), done, dataformats="NHWC")
        self.writer.flush()
