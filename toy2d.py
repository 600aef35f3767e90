"""TAN in two dimensions (section 5.1, Figure 2), where the truth is known in closed form.

  python toy2d.py             two minutes: the figure, the measurements, a table of what holds
  python toy2d.py --quick     the same from fewer repetitions, in twenty seconds

Source N((1, 1), I), target N((-1, -1), I).  x_t of the source is N(sqrt(a) mu_S, I) with a = alpha_bar_t, so the best predictor is

    eps*(x_t, t) = sqrt(1-a) (x_t - sqrt(a) mu_S)    and on a target sample    eps - eps* = a eps - sqrt(a (1-a)) (x_0 - mu_S).

Three things follow for the first gradient of the output layer, which is -2 mean(eps - eps_theta - guidance) for its bias:
 1. Without guidance it points along mean(x_0) - mu_S - sqrt(a / (1-a)) mean(eps).  Ten shots repeated a thousand times leave the error of
    the shots' mean alone: an angle of standard deviation sqrt(1/10) / |mu_T - mu_S| = 6.4 degrees, 5.1 on average.
 2. Guidance adds sigma_hat^2 gamma mean(grad log p).  The Bayes classifier's gradient lies on mu_T - mu_S exactly, pulls the sum
    towards it, and makes it longer: a larger step as well as a better one.  A classifier that knows only the ten shots can at best
    point where they do.
 3. The ascent of Eq. 8 adds a multiple of a eps - sqrt(a (1-a)) (x_0 - mu_S) to eps, and Norm takes the mean away again: noise whose mean is 0
    gives the gradient of 1 whatever omega and J.  What is left of the shift is its difference between shots, which makes the noise
    an ellipse with the shots' own correlation: since Norm makes both variances 1, its long axis lies on a diagonal, as often across the gradient as along it.

Arrays are (B, E, 2): B points of each of E independent experiments (draws of ten shots, networks) side by side.  Writes to runs/toy2d/
figure2.png, measured.png, results.json and tables.md, which it prints.  toy2d_report.py sums up and draws.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adversarial_noise import norm, worst_case_noise
from classifier import SOURCE, TARGET, guided_loss, similarity_guidance
from ddpm import Schedule, predict_eps, sample
from experiments.toy2d_report import draw_gradients, draw_measured, draw_trajectories, summarise, tables
from plumbing.figures import save_figure
from plumbing.files import write_atomic
from plumbing.options import InputError, at_least, option, parse, positive, run
from plumbing.seeds import generator
from unet import timestep_embedding

MEANS = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # of SOURCE and TARGET; both covariances are I

METHODS = [("baseline", None, 1.0), ("faster baseline", None, 2.2), ("adversarial", None, 1.0), ("guided", "ten", 1.0), ("TAN", "ten", 1.0),
           ("guided", "bayes", 1.0), ("TAN", "bayes", 1.0)]             # classifier, factor on the learning rate: guidance lengthens the gradient by 2.2
STAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)            # iterations after which samples are drawn, and the last one
FEW = 3                                                         # iterations before Figures 2(b) and 2(c)
GAMMAS = (1, 20, 100)  # beside --gamma
ASCENTS = [(0.02, 0), *((omega, steps) for omega in (0.02, 0.1, 0.5) for steps in (10, 50))]  # no steps: plain noise
PICTURE = (0.1, 10)    # omega and J at which mixed timesteps give the paper's ellipse


@dataclasses.dataclass
class Options:
    draws: int = option(200, "independent draws of the ten shots")
    repeats: int = option(1000, "copies of the shots in one batch, each with its own noise (the paper's thousand)")
    timesteps: tuple[int, ...] = option((100, 300, 500, 700, 900), "where gradients are compared (0 to 999)")
    gamma: float = option(5.0, "strength of the guidance (Eq. 6)")
    omega: float = option(0.02, "rate of the gradient ascent (Eq. 8)")
    pgd_steps: int = option(10, "its steps J")
    iterations: int = option(256, "updates when adapting")
    learning_rate: float = option(0.02, "of plain gradient descent when adapting (Algorithm 1, line 9)")
    seed: int = option(0, "seed of everything random")
    quick: bool = option(False, "20 draws, 100 copies, 32 iterations, where nothing else is typed")
    output_dir: str = option("runs/toy2d", "where the results go (an earlier result there is replaced)")


class MLP(nn.Module):
    """E small networks side by side: x (B, E, 2), t (B,) -> (B, E, 2).  With E = 1 it serves any number of experiments."""

    def __init__(self, copies: int, width: int = 32):
        super().__init__()
        sizes = [2 + 16, width, width, 2]
        self.weights = nn.ParameterList(torch.randn(copies, i, o) / i ** 0.5 for i, o in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(copies, 1, o) for o in sizes[1:])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = timestep_embedding(t, 16)[:, None].expand(-1, x.shape[1], -1)     # (B,) -> (B, E, 16)
        h = torch.cat([x, e], dim=2).transpose(0, 1)                          # (E, B, 18)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            h = F.silu(h @ weight + bias)                                     # (E, B, width)
        return (h @ self.weights[-1] + self.biases[-1]).transpose(0, 1)       # (B, E, 2)

    def select(self, which: slice | list[int]) -> "MLP":
        """Copies of some of the networks; [0] * n makes n that begin as the first."""
        state = {key: value[which] for key, value in self.state_dict().items()}
        other = MLP(len(state["biases.0"]), self.weights[0].shape[2])
        other.load_state_dict(state)
        return other.requires_grad_(self.biases[0].requires_grad)


def optimal_predictor(schedule: Schedule, domain: int = SOURCE) -> Callable:
    """eps*(x_t, t) = E[eps | x_t] for a unit Gaussian."""
    def model(xt: Tensor, t: Tensor) -> Tensor:
        a = schedule.at(t, xt)
        return (1 - a).sqrt() * (xt - a.sqrt() * MEANS[domain].to(xt))
    return model


def bayes_classifier(schedule: Schedule) -> Callable:
    """log q(x_t | domain) up to a constant, as logits (B, 2, E), classes second."""
    def model(xt: Tensor, t: Tensor) -> Tensor:
        centres = schedule.at(t, xt)[..., None].sqrt() * MEANS                # (B, 1, 2 classes, 2)
        return -0.5 * (xt[:, :, None] - centres).square().sum(3).transpose(1, 2)
    return model


def draw_points(domain: int, n: int, experiments: int, g: torch.Generator) -> Tensor:
    """(n, experiments, 2) points of SOURCE or TARGET."""
    return MEANS[domain] + torch.randn(n, experiments, 2, generator=g)


def train(model: MLP, loss: Callable[[], Tensor], iterations: int, learning_rate: float, progress: tqdm) -> None:
    """Adam with a learning rate that falls to 0 by half a cosine; loss() is summed over the experiments."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(), decay.step()
        progress.update()


