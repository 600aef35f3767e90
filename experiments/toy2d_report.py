"""What toy2d.py has measured, as plain numbers, Markdown and pictures."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Ellipse
from torch import Tensor

from plumbing.figures import save_figure

COLOURS = {"reference": "cyan", "baseline": "darkblue", "faster baseline": "tab:green", "adversarial": "tab:gray", "guided": "sienna",
           "TAN": "orange"}  # Figure 2's caption


def quartiles(values: Tensor) -> list[float]:
    """25, 50 and 75 % of the draws lie below."""
    return [round(v, 4) for v in torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()]


def summarise(angles: list[tuple], noise: list[tuple], adaptation: list[tuple]) -> dict:
    """The measurements as plain numbers, for results.json: mean and quartiles over the draws."""
    of = {(batch, t, method): values for batch, t, method, values in angles}
    share = lambda hits: hits.float().mean().item()

    def entry(batch: str, t: int, method: str, v: Tensor) -> dict:
        baseline, guided = of[batch, t, "baseline"], of.get((batch, t, method.replace("TAN", "guided")), v)
        return dict(batch=batch, t=t, method=method, mean=v.mean().item(), quartiles=quartiles(v), closer_than_baseline=share(v < baseline),
                    **(dict(closer_than_guided=share(v < guided), paper_order=share((v < guided) & (guided < baseline))) if "TAN" in method else {}))

    return dict(
        angles=[entry(*row) for row in angles],
        noise=[dict(predictor=predictor, t=t, omega=omega, pgd_steps=steps, axes_ratio=ratio.mean().item(), axis_to_gradient=off.mean().item(),
                    along_gradient=share(off < 45), gradient_angle=away.mean().item(), gradient_quartiles=quartiles(away))
               for predictor, t, omega, steps, ratio, off, away in noise],
        adaptation=[dict(method=method, iteration=i, mean_error=quartiles(error), w2=quartiles(w2)) for method, i, error, w2 in adaptation])


def tables(results: dict) -> str:
    """Markdown of the three measurements, for people."""
    lines, rows = [], results["angles"]
    times = sorted({r["t"] for r in rows})
    for batch, title in (("repeated", "shots repeated"), ("one noise each", "one noise for each shot")):
        lines += [f"Angle to the gradient of 10,000 samples, {title}: mean over draws in degrees (share of draws closer than the baseline)", "",
                  "| method | " + " | ".join(f"t = {t}" for t in times) + " |", "|---|" + "---|" * len(times)]
        for method in dict.fromkeys(r["method"] for r in rows):
            mine = {r["t"]: r for r in rows if (r["method"], r["batch"]) == (method, batch)}
            cells = [f"{mine[t]['mean']:.1f}" + (f" ({mine[t]['closer_than_baseline']:.0%})" if method != "baseline" else "") for t in times]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    columns = [(p, t) for p in ("exact", "trained") for t in ("100", "500", "mixed")]
    lines += ["Worst-case noise: ratio of its axes (share of draws whose long axis lies along the gradient, not across), by predictor and timesteps", "",
              "| omega, J | " + " | ".join(f"{p}, {'t = ' if t != 'mixed' else ''}{t}" for p, t in columns) + " |", "|---|" + "---|" * len(columns)]
    for omega, steps in dict.fromkeys((r["omega"], r["pgd_steps"]) for r in results["noise"]):
        mine = {(r["predictor"], r["t"]): r for r in results["noise"] if (r["omega"], r["pgd_steps"]) == (omega, steps)}
        lines.append(f"| {omega}, {steps} | " + " | ".join(f"{mine[c]['axes_ratio']:.2f} ({mine[c]['along_gradient']:.0%})" for c in columns) + " |")
    stages = sorted({r["iteration"] for r in results["adaptation"]})
    lines += ["", "2-Wasserstein distance of the samples to the target, median over draws, after so many iterations (before: 2.83)", "",
              "| method | " + " | ".join(map(str, stages)) + " |", "|---|" + "---|" * len(stages)]
    for method in dict.fromkeys(r["method"] for r in results["adaptation"]):
        cells = [f"{r['w2'][1]:.2f}" for r in results["adaptation"] if r["method"] == method]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def style(method: str) -> dict:
    """Colour of the caption; the Bayes classifier's lines are dotted."""
    return dict(color=COLOURS[method.split(",")[0]], linestyle=":" if "bayes" in method else "-")


