"""Figures: curves and matplotlib pages as PNG.

matplotlib is imported where it draws: that takes a second, and most commands draw nothing.  Unlike pyplot its
Figure asks for no window, whatever the user's settings.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plumbing.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(path: Path, figure: "Figure", dpi: int = 110) -> None:
    """A matplotlib figure as PNG."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def save_panels(path: Path, x: list[float], curves: dict[str, list[float]], xlabel: str,
                mark: float | None = None) -> None:
    """A small plot of each curve over x, side by side, as PNG.  mark: a dotted line at this x."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(3.2 * len(curves), 2.8), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axes.plot(x, values, color="tab:blue", marker="o", markersize=3)
        if mark is not None:
            axes.axvline(mark, color="tab:red", linestyle=":")
        axes.set(xlabel=xlabel, title=name)
        axes.grid(alpha=0.3)
    save_figure(path, figure, dpi=120)


def save_curve(path: Path, values: list[float], ylabel: str, smooth: int = 25) -> None:
    """A curve over iterations as PNG: each value faint, its running mean over `smooth` of them on top."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(values, color="tab:blue", alpha=0.25, linewidth=0.8)
    if len(values) >= smooth:
        mean = torch.tensor(values).unfold(0, smooth, 1).mean(1)
        axes.plot(range(smooth - 1, len(values)), mean, color="tab:blue", label=f"mean of {smooth}")
        axes.legend(frameon=False)
    axes.set(xlabel="iteration", ylabel=ylabel)
    axes.grid(alpha=0.3)
    save_figure(path, figure, dpi=120)
