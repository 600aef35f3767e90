"""Curves and pictures of section 5 from what parts.py measured; the tables are in tables_report.py."""

import statistics
from pathlib import Path

import torch

import domains
from domains import judge
from experiments.results import Row
from experiments.tables_report import of, scores
from plumbing.figures import save_figure
from plumbing.pictures import to_uint8
from settings import METHODS


def draw_iterations(path: Path, target: str, found: list[Row]) -> None:
    """Toy FID against iterations and training time: a point a run, a line through the means over seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, method in enumerate(METHODS):
        runs = of(found, method=method)
        if not runs:
            continue
        counts = sorted({row["run"]["iterations"] for row in runs})
        means = [statistics.mean(scores(runs, "toy FID", iterations=count)) for count in counts]
        points = [(row["run"]["iterations"], row["score"]["toy FID"]) for row in runs]
        seconds = statistics.median(row["seconds"] for row in runs)
        for ax, unit in zip(axes, (1, seconds)):
            ax.plot([unit * count for count in counts], means, color=f"C{i}", label=method)
            at, fids = [unit * count for count, _ in points], [fid for _, fid in points]
            ax.plot(at, fids, ".", color=f"C{i}", alpha=0.6)
    for ax, label in zip(axes, ("iterations", "seconds of training on this machine, classifier left out")):
        ax.set(xscale="log", xlabel=label)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    counts = sorted({row["run"]["iterations"] for row in found})
    axes[0].set_xticks(counts, map(str, counts))
    axes[0].minorticks_off()
    axes[0].set_ylabel(f"toy FID, {target}")
    axes[1].legend(frameon=False)
    save_figure(path, figure)


def draw_figure1(path: Path, target: str, stages: list[torch.Tensor], iterations: list[int]) -> None:
    """Figure 1: pictures of two noises (2, 3, H, W) at each stage, with how near a training picture is."""
    from matplotlib.figure import Figure
    network = judge.load_judge(domains.TARGETS[target])
    shots = domains.target_images(target, stages[0].shape[2])
    figure = Figure(figsize=(1.35 * len(iterations), 3.2), layout="constrained")
    axes = figure.subplots(2, len(iterations))
    for column, (pictures, count) in enumerate(zip(stages, iterations)):
        distances = judge.nearest(network, pictures, shots)
        for ax, pixels, distance in zip(axes[:, column], to_uint8(pictures), distances):
            ax.imshow(pixels.numpy())
            ax.set(xticks=[], yticks=[], xlabel=f"{distance:.2f}")
        axes[0, column].set_title(f"{count}", fontsize=10)
    figure.suptitle("iterations of finetune; below each picture its toy LPIPS to the nearest training "
                    "picture or its mirror image", fontsize=10)
    save_figure(path, figure)
