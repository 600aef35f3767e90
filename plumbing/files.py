"""Files that are whole or absent: atomic writes, checkpoints, metrics."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from plumbing.distributed import rank
from plumbing.options import InputError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict) -> None:
    """Training state as a torch file of tensors and plain values; rank 0 writes."""
    if rank() == 0:
        write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path) -> dict:
    """The state written by save_checkpoint, on the CPU.  Raises InputError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no checkpoint to resume from; leave out --resume to start anew") from None
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly every type there is
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}); start anew with --overwrite") from None


class Metrics:
    """metrics.jsonl, a line of JSON an iteration.  A resumed run first drops the lines past its checkpoint; rank 0 writes."""

    def __init__(self, path: Path, iteration: int):
        self.path = Path(path)
        if rank() == 0:
            kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["iteration"] < iteration]
            write_atomic(self.path, lambda temporary: temporary.write_text("".join(kept)))

    def write(self, **line) -> None:
        if rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
