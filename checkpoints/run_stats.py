"""What metrics.jsonl says of an iteration of train_tan.py."""

from typing import Any

import torch
from torch import Tensor

from plumbing import distributed


class Stats:
    """Sums over an iteration's pictures, micro-batches and ranks: the loss, and what to watch a run by."""

    def __init__(self, timesteps: int, device: torch.device):
        # rows: loss, pictures, guidance^2, residual^2, loss at eps^0 and at eps^J; columns: quarters of T
        self.timesteps, self.sums = timesteps, torch.zeros(6, 4, device=device, dtype=torch.float32)
        self.guided, self.ascended = False, False

    def add(self, t: Tensor, losses: Tensor, guidance: Tensor | float, residual: Tensor,
            ascent: list[Tensor]) -> None:
        """Of pictures at t (B,): losses (B,), guidance (B, ...) or 0, residual eps - eps_theta (B, ...), and
        the losses (B,) of the same network at each PGD step, or an empty list.
        """
        self.guided, self.ascended = isinstance(guidance, Tensor), bool(ascent)
        none = torch.zeros_like(losses)
        pull, left = (x.detach().square().flatten(1).mean(1) if self.guided else none
                      for x in (guidance, residual))
        first, last = (ascent[0], residual.square().flatten(1).sum(1)) if ascent else (none, none)
        rows = torch.stack([losses, torch.ones_like(losses), pull, left, first, last])      # (6, B)
        self.sums.index_add_(1, t * 4 // self.timesteps, rows)

    def reduce(self) -> dict[str, Any]:
        """The line for metrics.jsonl, the same on every rank.  Quarters without a picture are None."""
        losses, pictures, pull, left, first, last = distributed.sum_over_ranks(self.sums).cpu()

        def ratio(above: Tensor, under: Tensor) -> list[float | None]:
            return [(a / b).item() if b else None for a, b in zip(above, under, strict=True)]

        line = dict(loss=(losses.sum() / pictures.sum()).item(), loss_by_quarter=ratio(losses, pictures))
        if self.guided:  # root mean squares: beside that of eps, which is 1, and of what is left to learn
            for name, under in (("guidance_rms", pictures), ("guidance_ratio", left)):
                line[name] = [None if r is None else r ** 0.5 for r in ratio(pull, under)]
        if self.ascended:
            line["pgd_gain"] = (last.sum() / first.sum()).item()
        return line
