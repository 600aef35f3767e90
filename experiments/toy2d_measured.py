"""The claims of section 5.1 in two dimensions, measured from every side; toy2d.py prints the gist.

  python -m experiments.toy2d_measured            four minutes
  python -m experiments.toy2d_measured --quick    the same from fewer repetitions, in twenty seconds

 - the angle of the first gradient to that of 10,000 samples: ten shots repeated, and with one noise each;
   classifiers that are exact (bayes), trained on 10,000 target points (many) or on the ten shots (ten);
   several gamma
 - the shape of the worst-case noise: exact and trained predictor, equal and mixed timesteps, several omega, J
 - the 2-Wasserstein distance to the target while adapting

Writes measured.png, tables.md and measured.json to runs/toy2d/.  gaussians.py derives what to expect.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gaussians
from adversarial_noise import norm, worst_case_noise
from classifier import SOURCE, TARGET
from ddpm import Model
from experiments.toy2d_report import draw_measured, summarise, tables
from gaussians import MEANS, MLP, SCHEDULE, angle, draw_points, output_gradient
from plumbing import options as flags
from plumbing.files import write_text
from plumbing.progress import bar
from plumbing.seeds import generator

GAMMAS = (1, 20, 100)  # beside --gamma
ASCENTS = ((0.02, 0), *((omega, steps) for omega in (0.02, 0.1, 0.5) for steps in (10, 50)))  # omega, J
STAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)  # iterations after which samples are drawn, and the last
METHODS = {  # classifier, adversarial noise, factor on the learning rate
    "baseline": (None, False, 1.0),
    "faster baseline": (None, False, 2.2),  # guidance lengthens the gradient by 2.2
    "adversarial": (None, True, 1.0),
    "guided, ten": ("ten", False, 1.0),
    "TAN, ten": ("ten", True, 1.0),
    "guided, bayes": ("bayes", False, 1.0),
    "TAN, bayes": ("bayes", True, 1.0),
}

Classifiers = Callable[[slice], dict[str, Model]]  # of some of the draws, by name


@dataclasses.dataclass
class Options:
    draws: int = 200
    """Independent draws of the ten shots."""
    repeats: int = 1000
    """Copies of the shots in one batch, each with its own noise (the paper's thousand)."""
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    """Where gradients are compared (0 to 999)."""
    gamma: float = 5.0
    """Strength of the guidance (Eq. 6)."""
    omega: float = 0.02
    """Rate of the gradient ascent (Eq. 8)."""
    pgd_steps: int = 10
    """Its steps J."""
    iterations: int = 256
    """Updates when adapting."""
    learning_rate: float = 0.02
    """Of plain gradient descent when adapting; twice the eta of Algorithm 1, line 9 (toy2d.py)."""
    seed: int = 0
    """Seed of everything random."""
    quick: bool = False
    """20 draws, 100 copies, 32 iterations, where nothing else is typed."""
    output_dir: str = "runs/toy2d"
    """Where the results go (an earlier result there is replaced)."""


def measure_angles(options: Options, model: Model, classifiers: Classifiers, shots: Tensor) -> list[dict]:
    """A row for each batch, timestep and method: the angles (E,) to the gradient of 10,000 samples.

    The gradient is linear in gamma, so two of them give all.
    """
    rows, batches = [], (("repeated", options.repeats), ("one noise each", 1))
    for batch, repeats, t in bar([(*batch, t) for batch in batches for t in options.timesteps], "gradients"):
        parts = []
        for first in range(0, options.draws, 10):  # ten draws fit the processor's cache
            part, g = slice(first, first + 10), generator(options.seed, 4, repeats, t, first)
            parts.append(gaussians.compare_gradients(model, classifiers(part), shots[:, part], t, repeats, g,
                                                     options.gamma, options.omega, options.pgd_steps))
            del parts[-1]["worst"]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        reference, baseline = found.pop("reference"), found["baseline"]
        for name in classifiers(slice(0, 1)):
            slope = (found[f"guided, {name}"] - baseline) / options.gamma
            found |= {f"guided, {name}, gamma {gamma}": baseline + gamma * slope for gamma in GAMMAS}
        rows += [dict(batch=batch, t=t, method=method, angle=angle(gradient, reference))
                 for method, gradient in found.items()]
    return rows


def measure_noise(model: Model, predictor: str, shots: Tensor, seed: int) -> list[dict]:
    """A row for each choice of timesteps, omega and J, of a hundred points of worst-case noise for each shot.

    ratio     (E,) of the axes, long to short
    off       (E,) angle between the long axis and the line of the gradient, 0 to 90
    away      (E,) angle between the gradient and mu_T - mu_S
    """
    rows, x0, difference = [], shots.repeat(100, 1, 1), MEANS[TARGET] - MEANS[SOURCE]
    for name in ("100", "500", "mixed"):
        g = generator(seed, 5)
        if name == "mixed":
            t = torch.randint(SCHEDULE.timesteps, (len(x0),), generator=g)
        else:
            t = torch.full((len(x0),), int(name))
        eps = torch.randn(x0.shape, generator=g)
        for omega, steps in bar(ASCENTS, f"noise, {predictor} predictor, t = {name}"):
            worst, _ = worst_case_noise(model, SCHEDULE, x0, t, eps, steps, omega, dims=(0,))
            half, long = gaussians.ellipse(worst)
            gradient = output_gradient(model, x0, t, worst)
            off, away = angle(long, gradient), angle(gradient, difference.expand_as(gradient))
            rows.append(dict(predictor=predictor, t=name, omega=omega, steps=steps,
                             ratio=half[:, 1] / half[:, 0], off=torch.minimum(off, 180 - off), away=away))
    return rows


def measure_adaptation(options: Options, model: MLP, classifiers: Classifiers, shots: Tensor) -> list[dict]:
    """A row for each method and stage: error (E,) of the samples' mean, their W_2 (E,) to the target."""
    rows, known = [], classifiers(slice(None))
    noise = torch.randn(250, options.draws, 2, generator=generator(options.seed, 6))
    noise = norm(noise, dims=(0,))  # less sampling error
    for method, (name, adversarial, factor) in METHODS.items():
        g = generator(options.seed, 3)  # every method sees the same timesteps and noises
        networks = gaussians.adapt(model, shots, g, known.get(name), options.gamma, options.omega,
                                   options.pgd_steps if adversarial else 0, factor * options.learning_rate,
                                   options.iterations, functools.partial(bar, text=method))
        for i, adapted in enumerate(networks, start=1):
            if i in (*STAGES, options.iterations):
                x = gaussians.trajectories(adapted, noise, 25)[-1]
                error = (x.mean(0) - MEANS[TARGET]).norm(dim=1)
                rows.append(dict(method=method, iteration=i, error=error, w2=gaussians.wasserstein(x)))
    return rows


def predictor_error(model: MLP, domain: int, t: Tensor, seed: int) -> float:
    """Root mean square difference of the trained predictor from the closed form; eps itself has 1."""
    g = generator(seed, 10)
    xt = SCHEDULE.add_noise(draw_points(domain, len(t), 1, g), t, torch.randn(len(t), 1, 2, generator=g))
    return (model(xt, t) - gaussians.optimal_predictor(xt, t)).square().mean().sqrt().item()


def predictor_errors(model: MLP, times: list[int], seed: int) -> dict:
    """`predictor_error` on the source at all timesteps, and on the target at these."""
    everywhere = torch.arange(SCHEDULE.timesteps).repeat_interleave(20)
    return dict(source=predictor_error(model, SOURCE, everywhere, seed),
                target={t: predictor_error(model, TARGET, torch.full((20_000,), t), seed) for t in times})


def read_options() -> Options:
    options, typed = flags.parse(Options, __doc__)
    if options.quick:
        fewer = dict(draws=20, repeats=100, iterations=32)
        options = flags.replace(options, **{name: n for name, n in fewer.items() if name not in typed})
    flags.at_least(options, draws=1, repeats=1, timesteps=0, iterations=1, pgd_steps=0, omega=0)
    flags.below(options, timesteps=SCHEDULE.timesteps)
    flags.positive(options, "gamma", "learning_rate")
    flags.check_seed(options)
    if not options.timesteps:
        raise flags.InputError("--timesteps: give at least one")
    return flags.each_once(options, "timesteps")


def main() -> None:
    options, started = read_options(), time.perf_counter()
    seed, out = options.seed, Path(options.output_dir)
    out.mkdir(parents=True, exist_ok=True)

    # The source model, the ten shots of each draw, and the classifiers
    torch.manual_seed(seed)
    model = gaussians.pretrain(2000, generator(seed, 1), functools.partial(bar, text="pre-training"))
    shots = draw_points(TARGET, 10, options.draws, generator(seed, 0))
    trained = {}
    for name, points in (("many", draw_points(TARGET, 10_000, 1, generator(seed, 8))), ("ten", shots)):
        torch.manual_seed(seed + 1)
        progress = functools.partial(bar, text=f"classifier, {name}")
        trained[name] = gaussians.train_classifier(points, 1000, generator(seed, 2), progress)

    def classifiers(part: slice) -> dict[str, Model]:
        return {"bayes": gaussians.bayes_classifier, "many": trained["many"].class_logits,
                "ten": trained["ten"].select(part).class_logits}

    angles = measure_angles(options, model, classifiers, shots)
    noise = measure_noise(gaussians.optimal_predictor, "exact", shots, seed)
    noise += measure_noise(model, "trained", shots[:, :50], seed)  # fifty draws, for time
    adaptation = measure_adaptation(options, model, classifiers, shots)
    errors = predictor_errors(model, sorted(options.timesteps), seed)

    draw_measured(out / "measured.png", angles, adaptation)
    seconds = round(time.perf_counter() - started, 1)
    results = dict(options=flags.flat(options), predictor_error=errors,
                   **summarise(angles, noise, adaptation), seconds=seconds)
    text = tables(results)
    write_text(out / "measured.json", json.dumps(results, indent=1))
    write_text(out / "tables.md", text + "\n")
    on_target = ", ".join(f"{error:.3f} at t = {t}" for t, error in errors["target"].items())
    print(f"noise predictor, root mean square from the closed form (eps itself has 1): {errors['source']:.3f}"
          f" on the source; on the target {on_target}\n\n{text}\n\n{options.draws} draws of ten shots, "
          f"seed {seed}, {seconds:.0f} s; {out}/measured.png, tables.md, measured.json")


if __name__ == "__main__":
    flags.run(main)
