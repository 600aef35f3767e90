"""What the two training programs share: seeded randomness, EMA, learning rate, stopping politely, checkpoints, metrics.

A run can be killed at any moment.  All randomness of iteration i comes from a generator made of (seed, i), and a checkpoint
holds weights, EMA and optimiser, so a resumed run computes the very same numbers as one that was never interrupted.
"""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distributed import rank, sum_over_ranks
from options import InputError


UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)


def generator(seed: int, *stream: int) -> torch.Generator:
    """A CPU generator for one purpose: different (seed, *stream) give independent numbers."""
    state = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2 ** 63)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: a reader sees the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors makes files that only their owner can read
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


class EMA:
    """Exponential moving average of parameters.

    The decay of update i (from 0) is min(decay, (1 + i) / (10 + i)), so that a short run is not an average over its start.
    """

    def __init__(self, parameters: list[torch.Tensor], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the live parameters; calling it again undoes it."""
        for average, p in zip(self.average, self.parameters):
            held = p.detach().clone()
            p.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict:
        return dict(average=self.average, updates=self.updates)

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)


def warmup(iteration: int, iterations: int) -> float:
    """Linear from 1/n to 1 over the first n iterations: the factor on the learning rate."""
    return min(1.0, (iteration + 1) / iterations) if iterations else 1.0


def cosine_decay(iteration: int, iterations: int) -> float:
    """Half a cosine from 1 to 0 over the run: the factor on the learning rate."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


class StopSignal:
    """Within the `with` block Ctrl-C and SIGTERM only set `received`; the loop stops when it suits.  A second Ctrl-C kills."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self.previous = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def on_signal(self, number, frame) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *exc) -> None:
        for s, handler in self.previous.items():
            signal.signal(s, handler)


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


class Stats:
    """Sums over one iteration's pictures, over micro-batches and ranks: loss, and what a run should be watched by."""

    def __init__(self, timesteps: int, device: torch.device):
        # rows: loss, pictures, guidance^2, first and last loss of the PGD; columns: quarters of the timesteps
        self.timesteps, self.sums, self.guided, self.ascended = timesteps, torch.zeros(5, 4, device=device, dtype=torch.float32), False, False

    def add(self, t: torch.Tensor, losses: torch.Tensor, guidance: torch.Tensor | float, ascent: list[torch.Tensor]) -> None:
        """t, losses (B,); guidance (B, ...) or 0; ascent: losses (B,) at each PGD step, or an empty list."""
        self.guided, self.ascended = isinstance(guidance, torch.Tensor), bool(ascent)
        strength = guidance.detach().square().flatten(1).mean(1) if self.guided else torch.zeros_like(losses)
        first, last = (ascent[0], ascent[-1]) if ascent else (torch.zeros_like(losses),) * 2
        rows = torch.stack([losses, torch.ones_like(losses), strength, first, last])        # (5, B)
        self.sums.index_add_(1, t * 4 // self.timesteps, rows)

    def reduce(self) -> dict:
        """The line for metrics.jsonl, the same on every rank.  Quarters without a picture are None."""
        sums = sum_over_ranks(self.sums).cpu()
        mean = lambda row: [(s / n).item() if n else None for s, n in zip(sums[row], sums[1])]
        line = dict(loss=(sums[0].sum() / sums[1].sum()).item(), loss_by_quarter=mean(0))
        if self.guided:  # relative to eps, whose root mean square is 1
            line["guidance_rms"] = [None if m is None else m ** 0.5 for m in mean(2)]
        if self.ascended:
            line["pgd_gain"] = (sums[4].sum() / sums[3].sum()).item()
        return line
