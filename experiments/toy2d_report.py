"""What toy2d_measured.py has measured, as plain numbers, Markdown and a picture."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from plumbing.figures import save_figure
from plumbing.markdown import markdown

COLOURS = {"baseline": "darkblue", "faster baseline": "tab:green", "adversarial": "tab:gray",
           "guided": "sienna", "TAN": "orange"}  # Figure 2's caption


def quartiles(values: Tensor) -> list[float]:
    """25, 50 and 75 % of the draws lie below."""
    return [round(v, 4) for v in torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()]


def share(hits: Tensor) -> float:
    """Of the draws, from 0 to 1."""
    return hits.float().mean().item()


def select(rows: list[dict], **what: str | int | float) -> list[dict]:
    """Those of these rows with this method, timestep ..."""
    return [row for row in rows if all(row[name] == value for name, value in what.items())]


def summarise_angle(row: dict, rows: list[dict]) -> dict:
    """Mean and quartiles of an angle; in which share of the draws it is smaller than others of its batch."""
    batch, t, method, found = row["batch"], row["t"], row["method"], row["angle"]
    baseline = select(rows, batch=batch, t=t, method="baseline")[0]["angle"]
    numbers = dict(batch=batch, t=t, method=method, mean=found.mean().item(), quartiles=quartiles(found),
                   closer_than_baseline=share(found < baseline))
    if method.startswith("TAN"):
        guided = select(rows, batch=batch, t=t, method=method.replace("TAN", "guided"))[0]["angle"]
        numbers |= dict(closer_than_guided=share(found < guided),
                        paper_order=share((found < guided) & (guided < baseline)))
    return numbers


def summarise(angles: list[dict], noise: list[dict], adaptation: list[dict]) -> dict[str, list[dict]]:
    """The measurements as plain numbers, for measured.json: mean and quartiles over the draws."""
    return dict(
        angles=[summarise_angle(row, angles) for row in angles],
        noise=[dict(predictor=row["predictor"], t=row["t"], omega=row["omega"], pgd_steps=row["steps"],
                    axes_ratio=row["ratio"].mean().item(), axis_to_gradient=row["off"].mean().item(),
                    along_gradient=share(row["off"] < 45), gradient_angle=row["away"].mean().item(),
                    gradient_quartiles=quartiles(row["away"])) for row in noise],
        adaptation=[dict(method=row["method"], iteration=row["iteration"], mean_error=quartiles(row["error"]),
                         w2=quartiles(row["w2"])) for row in adaptation])


def angles_table(rows: list[dict], batch: str, title: str) -> str:
    times, methods = sorted({row["t"] for row in rows}), dict.fromkeys(row["method"] for row in rows)
    table = []
    for method in methods:
        cells = []
        for t in times:
            row, = select(rows, batch=batch, method=method, t=t)
            closer = f" ({row['closer_than_baseline']:.0%})" if method != "baseline" else ""
            cells.append(f"{row['mean']:.1f}{closer}")
        table.append([method, *cells])
    return markdown(f"Angle to the gradient of 10,000 samples, {title}: mean over draws in degrees (share of "
                    "draws closer than the baseline)", ["method", *(f"t = {t}" for t in times)], table)


def against_guided_table(rows: list[dict]) -> str:
    """How often adversarial noise is what brings the gradient nearer."""
    times, table = sorted({row["t"] for row in rows}), []
    for batch, method in dict.fromkeys((row["batch"], row["method"]) for row in rows):
        if method.startswith("TAN"):
            found = [select(rows, batch=batch, method=method, t=t)[0] for t in times]
            cells = [f"{row['closer_than_guided']:.0%}, {row['paper_order']:.0%}" for row in found]
            table.append([f"{method}, {batch}", *cells])
    return markdown("Share of draws whose gradient is closer with adversarial noise than without; and whose "
                    "order is the paper's: TAN, guided, baseline",
                    ["method, shots", *(f"t = {t}" for t in times)], table)


def noise_table(rows: list[dict]) -> str:
    columns = [(predictor, t) for predictor in ("exact", "trained") for t in ("100", "500", "mixed")]
    table = []
    for omega, steps in dict.fromkeys((row["omega"], row["pgd_steps"]) for row in rows):
        cells = []
        for predictor, t in columns:
            row, = select(rows, omega=omega, pgd_steps=steps, predictor=predictor, t=t)
            cells.append(f"{row['axes_ratio']:.2f} ({row['along_gradient']:.0%})")
        table.append([f"{omega}, {steps}", *cells])
    names = [f"{predictor}, {t if t == 'mixed' else f't = {t}'}" for predictor, t in columns]
    return markdown("Worst-case noise: ratio of its axes (share of draws whose long axis lies along the "
                    "gradient, not across), by predictor and timesteps", ["omega, J", *names], table)


def adaptation_table(rows: list[dict]) -> str:
    stages = sorted({row["iteration"] for row in rows})
    table = [[method, *(f"{row['w2'][1]:.2f}" for row in select(rows, method=method))]
             for method in dict.fromkeys(row["method"] for row in rows)]
    return markdown("2-Wasserstein distance of the samples to the target, median over draws, after so many "
                    "iterations (before: 2.83)", ["method", *map(str, stages)], table)


def tables(results: dict[str, list[dict]]) -> str:
    """Markdown of the three measurements, for people."""
    return "\n\n".join([angles_table(results["angles"], "repeated", "shots repeated"),
                        angles_table(results["angles"], "one noise each", "one noise for each shot"),
                        against_guided_table(results["angles"]), noise_table(results["noise"]),
                        adaptation_table(results["adaptation"])])


def style(method: str) -> dict[str, str]:
    """Colour of the caption; the Bayes classifier's lines are dotted."""
    return dict(color=COLOURS[method.split(",")[0]], linestyle=":" if "bayes" in method else "-")