def pretrain(schedule: Schedule, iterations: int, seed: int, progress: tqdm) -> MLP:
    """A noise predictor of the source (Eq. 1)."""
    torch.manual_seed(seed)
    model, g = MLP(1), generator(seed, 1)

    def loss() -> Tensor:
        x0, eps = draw_points(SOURCE, 1024, 1, g), torch.randn(1024, 1, 2, generator=g)
        t = torch.randint(schedule.timesteps, (1024,), generator=g)
        return guided_loss(eps, predict_eps(model, schedule.add_noise(x0, t, eps), t), 0.0).mean()

    train(model, loss, iterations, 5e-3, progress)
    return model.requires_grad_(False)


def train_classifier(targets: Tensor, schedule: Schedule, iterations: int, seed: int, progress: tqdm) -> MLP:
    """E networks that tell the source from `targets` (N, E, 2) on noised points."""
    experiments = targets.shape[1]
    torch.manual_seed(seed + 1)
    model, g = MLP(1).select([0] * experiments), generator(seed, 2)
    labels = torch.tensor([SOURCE, TARGET]).repeat_interleave(32)[:, None].expand(-1, experiments)

    def loss() -> Tensor:
        x0 = torch.cat([draw_points(SOURCE, 32, experiments, g), targets[torch.randint(len(targets), (32,), generator=g)]])
        t = torch.randint(schedule.timesteps, (64,), generator=g)
        logits = model(schedule.add_noise(x0, t, torch.randn(x0.shape, generator=g)), t)
        return experiments * F.cross_entropy(logits.transpose(1, 2), labels)

    train(model, loss, iterations, 5e-3, progress)
    return model.requires_grad_(False)


