"""However it dies, it goes on: runs killed at random moments, and saves that fail at each byte.

  python -m experiments.kills                  twenty runs, about ten minutes on two cores
  python -m experiments.kills --runs 3         a quick look

A run of train_tan.py is killed (SIGKILL) one to three times at random moments, resumed each time, and has to
end with the weights of one that was never stopped, bit for bit.  Before that, each kind of file that a run
writes is written anew with a disk that is full after n bytes, for every n, and with a failure between writing
and renaming: the file of before has to be there, whole.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save

from plumbing.files import save_checkpoint, write_atomic
from plumbing.options import at_least, check_seed, parse, run
from plumbing.progress import bar

TRAIN = Path(__file__).parents[1] / "train_tan.py"
# A run of a minute at most, with all that a run does: classifier, stages, pictures.
SHORT = ("--target", "sunglasses", "--method", "tan", "--iterations", "10", "--batch-size", "4",
         "--save-every", "2", "--samples", "4", "--sample-steps", "2", "--previews", "2",
         "--classifier-iterations", "3", "--source-count", "16", "--no-classifier-check", "--device", "cpu")


@dataclasses.dataclass
class Options:
    runs: int = 20
    """Runs that are killed."""
    kills: int = 3
    """Each at most so many times."""
    seed: int = 0
    """Seed of the moments."""


def digest(folder: Path) -> str:
    """Of the weights of a finished run."""
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def start(folder: Path) -> subprocess.Popen:
    """The run in this folder, begun or resumed."""
    resumed = ["--resume"] if (folder / "options.json").exists() else []
    words = [sys.executable, TRAIN, *SHORT, *resumed, "--output-dir", folder]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(folder: Path) -> float:
    """Let the run end; returns the seconds it took.  RuntimeError with its last line if it fails."""
    begun, process = time.monotonic(), start(folder)
    said = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"{folder}: exit {process.returncode}: {said.strip().splitlines()[-1]}")
    return time.monotonic() - begun


def killed_runs(options: Options, place: Path) -> int:
    """How many of the killed runs end as one that was never stopped."""
    seconds, random_ = finish(place / "whole"), random.Random(options.seed)
    expected, same = digest(place / "whole"), 0
    for i in bar(range(options.runs), "killed runs", total=options.runs):
        folder = place / str(i)
        for _ in range(random_.randint(1, options.kills)):
            process = start(folder)
            try:
                process.wait(random_.uniform(0.1, 1.0) * seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
        finish(folder)
        same += digest(folder) == expected
    return same


def write_with_room(content: bytes, room: int, path: Path) -> None:
    """`content` into a new file, or what fits of it, and the error of a disk with room for so many bytes."""
    path.write_bytes(content[:room])
    if len(content) > room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents() -> dict[str, bytes]:
    """A small file of each kind that a run writes."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "checkpoint.pt", dict(iteration=3, parameters=[torch.ones(3)]))
        state = (Path(folder) / "checkpoint.pt").read_bytes()
    return {"checkpoint.pt": state, "weights.safetensors": save({"a": torch.ones(3)}),
            "options.json": json.dumps(dict(target="sunglasses", seed=0), indent=1).encode(),
            "samples.png": b"\x89PNG" + bytes(200), "report.html": b"<!doctype html>" + bytes(100)}


def survives(path: Path, write: Callable[[Path], None], before: bytes) -> bool:
    """Whether the file of before is there, and nothing beside it, after a write that fails."""
    try:
        write_atomic(path, write)
    except OSError:
        return path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    return False


def failed_saves(place: Path) -> tuple[int, int]:
    """Failures at every byte of every kind of file and before every rename, and how many of them left the
    file of before alone.
    """
    place.mkdir()
    tried = whole = 0
    for name, content in contents().items():
        path, before = place / name, content[::-1]
        path.write_bytes(before)
        for room in range(len(content)):
            tried += 1
            whole += survives(path, functools.partial(write_with_room, content, room), before)
        for step in ("fsync", "replace"):
            with mock.patch(f"os.{step}", side_effect=OSError(errno.EIO, "killed here")):
                tried += 1
                whole += survives(path, functools.partial(write_with_room, content, len(content)), before)
        path.unlink()
    return tried, whole


def main() -> None:
    options, _ = parse(Options, __doc__)
    at_least(options, runs=0, kills=1)
    check_seed(options)
    with tempfile.TemporaryDirectory() as folder:
        tried, whole = failed_saves(Path(folder) / "saves")
        print(f"failed saves that left the file of before whole: {whole} of {tried}")
        if options.runs:
            same = killed_runs(options, Path(folder))
            print(f"killed runs that ended with the weights of one never stopped: {same} of {options.runs}")


if __name__ == "__main__":
    run(main)