def draw_angles(axes: Axes, title: str, rows: list[dict], methods: list[str]) -> None:
    """Angle against timestep: medians with bars from quartile to quartile."""
    for i, method in enumerate(methods):
        if found := sorted((row["t"], *quartiles(row["angle"])) for row in select(rows, method=method)):
            t, low, middle, high = np.array(found).T  # the faster baseline has the baseline's gradient
            axes.errorbar(t + (i - 3) * 7, middle, [middle - low, high - middle], marker="o", markersize=4,
                          linewidth=1.2, label=method, **style(method))
    axes.set(title=title, xlabel="timestep t", ylabel="angle to the reference gradient, degrees",
             yscale="log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.grid(alpha=0.3)


def draw_distances(axes: Axes, rows: list[dict], methods: list[str]) -> None:
    """Distance to the target against iterations: medians in bands from quartile to quartile."""
    for method in methods:
        found = [(row["iteration"], *quartiles(row["w2"])) for row in select(rows, method=method)]
        i, low, middle, high = zip(*found)
        axes.plot(i, middle, linewidth=1.5, label=method, **style(method))
        axes.fill_between(i, low, high, alpha=0.12, color=style(method)["color"], linewidth=0)
    axes.axhline(8 ** 0.5, color="black", linewidth=0.8, linestyle="--", label="before adapting")
    axes.set(title="samples against target", xlabel="iteration", ylabel="2-Wasserstein distance",
             xscale="log", yscale="log")
    axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axes.set_xticks([2 ** i for i in range(9)], [str(2 ** i) for i in range(9)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def draw_measured(path: Path, angles: list[dict], adaptation: list[dict]) -> None:
    """Angle against timestep for both batches, and distance against iterations."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    methods = list(dict.fromkeys(row["method"] for row in adaptation))
    draw_angles(axes[0], "ten shots, repeated", select(angles, batch="repeated"), methods)
    draw_angles(axes[1], "ten shots, one noise each", select(angles, batch="one noise each"), methods)
    axes[0].legend(fontsize=8, frameon=False)
    draw_distances(axes[2], adaptation, methods)
    save_figure(path, figure)