def class_logits(model: MLP) -> Callable:
    """The classifier that log_prob_gradient expects, classes second: (B, E, 2), (B,) -> (B, 2, E)."""
    return lambda xt, t: model(xt, t).transpose(1, 2)


def output_gradient(model: Callable, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, classifier: Callable | None = None,
                    gamma: float = 5.0) -> Tensor:
    """Gradient (E, 2) of the loss (Eqs. 1, 6, 9) by the bias of the model's output layer."""
    xt = schedule.add_noise(x0, t, eps)
    bias = torch.zeros(x0.shape[1:], requires_grad=True)
    losses = guided_loss(eps, predict_eps(model, xt, t) + bias, similarity_guidance(classifier, schedule, xt, t, gamma))
    return torch.autograd.grad(losses.mean() * bias.numel(), bias)[0]  # guided_loss is a mean over E and coordinates; ||.||^2 is a sum


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Between vectors (..., 2), in degrees, 0 to 180."""
    cross = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
    return torch.atan2(cross.abs(), (u * v).sum(-1)).rad2deg()


def ellipse(eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of a cloud (B, E, 2): lengths (E, 2) of the half axes, short one first, and the direction (E, 2) of the long one."""
    variances, directions = torch.linalg.eigh(torch.einsum("bei,bej->eij", eps, eps) / len(eps))
    return variances.sqrt(), directions[..., 1]


def wasserstein(x: Tensor) -> tuple[Tensor, Tensor]:
    """From samples (N, E, 2): distance (E,) of the mean to the target's, and the 2-Wasserstein distance (E,) of the fitted Gaussian to the target.

    W_2^2 = |m - mu|^2 + tr(C + I - 2 C^(1/2)) for covariance C against I.
    """
    offset = (x.mean(0) - MEANS[TARGET]).norm(dim=1)
    axes, _ = ellipse(x - x.mean(0))
    return offset, (offset ** 2 + (axes - 1).square().sum(1)).sqrt()


def compare_gradients(model: Callable, classifiers: dict[str, Callable], shots: Tensor, schedule: Schedule, t: int, options: Options, repeats: int,
                      g: torch.Generator) -> dict[str, Tensor]:
    """Gradients (E, 2) by method at the first iteration, for shots (10, E, 2) repeated `repeats` times, all at the same t and from the same noise.

    "reference" has 10,000 different target points instead.  "norm only" normalises the noise and stops there, which shows what of
    "adversarial" is the ascent.  Under "worst" the worst-case noise (B, E, 2) itself.
    """
    x0, many = shots.repeat(repeats, 1, 1), draw_points(TARGET, 10_000, shots.shape[1], g)
    all_eps = torch.randn(max(len(many), len(x0)), *many.shape[1:], generator=g)
    eps, times = all_eps[:len(x0)], torch.full((len(x0),), t)
    worst, _ = worst_case_noise(model, schedule, x0, times, eps, options.pgd_steps, options.omega, dims=(0,))
    gradient = lambda noise, classifier=None: output_gradient(model, schedule, x0, times, noise, classifier, options.gamma)
    result = {"reference": output_gradient(model, schedule, many, torch.full((len(many),), t), all_eps[:len(many)]),
              "baseline": gradient(eps), "norm only": gradient(norm(eps, dims=(0,))), "adversarial": gradient(worst), "worst": worst}
    for name, classifier in classifiers.items():
        result[f"guided, {name}"], result[f"TAN, {name}"] = gradient(eps, classifier), gradient(worst, classifier)
    return result