def draw_gradients(axes: plt.Axes, shown: dict, gradients: dict[str, Tensor], cloud: Tensor, ellipses: list[tuple]) -> None:
    """Figure 2(a): directions of the gradients (2,), the cloud (N, 2) of worst-case noise, and (label, half axes, long axis, style) of ellipses."""
    axes.scatter(*cloud.T.numpy(), s=2, color="red", alpha=0.25, linewidths=0, label="worst-case noise", rasterized=True)
    for label, half, long, look in ellipses:
        turn = torch.arctan2(long[1], long[0]).rad2deg().item()
        axes.add_patch(Ellipse((0, 0), 4 * half[1].item(), 4 * half[0].item(), angle=turn, fill=False,
                               label=f"{label}:\naxes {(half[1] / half[0]).item():.2f} to 1", **look))
    for name, gradient in gradients.items():
        end = F.normalize(gradient, dim=0) * 4  # the paper shows directions
        text = "10,000 samples" if name == "reference" else f"{name}: {shown['angles'][name]:.1f}°"
        width = {"reference": 5.0, "TAN": 1.2}.get(name.split(",")[0], 3.0)  # TAN lies on guided
        axes.plot([0, end[0].item()], [0, end[1].item()], linewidth=width, label=text, **style(name))
    axes.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="first coordinate", ylabel="second coordinate",
             title=f"(a) directions of the gradient, t = {shown['t']}")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, markerscale=4, title="angle to the cyan line", title_fontsize=8)


def draw_trajectories(axes: plt.Axes, title: str, original: Tensor, adapted: Tensor) -> dict:
    """Figures 2(b, c): density of the adapted model's trajectories (steps + 1, N), one of them in gold, the original's in cyan."""
    bins = torch.linspace(-5, 4, 91)
    density = torch.stack([torch.histogram(x.contiguous(), bins, density=True).hist for x in adapted])
    image = axes.pcolormesh(range(len(density) + 1), bins.numpy(), density.T.numpy(), cmap="magma", vmin=0, vmax=0.42, rasterized=True)
    axes.plot(original[:, 0].numpy(), color="cyan", linewidth=1.5, label="original model")
    axes.plot(adapted[:, 0].numpy(), color="gold", linewidth=1.5, label="adapted model")
    axes.set(xlabel="sampling step", ylabel="first coordinate", title=title)
    axes.legend(fontsize=7, loc="lower left", labelcolor="white", facecolor="black", framealpha=0.5)
    if title.startswith("(c)"):
        axes.figure.colorbar(image, ax=axes, label="density")
    gap = adapted - original
    return dict(mean=adapted[-1].mean().item(), std=adapted[-1].std().item(), peak_density=density[-1].max().item(), gap=gap[-1].mean().item(),
                gap_std=gap[-1].std().item())


def draw_measured(path: Path, angles: list[tuple], adaptation: list[tuple]) -> None:
    """Angle against timestep for both batches, and distance against iterations; medians with bars and bands from quartile to quartile."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    shown = list(dict.fromkeys(method for method, *_ in adaptation))
    for ax, batch, title in zip(axes, ("repeated", "one noise each"), ("ten shots, repeated", "ten shots, one noise each")):
        for i, method in enumerate(shown):
            mine = [(t, *quartiles(values)) for b, t, m, values in angles if (b, m) == (batch, method)]
            if not mine:  # the faster baseline has the baseline's gradient
                continue
            t, low, middle, high = np.array(sorted(mine)).T
            ax.errorbar(t + (i - 3) * 7, middle, [middle - low, high - middle], marker="o", markersize=4, linewidth=1.2, label=method, **style(method))
        ax.set(title=title, xlabel="timestep t", ylabel="angle to the reference gradient, degrees", yscale="log")
        ax.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    for method in shown:
        mine = [(i, *quartiles(w2)) for m, i, _, w2 in adaptation if m == method]
        i, low, middle, high = np.array(mine).T
        axes[2].plot(i, middle, linewidth=1.5, label=method, **style(method))
        axes[2].fill_between(i, low, high, alpha=0.12, color=style(method)["color"], linewidth=0)
    axes[2].axhline(8 ** 0.5, color="black", linewidth=0.8, linestyle="--", label="before adapting")
    axes[2].set(title="samples against target", xlabel="iteration", ylabel="2-Wasserstein distance", xscale="log", yscale="log")
    axes[2].set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axes[2].set_xticks([1, 2, 4, 8, 16, 32, 64, 128, 256], ["1", "2", "4", "8", "16", "32", "64", "128", "256"])
    axes[2].minorticks_off()
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8, frameon=False)
    save_figure(path, figure)
