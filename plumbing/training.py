"""What the two training programs share: seeded randomness, EMA, learning rate, stopping politely, checkpoints, metrics.

A run can be killed at any moment.  All randomness of iteration i comes from a generator made of (seed, i), and a checkpoint
holds weights, EMA and optimiser, so a resumed run computes the very same numbers as one that was never interrupted.
"""

import math
import signal

import torch

from plumbing.distributed import sum_over_ranks


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
