"""TAN in two dimensions (section 5.1, Figure 2): what the paper claims, measured where the truth is known.

  python toy2d.py             Figure 2 and a table of the claims, in two minutes
  python toy2d.py --quick     the same from fewer repetitions, in ten seconds

Writes figure2.png and results.json to runs/toy2d/.  gaussians.py has Algorithm 1 on two Gaussians and says
what to expect; python -m experiments.toy2d_measured measures more.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor
from tqdm import tqdm

import gaussians
from adversarial_noise import norm
from classifier import TARGET
from gaussians import MLP, SCHEDULE, angle, ellipse, trajectories
from plumbing import options as flags
from plumbing.seeds import generator

# What a method uses: guidance (Eq. 6), adversarial noise (Eq. 8), and a gamma that fades, which is ours
METHODS = {"baseline": (), "guided, ten": ("guidance",), "TAN, ten": ("guidance", "adversarial noise"),
           "fading, ten": ("guidance", "fading")}
SHOWN = ("baseline", "guided, ten", "TAN, ten", "guided, bayes", "TAN, bayes")  # in (a); with whose p_phi
COLOURS = {"reference": "cyan", "baseline": "darkblue", "guided": "sienna", "TAN": "orange",  # the caption's
           "fading": "green"}
COLUMNS = (*SHOWN, "fading, ten")
FEW = 3                                                            # iterations before Figures 2(b) and 2(c)
STAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # where (d) looks; and at the last
bar = functools.partial(tqdm, leave=False, mininterval=0.5, disable=None)  # no bar in a log file


@dataclasses.dataclass
class Options:
    draws: int = 200
    """Independent draws of the ten shots."""
    repeats: int = 1000
    """Copies of the shots in one batch, each with its own noise (the paper's thousand)."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Where gradients are compared (0 to 999); the middle one is drawn."""
    gamma: float = 5.0
    """Strength of the guidance (Eq. 6)."""
    omega: float = 0.02
    """Rate of the gradient ascent (Eq. 8)."""
    pgd_steps: int = 10
    """Its steps J."""
    norm: Literal["paper", "own"] = "paper"
    """What Norm gives the noises of a batch; paper: mean 0, standard deviation 1; own: those as drawn."""
    fade_iterations: int = 8
    """Iterations over which gamma falls to 0, for the method "fading"."""
    iterations: int = 256
    """Updates when adapting."""
    learning_rate: float = 0.02
    """Of plain gradient descent when adapting; the loss is a mean over two coordinates, so it is twice the
    eta of Algorithm 1, line 9."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """20 draws, 100 copies, 32 iterations, where nothing else is typed."""
    output_dir: str = "runs/toy2d"
    """Where the results go (an earlier result there is replaced)."""


def adapt(options: Options, method: str, model: MLP, ten: MLP, shots: Tensor, updates: int) -> Iterator[MLP]:
    """Algorithm 1 from shots (10, E, 2) and E classifiers that know them; the same draws for each method."""
    uses = METHODS[method]
    return gaussians.adapt(model, shots, generator(options.seed, 3),
                           ten.class_logits if "guidance" in uses else None, options.gamma, options.omega,
                           options.pgd_steps if "adversarial noise" in uses else 0, options.learning_rate,
                           updates, functools.partial(bar, desc=method),
                           options.fade_iterations if "fading" in uses else 0, options.norm == "own")


def compare(options: Options, model: MLP, ten: MLP, shots: Tensor, t: int) -> dict[str, Tensor]:
    """gaussians.compare_gradients of all draws, guided by the ten shots' classifiers and by Bayes'."""
    parts = []
    for first in range(0, options.draws, 10):  # ten draws fit the processor's cache
        part, g = slice(first, first + 10), generator(options.seed, 4, options.repeats, t, first)
        classifiers = {"ten": ten.select(part).class_logits, "bayes": gaussians.bayes_classifier}
        parts.append(gaussians.compare_gradients(model, classifiers, shots[:, part], t, options.repeats, g,
                                                 options.gamma, options.omega, options.pgd_steps,
                                                 options.norm == "own"))
    return {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}


def draw_gradients(axes: Axes, found: dict[str, Tensor], title: str) -> None:
    """Figure 2(a), of the first draw: directions of the first gradients, and the worst-case noise."""
    cloud = found["worst"][:, :1]
    ((short, long),), ((x, y),) = ellipse(cloud)
    axes.scatter(*cloud[:3000, 0].T, s=2, color="red", alpha=0.25, linewidths=0, label="worst-case noise")
    axes.add_patch(Ellipse((0, 0), 4 * long, 4 * short, angle=torch.atan2(y, x).rad2deg().item(), fill=False,
                           label=f"its covariance, 2 s.d.:\naxes {long / short:.2f} to 1", color="darkred"))
    for name in ("reference", *SHOWN):
        method, (x, y) = name.split(",")[0], 4 * found[name][0] / found[name][0].norm()
        away = angle(found[name], found["reference"])[0]
        axes.plot([0, x], [0, y], color=COLOURS[method], linestyle=":" if "bayes" in name else "-",
                  linewidth={"reference": 5.0, "TAN": 1.2}.get(method, 3.0),  # TAN lies on guided
                  label="10,000 samples" if name == "reference" else f"{name}: {away:.1f}°")
    axes.set(xlim=(-4, 4), ylim=(-4, 4), xlabel="first coordinate", ylabel="second coordinate",
             aspect="equal", title=title)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, markerscale=4)


def draw_trajectories(axes: Axes, title: str, original: Tensor, adapted: Tensor) -> tuple[float, ...]:
    """Figure 2(b, c): density of trajectories (steps + 1, N); its last peak, mean and s.d. of the shift."""
    bins = torch.linspace(-5, 4, 91)
    density = torch.stack([torch.histogram(x.contiguous(), bins, density=True).hist for x in adapted])
    axes.pcolormesh(range(len(density) + 1), bins.numpy(), density.T.numpy(), cmap="magma", vmin=0, vmax=0.42)
    axes.plot(original[:, 0], color="cyan", label="original model")
    axes.plot(adapted[:, 0], color="gold", label="adapted model")
    axes.set(xlabel="sampling step", ylabel="first coordinate", title=f"{title}, after {FEW} iterations")
    axes.legend(fontsize=8, loc="lower left", labelcolor="white", facecolor="black", framealpha=0.5)
    shift = adapted[-1] - original[-1]
    return density[-1].max().item(), shift.mean().item(), shift.std().item()


def draw_distances(axes: Axes, options: Options, model: MLP, ten: MLP, shots: Tensor) -> dict[str, list]:
    """Our panel (d): distance to the target; {method: [iteration and the quartiles over the draws, ...]}."""
    g, curves, quartiles = generator(options.seed, 6), {}, torch.tensor([0.25, 0.5, 0.75])
    noise = norm(torch.randn(250, options.draws, 2, generator=g), dims=(0,))  # less sampling error
    for method in METHODS:
        curves[method], colour = [], COLOURS[method.split(",")[0]]
        for i, adapted in enumerate(adapt(options, method, model, ten, shots, options.iterations), start=1):
            if i in (*STAGES, options.iterations):
                distances = gaussians.wasserstein(trajectories(adapted, noise, 25)[-1])
                curves[method].append([i, *distances.quantile(quartiles).tolist()])
        iterations, low, median, high = zip(*curves[method])
        axes.plot(iterations, median, color=colour, label=method)
        axes.fill_between(iterations, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(8 ** 0.5, color="black", linewidth=0.8, linestyle="--", label="before adapting")
    x, y = [2 ** i for i in range(9)], [0.5, 1, 2, 5, 10]
    axes.set(xscale="log", yscale="log", xticks=x, xticklabels=x, yticks=y, yticklabels=y, ylim=(0.2, 20),
             xlim=(1, options.iterations), xlabel="iterations", ylabel="2-Wasserstein distance",
             title="(d) samples against target")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower center", framealpha=1, edgecolor="white")
    return curves


def main() -> None:
    options, typed = flags.parse(Options, __doc__)
    if options.quick:
        fewer = dict(draws=20, repeats=100, iterations=32)
        options = flags.replace(options, **{name: n for name, n in fewer.items() if name not in typed})
    flags.at_least(options, draws=1, repeats=1, timesteps=0, iterations=FEW, pgd_steps=0, omega=0,
                   fade_iterations=0)
    flags.below(options, timesteps=SCHEDULE.timesteps)
    flags.positive(options, "gamma", "learning_rate")
    flags.check_seed(options)
    if not options.timesteps:
        raise flags.InputError("--timesteps: give at least one")
    seed, times, out = options.seed, sorted(options.timesteps), Path(options.output_dir)
    middle = times[len(times) // 2]
    out.mkdir(parents=True, exist_ok=True)

    # The source model, the ten shots of each draw, and the classifiers that know them alone
    torch.manual_seed(seed)
    model = gaussians.pretrain(2000, generator(seed, 1), functools.partial(bar, desc="pre-training"))
    shots = gaussians.draw_points(TARGET, 10, options.draws, generator(seed, 0))
    torch.manual_seed(seed + 1)
    ten = gaussians.train_classifier(shots, 1000, generator(seed, 2), functools.partial(bar, desc="p_phi"))

    # (a) to (c) of the paper, of the first draw; (d) is ours, of all
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    (a, d), (b, c) = top.subplots(1, 2), bottom.subplots(1, 2)
    gradients = {t: compare(options, model, ten, shots, t) for t in bar(times, desc="gradients")}
    draw_gradients(a, gradients[middle], f"(a) directions of the first gradient, t = {middle}")
    noise = torch.randn(20_000, 1, 2, generator=generator(seed, 9))
    original, drawn = trajectories(model, noise, 100)[..., 0, 0], []
    for axes, title, method in ((b, "(b) baseline", "baseline"), (c, "(c) TAN", "TAN, ten")):
        *_, adapted = adapt(options, method, model, ten.select([0]), shots[:, :1], FEW)
        drawn.append(draw_trajectories(axes, title, original, trajectories(adapted, noise, 100)[..., 0, 0]))
    bottom.colorbar(c.collections[0], ax=c, label="density")
    curves = draw_distances(d, options, model, ten, shots)
    figure.savefig(out / "figure2.png", dpi=110)

    # What it says of them: a number for each of COLUMNS, from the left; None where there is none
    half, long = ellipse(gradients[middle]["worst"])
    ratio, off = half[:, 1] / half[:, 0], angle(long, gradients[middle]["adversarial"])
    along = (off - 90).abs() > 45  # nearer to the gradient's line than across it
    medians = [[median for _, _, median, _ in curves[name]] if name in curves else [] for name in COLUMNS]
    (peak_b, shift_b, spread_b), (peak_c, shift_c, spread_c) = drawn
    claims = {f"(a) closer to 10,000 samples, degrees, t = {t}":
              [angle(found[name], found["reference"]).mean().item() for name in SHOWN]
              for t, found in gradients.items()}
    claims |= {f"(a) noise an ellipse: ratio of axes, t = {middle}": [None, None, ratio.mean().item()],
               "    share of draws with it along the gradient": [None, None, along.float().mean().item()],
               f"(d) learnt faster: distance after {FEW} iterations":
               [m[STAGES.index(FEW)] if m else None for m in medians],
               "    the largest (2.83 before)": [max(m, default=None) for m in medians],
               "    at the end": [m[-1] if m else None for m in medians],
               "(c) brighter centre: peak (ideal 0.40)": [peak_b, None, peak_c],
               "(c) parallel lines: mean shift (ideal -2)": [shift_b, None, shift_c],
               "    its standard deviation (ideal 0)": [spread_b, None, spread_c]}
    results = dict(options=flags.flat(options), shown=COLUMNS, claims=claims, distances=curves)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(f"{'what the paper says, and what was measured':46}" + "".join(f"{name:>14}" for name in COLUMNS))
    for claim, numbers in claims.items():
        print(f"{claim:46}" + "".join(" " * 14 if x is None else f"{x:14.2f}" for x in numbers))
    print(f"\n{options.draws} draws of ten shots (b, c: the first), seed {seed}.  ten: the classifier knows "
          f"the ten shots alone;\nbayes: the exact one.  {out}/figure2.png, results.json")


if __name__ == "__main__":
    flags.run(main)
