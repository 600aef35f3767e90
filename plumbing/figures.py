"""Figures: curves and matplotlib pages as PNG."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch

from plumbing.files import write_atomic


def save_figure(path: Path, figure: plt.Figure, dpi: int = 110) -> None:
    """A matplotlib figure as PNG, and closed."""
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    plt.close(figure)


def save_curve(path: Path, values: list[float], ylabel: str, smooth: int = 25) -> None:
    """A curve over iterations as PNG: each value faint, its running mean on top."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(values, color="tab:blue", alpha=0.25, linewidth=0.8)
    if len(values) >= smooth:
        mean = torch.tensor(values).unfold(0, smooth, 1).mean(1)
        axes.plot(range(smooth - 1, len(values)), mean, color="tab:blue", label=f"mean of {smooth}")
        axes.legend(frameon=False)
    axes.set(xlabel="iteration", ylabel=ylabel)
    axes.grid(alpha=0.3)
    save_figure(path, figure, dpi=120)
