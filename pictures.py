"""Pictures of results: grids of images and curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch
from PIL import Image, ImageDraw, ImageFont

from data import to_uint8
from training import write_atomic


def save_grid(path: Path, images: torch.Tensor, columns: int, gap_after: int | None = None, labels: list[str] | None = None) -> None:
    """images (N, 3, H, W) in [-1, 1], row by row -> one PNG; small ones are enlarged, with hard edges, to about 128 pixels.

    gap_after   a wider gap below every so many rows, to show pairs of rows; the last row must be full
    labels      a text to the left of each row
    """
    pixels = to_uint8(images)                                                  # (N, H, W, 3)
    enlarge = max(1, 128 // pixels.shape[1])
    pixels = pixels.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
    n, height, width, _ = pixels.shape
    rows, gap = -(-n // columns), 4
    tops = [r * (height + gap) + (r // gap_after * 3 * gap if gap_after else 0) for r in range(rows)]
    font = ImageFont.load_default(20)
    margin = round(max(map(font.getlength, labels))) + 16 if labels else 0
    canvas = torch.full((tops[-1] + height, margin + columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels):
        top, left = tops[i // columns], margin + i % columns * (width + gap)
        canvas[top:top + height, left:left + width] = picture
    image = Image.fromarray(canvas.numpy())
    for top, label in zip(tops, labels or []):
        ImageDraw.Draw(image).text((margin - 8, top + height / 2), label, fill="black", anchor="rm", font=font)
    write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


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