def adapt(model: MLP, method: str, classifier: Callable | None, shots: Tensor, schedule: Schedule, options: Options,
          seed: int, progress: tqdm) -> Iterator[MLP]:
    """Fine-tune a copy of `model` for each draw of shots (10, E, 2), 40 points an iteration as in the paper; yields after each iteration."""
    experiments = shots.shape[1]
    model, g = model.select([0] * experiments).requires_grad_(True), generator(seed, 3)  # every method sees the same timesteps and noises
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate)  # Algorithm 1, line 9
    x0 = shots.repeat(4, 1, 1)
    for _ in range(options.iterations):
        t = torch.randint(schedule.timesteps, (len(x0),), generator=g)
        eps = torch.randn(x0.shape, generator=g)
        if method in ("adversarial", "TAN"):
            eps, _ = worst_case_noise(model, schedule, x0, t, eps, options.pgd_steps, options.omega, dims=(0,))
        xt = schedule.add_noise(x0, t, eps)
        losses = guided_loss(eps, predict_eps(model, xt, t), similarity_guidance(classifier, schedule, xt, t, options.gamma))
        optimizer.zero_grad()
        (experiments * losses.mean()).backward()
        optimizer.step()
        progress.update()
        yield model


def trajectories(model: MLP, schedule: Schedule, noise: Tensor) -> Tensor:
    """First coordinate along 100 DDIM steps from noise (N, 2), start included: (101, N)."""
    path = [noise[:, 0]]
    sample(model, schedule, (1, 2), range(len(noise)), 100, noise=noise[:, None], clip=False, batch_size=len(noise),
           on_step=lambda s, x: path.append(x[:, 0, 0].clone()))
    return torch.stack(path)


def measure_angles(model: Callable, classifiers: dict[str, Callable], shots: Tensor, schedule: Schedule, options: Options, seed: int,
                   progress: tqdm) -> list[tuple]:
    """(batch, t, method, angles (E,) to the reference): with the shots repeated and with one noise each; guided methods for several gamma.

    `classifiers` give the classifier of a slice of the draws.  The gradient is linear in gamma, so two of them give all.
    """
    rows = []
    for batch, repeats in (("repeated", options.repeats), ("one noise each", 1)):
        for t in options.timesteps:
            parts = []
            for first in range(0, shots.shape[1], 10):  # ten draws fit the processor's cache
                part = slice(first, first + 10)
                parts.append(compare_gradients(model, {name: of(part) for name, of in classifiers.items()}, shots[:, part], schedule, t, options,
                                               repeats, generator(seed, 4, repeats, t, first)))
                progress.update()
            found = {name: torch.cat([p[name] for p in parts]) for name in parts[0] if name != "worst"}
            reference = found.pop("reference")
            rows += [(batch, t, method, angle(gradient, reference)) for method, gradient in found.items()]
            for name in classifiers:
                slope = (found[f"guided, {name}"] - found["baseline"]) / options.gamma
                rows += [(batch, t, f"guided, {name}, gamma {gamma}", angle(found["baseline"] + gamma * slope, reference)) for gamma in GAMMAS]
    return rows


def measure_noise(model: Callable, predictor: str, shots: Tensor, schedule: Schedule, seed: int, progress: tqdm) -> list[tuple]:
    """(predictor, timesteps, omega, J, ratio (E,) of the axes, angle (E,) from the long axis to the gradient, 0 to 90, angle (E,) from the
    gradient to mu_S - mu_T's) of worst-case noise, a hundred points for each shot."""
    rows, x0 = [], shots.repeat(100, 1, 1)
    for name, t in (("100", 100), ("500", 500), ("mixed", None)):
        g = generator(seed, 5)
        times = torch.randint(schedule.timesteps, (len(x0),), generator=g) if t is None else torch.full((len(x0),), t)
        eps = torch.randn(x0.shape, generator=g)
        for omega, steps in ASCENTS:
            worst, _ = worst_case_noise(model, schedule, x0, times, eps, steps, omega, dims=(0,))
            axes, long = ellipse(worst)
            gradient = output_gradient(model, schedule, x0, times, worst)
            off = angle(long, gradient)
            rows.append((predictor, name, omega, steps, axes[:, 1] / axes[:, 0], torch.minimum(off, 180 - off),
                         angle(gradient, (MEANS[TARGET] - MEANS[SOURCE]).expand_as(gradient))))
            progress.update()
    return rows


