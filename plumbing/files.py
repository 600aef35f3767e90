"""Files that are whole or absent: atomic writes, checkpoints, metrics."""

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from plumbing.options import InputError, is_out_of_memory

ALWAYS = ("iteration", "loss", "seconds")  # in each line of a metrics.jsonl


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """What cannot be written in the block becomes an OSError that names this path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors have no OSError for a full disk
        if not any(text in str(error) for text in ("inline_container", "PytorchStreamWriter", "I/O error")):
            raise
        raise OSError(errno.ENOSPC, "cannot be written whole; is the disk full?", str(path)) from None


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place.

    A reader sees the old or the new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with blaming(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file of text, atomically.  Names in it may be no UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))


def check_replaceable(out: Path, files: Iterable[str], resume: bool, overwrite: bool) -> None:
    """InputError if `out` is a file, or has one of these files, of a run that is neither resumed nor given
    up."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--output-dir {out}: is a file; give a folder")
    if not (resume or overwrite) and any((out / name).exists() for name in files):
        raise InputError(f"{out}: holds a run already; continue it with --resume, replace it with "
                         "--overwrite, or choose --output-dir")


def remove_unfinished(folder: Path) -> None:
    """What a killed process left half written.  For a folder that one run at a time writes to."""
    for temporary in Path(folder).glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Training state as a torch file of tensors and plain values."""
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, iterations: float = math.inf) -> dict[str, Any]:
    """The state written by save_checkpoint, on the CPU.

    Raises InputError if the file is missing or damaged, or if it is of more iterations than these.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done = state["iteration"]
    except FileNotFoundError:
        raise InputError(f"{path}: no checkpoint to resume from; leave out --resume to start anew") from None
    except OSError:  # not the file's fault
        raise
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly every type there is
        if is_out_of_memory(error):
            raise
        reason = type(error).__name__
        raise InputError(f"{path}: damaged checkpoint ({reason}); start anew with --overwrite") from None
    if done > iterations:
        raise InputError(f"--iterations {iterations}: the run in {path.parent} has done {done} already")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON holds, nothing if there is none; InputError if it is damaged."""
    if not Path(path).exists():
        return {}
    try:
        return dict(json.loads(Path(path).read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it to have it made anew") from None


def trim_metrics(path: Path, iterations: int) -> None:
    """Leave the lines of so many iterations in a metrics.jsonl: a run goes on from its checkpoint."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["iteration"] < iterations]
    write_text(path, "".join(kept))


def add_metrics(path: Path, **line: Any) -> None:
    """Add a line of JSON to a metrics.jsonl."""
    with blaming(path), open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is damaged, such as one cut short by a kill."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not all(isinstance(line.get(name), int | float) for name in ALWAYS):
            break
        lines.append(line)
    return lines
