"""The tables and curves of section 5 from what tables.py measured: rows of judge.py's figures, each with the run it belongs to."""

import itertools
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import domains
from domains import judge
from plumbing.figures import save_figure
from plumbing.pictures import to_uint8
from settings import METHODS

# What the paper has on photographs, for DDPM-TAN, LMD-TAN (Table 1 only) and DDPM-PA.
PAPER_INTRA = {"babies": (0.592, 0.601, 0.599), "sunglasses": (0.613, 0.613, 0.604), "raphael": (0.621, 0.592, 0.581),
               "haunted-houses": (0.648, 0.653, 0.628), "landscape-drawings": (0.723, 0.738, 0.706)}
PAPER_FID = {"babies": (46.70, None, 48.92), "sunglasses": (20.06, None, 34.75)}
PAPER_CLASSIFIER = {"10": (0.621, 20.06), "100": (0.637, 22.84)}  # Table 3


def mean_std(values: list[float]) -> str:
    """Mean, standard deviation and number of runs."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f} ({len(values)})" if len(values) > 1 else "")


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([title, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in rows)])


def of(found: list[dict], **what) -> list[dict]:
    """Those of these runs with this method, target ..."""
    return [f for f in found if all(f["run"].get(name) == value for name, value in what.items())]


def main_tables(found: list[dict]) -> list[str]:
    """Tables 1 and 2 and what the judge reads: a row a method, a column a target, mean and standard deviation over seeds."""
    targets = [target for target in domains.TARGETS if of(found, target=target)]
    methods = [method for method in ("source model", *METHODS, "fresh pictures") if of(found, method=method)]

    def table(name: str, title: str, digits: int = 3, paper: dict | None = None) -> str:
        rows = []
        for method in methods:
            rates = sorted({f"{f['rate']:.1%}" for f in of(found, method=method) if "rate" in f})
            cells = [[f["score"][name] for f in of(found, method=method, target=target)] for target in targets]
            rows.append([method, " / ".join(rates), *(mean_std(values) if values else "" for values in cells)])
        for i, (method, rate) in enumerate((("TAN", "1.3%"), ("LMD-TAN", "1.6%"), ("DDPM-PA", "100%"))):
            numbers = [paper[t][i] if paper and t in paper else None for t in targets]
            if any(numbers):
                rows.append([f"paper, photographs: {method}", rate, *("" if x is None else f"{x:.{digits}f}" for x in numbers)])
        return markdown(title, ["method", "parameter rate", *targets], rows)

    def wins(name: str, title: str, sign: int) -> str:
        values = {(f["run"]["method"], f["run"]["target"], f["run"]["seed"]): sign * f["score"][name] for f in found if "seed" in f["run"]}
        trained = [method for method in METHODS if method in methods]
        won = lambda a, b: [value > values[(b, *run)] for (method, *run), value in values.items() if method == a and (b, *run) in values]
        return markdown(title, ["", *trained], [[a, *(f"{sum(won(a, b))} of {len(won(a, b))}" if a != b else "" for b in trained)] for a in trained])

    seconds = [[method, *(f"{statistics.mean(values):.2f}" if (values := [f["seconds"] for f in of(found, method=method, target=target)]) else ""
                          for target in targets)] for method in methods[1:-1]]
    iterations = ["iterations", *(" / ".join(map(str, sorted({f["run"]["iterations"] for f in of(found, target=target) if "seed" in f["run"]}))) for target in targets)]
    return [table("toy Intra-LPIPS", "Table 1, toy Intra-LPIPS (higher is more diverse)", 3, PAPER_INTRA),
            table("toy FID", "Table 2, toy FID (lower is better)", 2, PAPER_FID),
            table("toy KID", "Toy KID, times 1000 (lower is better; unlike FID not too high for few samples)"),
            table("target", "Share of samples in the target domain"),
            table("kept", "Share of attributes as in the source model's sample from the same noise (two independent pictures: about a quarter)"),
            table("covered", "Share of attribute values that appear"),
            table("memorised", "Distance to the nearest training picture or its mirror image over that of fresh pictures"),
            wins("toy FID", "In how many pairs of runs with the same target and seed the method of the row has the lower toy FID than that of the column", -1),
            wins("toy Intra-LPIPS", "The same, higher toy Intra-LPIPS", 1),
            markdown("Seconds an iteration (median of a run)", ["method", *targets], [*seconds, iterations])]


def classifier_table(found: list[dict]) -> list[str]:
    """Table 3."""
    names, rows = ("toy Intra-LPIPS", "toy FID", "toy KID", "target", "kept"), []
    for target, method, pictures in itertools.product(domains.TARGETS, METHODS, PAPER_CLASSIFIER):
        if mine := of(found, target=target, method=method, pictures=pictures):
            rows.append([target, method, pictures, *(mean_std([f["score"][name] for f in mine]) for name in names)])
    rows += [["paper, photographs", "TAN", pictures, f"{intra:.3f}", f"{fid:.2f}", "", "", ""] for pictures, (intra, fid) in PAPER_CLASSIFIER.items()]
    return [markdown("Table 3, classifier from 10 and from 100 pictures", ["target", "method", "pictures", *names], rows)]


def draw_iterations(path: Path, target: str, found: list[dict]) -> None:
    """Toy FID against iterations and against training time: a point a run, a line through the means over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for colour, method in enumerate(METHODS):
        if not of(found, method=method):
            continue
        counts = sorted({f["run"]["iterations"] for f in of(found, method=method)})
        runs = [of(found, method=method, iterations=count) for count in counts]
        seconds = statistics.median(f["seconds"] for f in of(found, method=method))
        for ax, unit in zip(axes, (1, seconds)):
            ax.plot([unit * count for count in counts], [statistics.mean(f["score"]["toy FID"] for f in mine) for mine in runs], color=f"C{colour}", label=method)
            ax.plot(*zip(*((unit * count, f["score"]["toy FID"]) for count, mine in zip(counts, runs) for f in mine)), ".", color=f"C{colour}", alpha=0.6)
    for ax, label in zip(axes, ("iterations", "seconds of training on this machine, classifier left out")):
        ax.set(xscale="log", xlabel=label)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"toy FID, {target}")
    axes[1].legend(frameon=False)
    save_figure(path, figure)