def measure_adaptation(model: MLP, classifiers: dict[str, Callable], shots: Tensor, schedule: Schedule, options: Options, seed: int,
                       progress: tqdm) -> list[tuple]:
    """(method, iteration, error (E,) of the mean, W_2 (E,)) of what the adapted networks sample."""
    rows, n = [], 250
    noise = norm(torch.randn(n, shots.shape[1], 2, generator=generator(seed, 6)), dims=(0,))  # less sampling error
    for method, name, factor in METHODS:
        faster = dataclasses.replace(options, learning_rate=factor * options.learning_rate)
        classifier = name and classifiers[name](slice(None))
        for i, adapted in enumerate(adapt(model, method, classifier, shots, schedule, faster, seed, progress), start=1):
            if i in STAGES or i == options.iterations:
                x = sample(adapted, schedule, tuple(noise.shape[1:]), range(n), 25, noise=noise, clip=False, batch_size=n)
                rows.append((f"{method}, {name}" if name else method, i, *wasserstein(x)))
    return rows


def figure2a(axes: plt.Axes, model: Callable, classifiers: dict[str, Callable], shots: Tensor, schedule: Schedule, options: Options, seed: int) -> dict:
    """Figure 2(a) from one draw of shots (10, 1, 2) at the middle timestep; returns the angles."""
    t = sorted(options.timesteps)[len(options.timesteps) // 2]
    chosen = {name: classifiers[name](slice(0, 1)) for name in ("ten", "bayes")}
    found = compare_gradients(model, chosen, shots, schedule, t, options, options.repeats, generator(seed, 7))
    g, x0 = generator(seed, 11), shots.repeat(options.repeats, 1, 1)
    mixed, _ = worst_case_noise(model, schedule, x0, torch.randint(schedule.timesteps, (len(x0),), generator=g), torch.randn(x0.shape, generator=g),
                                PICTURE[1], PICTURE[0], dims=(0,))
    (half, long), (wide, wide_long) = ellipse(found["worst"]), ellipse(mixed)
    names = ("reference", "baseline", "guided, ten", "TAN, ten", "guided, bayes", "TAN, bayes")
    shown = dict(t=t, angles={name: angle(found[name], found["reference"]).item() for name in names[1:]}, axes_ratio=(half[0, 1] / half[0, 0]).item())
    draw_gradients(axes, shown, {name: found[name][0] for name in names}, found["worst"][:3000, 0],
                   [("its covariance, 2 s.d.", half[0], long[0], dict(color="darkred", linewidth=1.5)),
                    (f"mixed timesteps, omega {PICTURE[0]}", wide[0], wide_long[0], dict(color="black", linewidth=1.2, linestyle="--"))])
    return shown


def main() -> None:
    options, given = parse(Options, description=__doc__)
    if options.quick:
        options = dataclasses.replace(options, **{k: v for k, v in dict(draws=20, repeats=100, iterations=32).items() if k not in given})
    at_least(options, draws=1, repeats=1, iterations=FEW, pgd_steps=0, seed=0, omega=0)
    positive(options, "gamma", "learning_rate")
    schedule, seed, started = Schedule(), options.seed, time.time()
    if not options.timesteps or not all(0 <= t < schedule.timesteps for t in options.timesteps):
        raise InputError(f"--timesteps {' '.join(map(str, options.timesteps))}: give numbers from 0 to {schedule.timesteps - 1}")
    out = Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    gradients = 2 * len(options.timesteps) * -(-options.draws // 10)
    total = 2000 + 1000 + 1000 + gradients + 6 * len(ASCENTS) + len(METHODS) * options.iterations + 2 * FEW
    with tqdm(total=total, desc="pre-training", mininterval=0.5) as bar:
        model = pretrain(schedule, 2000, seed, bar)
        bar.set_description("classifiers")
        shots = draw_points(TARGET, 10, options.draws, generator(seed, 0))
        ten = train_classifier(shots, schedule, 1000, seed, bar)
        many = class_logits(train_classifier(draw_points(TARGET, 10_000, 1, generator(seed, 8)), schedule, 1000, seed, bar))
        classifiers = {"bayes": lambda part: bayes_classifier(schedule), "many": lambda part: many, "ten": lambda part: class_logits(ten.select(part))}
        bar.set_description("gradients")
        angles = measure_angles(model, classifiers, shots, schedule, options, seed, bar)
        bar.set_description("worst-case noise")
        noise = measure_noise(optimal_predictor(schedule), "exact", shots, schedule, seed, bar)
        noise += measure_noise(model, "trained", shots[:, :50], schedule, seed, bar)  # fifty draws, for time
        bar.set_description("adapting")
        adaptation = measure_adaptation(model, classifiers, shots, schedule, options, seed, bar)

        figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained", width_ratios=(1, 0.9, 0.9))
        shown = dict(gradients=figure2a(axes[0], model, classifiers, shots[:, :1], schedule, options, seed))
        start = torch.randn(20_000, 2, generator=generator(seed, 9))
        original = trajectories(model, schedule, start)
        few = dataclasses.replace(options, iterations=FEW)
        for ax, letter, method, name in ((axes[1], "b", "baseline", None), (axes[2], "c", "TAN", "ten")):
            for adapted in adapt(model, method, name and classifiers[name](slice(0, 1)), shots[:, :1], schedule, few, seed, bar):
                pass
            shown[method] = draw_trajectories(ax, f"({letter}) {method}, after {FEW} iterations", original, trajectories(adapted, schedule, start))
    save_figure(out / "figure2.png", figure)
    draw_measured(out / "measured.png", angles, adaptation)

    def error(domain: int, t: Tensor) -> float:
        """Root mean square difference of the trained predictor from the closed form."""
        g = generator(seed, 10)
        xt = schedule.add_noise(draw_points(domain, len(t), 1, g), t, torch.randn(len(t), 1, 2, generator=g))
        return (model(xt, t) - optimal_predictor(schedule)(xt, t)).square().mean().sqrt().item()

    errors = dict(source=error(SOURCE, torch.arange(schedule.timesteps).repeat_interleave(20)),
                  target={t: error(TARGET, torch.full((20_000,), t)) for t in sorted(options.timesteps)})
    results = dict(options=dataclasses.asdict(options), predictor_error=errors, figure2=shown, **summarise(angles, noise, adaptation),
                   seconds=round(time.time() - started, 1))
    text = tables(results)
    write_atomic(out / "results.json", lambda temporary: temporary.write_text(json.dumps(results, indent=1)))
    write_atomic(out / "tables.md", lambda temporary: temporary.write_text(text + "\n"))
    print(f"noise predictor, root mean square from the closed form (eps itself has 1): {errors['source']:.3f} on the source; on the target "
          + ", ".join(f"{value:.3f} at t = {t}" for t, value in errors["target"].items()) + f"\n\n{text}\n")
    for method in ("baseline", "TAN"):
        print(f"Figure 2, {method} after {FEW} iterations: first coordinate {shown[method]['mean']:.2f} ± {shown[method]['std']:.2f} (target -1 ± 1), "
              f"peak density {shown[method]['peak_density']:.2f} (target 0.40), from the original's trajectory {shown[method]['gap']:.2f} ± "
              f"{shown[method]['gap_std']:.2f} at the end (target -2 ± 0)")
    print(f"\n{options.draws} draws of ten shots, seed {seed}, {results['seconds']:.0f} s; {out}/figure2.png, measured.png, results.json, tables.md")


if __name__ == "__main__":
    run(main)