def iterations_table(found: list[dict]) -> list[str]:
    """The points of the curves."""
    names, rows = ("toy FID", "toy KID", "toy Intra-LPIPS", "target", "kept", "memorised"), []
    for target, method, count in itertools.product(domains.TARGETS, METHODS, sorted({f["run"]["iterations"] for f in found})):
        if mine := of(found, target=target, method=method, iterations=count):
            seconds = statistics.median(f["seconds"] for f in mine) * count
            rows.append([target, method, str(count), f"{seconds:.0f}", *(mean_std([f["score"][name] for f in mine]) for name in names)])
    return [markdown("Against iterations", ["target", "method", "iterations", "seconds", *names], rows)]


def draw_figure1(path: Path, target: str, stages: list[torch.Tensor], iterations: list[int]) -> None:
    """Each picture of two noises (2, 3, H, W) at each stage, with its distance to the nearest training picture or its mirror image, as in the paper's Figure 1."""
    network, shots = judge.load_judge(domains.TARGETS[target]), judge.reference(target, stages[0].shape[2]).shots
    figure, axes = plt.subplots(2, len(iterations), figsize=(1.35 * len(iterations), 3.2), layout="constrained")
    for column, (pictures, i) in enumerate(zip(stages, iterations)):
        for ax, pixels, distance in zip(axes[:, column], to_uint8(pictures), judge.nearest(network, pictures, shots)):
            ax.imshow(pixels.numpy())
            ax.set(xticks=[], yticks=[], xlabel=f"{distance:.2f}")
        axes[0, column].set_title(f"{i}", fontsize=10)
    figure.suptitle("iterations of finetune; below each picture its toy LPIPS to the nearest training picture or its mirror image", fontsize=10)
    save_figure(path, figure)
