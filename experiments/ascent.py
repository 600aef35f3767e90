"""How many steps the ascent of Eq. 8 needs: fewer steps of a larger rate, at the same product J omega.

  python -m experiments.ascent toyfaces --target sunglasses          a minute
  python -m experiments.ascent runs/sunglasses                       on what a run has adapted
  python -m experiments.ascent ffhq_p2.pt --target photos/ --device cuda

Every J starts from the same pictures, timesteps and noises, with omega = reach / J.  In each quarter of the
timesteps the table compares the perturbation eps^J - eps with that of the most steps:

  cosine     between the two, mean over the noised pictures
  length     over the length of that of the most steps
  moves      length over the length of the noise
  loss       || eps^J - eps_theta ||^2 over || eps - eps_theta ||^2
  rise       how much of the rise of the loss at the most steps is reached

The last line says which flags of train_tan.py the table supports.  It holds for this network and these
pictures; a run that has adapted to them shows whether it still does in the end.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import domains
import settings
from adversarial_noise import denoising_loss, norm, worst_case_noise
from checkpoints import run_folder
from checkpoints.load import need_diffusion_model
from checkpoints.network import Network
from ddpm import Model, Schedule
from plumbing import distributed
from plumbing.markdown import markdown
from plumbing.options import InputError, Positional, Unset, at_least, check_seed, parse, positive, run
from plumbing.progress import bar
from plumbing.seeds import generator

CLOSE = 0.98     # the cosine from which two perturbations count as the same
MATTERS = 0.005  # the share of the noise's length below which a perturbation does not count


@dataclasses.dataclass
class Options:
    model: Positional[str]
    """Folder of a run, built-in source, file of weights or folder of diffusers."""
    target: Unset[str] = None
    """Built-in target or folder of pictures (default: that of the run; a drawn source's first one)."""
    arch: Unset[str] = None
    """Network of a published file that does not show it: see python -m checkpoints, or a JSON file."""
    reach: float = 0.2
    """The product J omega; the paper's is 10 x 0.02."""
    steps: tuple[int, ...] = (1, 2, 3, 5, 10)
    """The J that are compared with the largest of them."""
    norm: Unset[Literal["paper", "own"]] = None
    """What Norm gives a noise, as in train_tan.py (default: what the run has, or what suits the source)."""
    n: int = 40
    """Noised pictures in each quarter of the timesteps."""
    batch_size: int = 10
    """Pictures at once on the device."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclasses.dataclass
class Row:
    """J steps in one quarter of the timesteps; the columns of the module's docstring."""

    timesteps: str
    steps: int
    cosine: float
    length: float
    moves: float
    loss: float
    rise: float


def ascend(model: Model, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, steps: list[int],
           reach: float, own: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The ascent from eps for each J of `steps`, with omega = reach / J.

    x0, eps (B, ...), t (B,) -> perturbations eps^J - eps (J, B, D), losses at eps (B,) and at eps^J (J, B)
    """
    worst = [worst_case_noise(model, schedule, x0, t, eps, J, reach / J, own=own)[0] for J in steps]
    with torch.no_grad():
        before = denoising_loss(model, schedule, x0, t, eps)
        after = torch.stack([denoising_loss(model, schedule, x0, t, noise) for noise in worst])
    return torch.stack([(noise - eps).flatten(1) for noise in worst]), before, after


def compare(timesteps: str, steps: list[int], eps: Tensor, perturbations: Tensor, before: Tensor,
            after: Tensor) -> list[Row]:
    """A row for each J of what `ascend` gives in one quarter, against the last J; eps is (B, ...)."""
    cosines = F.cosine_similarity(perturbations, perturbations[-1:], dim=2).mean(1)  # (J, B, D) -> (J,)
    lengths = perturbations.norm(dim=2).mean(1)                                      # -> (J,)
    moves = lengths / eps.flatten(1).norm(dim=1).mean()
    losses = after.sum(1) / before.sum()                                             # (J, B) -> (J,)
    columns = (cosines, lengths / lengths[-1], moves, losses, (losses - 1) / (losses[-1] - 1))
    return [Row(timesteps, J, *numbers) for J, numbers in zip(steps, torch.stack(columns, 1).tolist())]


def measure(network: Network, pictures: Tensor, options: Options, own: bool,
            device: torch.device) -> list[Row]:
    """The rows of all quarters, on pictures (N, 3, H, W) of the target, which take turns."""
    steps, T = sorted(set(options.steps)), network.schedule.timesteps
    x0s, rows = network.encode(pictures.to(device)), []
    passes = bar(None, "ascents", total=4 * len(range(0, options.n, options.batch_size)))
    for quarter in range(4):
        first, end = quarter * T // 4, (quarter + 1) * T // 4
        i = torch.arange(options.n)
        x0 = x0s[(i % len(x0s)).to(device)]
        t = (first + (end - first) * i // options.n).to(device)
        eps = torch.randn(x0.shape, generator=generator(options.seed, quarter)).to(device)
        if not own:
            # As printed, Norm takes the mean out of a drawn noise at the first step, whatever omega is.
            # Without it from the start, what is compared is the ascent alone.
            eps = norm(eps)
        found = []
        for part in zip(*(values.split(options.batch_size) for values in (x0, t, eps))):
            with distributed.autocast(device, options.precision):
                found.append(ascend(network.model, network.schedule, *part, steps, options.reach, own))
            passes.update()
        perturbations, before, after = zip(*found)
        rows += compare(f"{first} to {end - 1}", steps, eps, torch.cat(perturbations, 1), torch.cat(before),
                        torch.cat(after, 1))
    passes.close()
    return rows


def matter(rows: list[Row]) -> set[str]:
    """The quarters in which the most steps move the noise by at least MATTERS."""
    most = max(row.steps for row in rows)
    return {row.timesteps for row in rows if row.steps == most and row.moves >= MATTERS}


def fewest_steps(rows: list[Row]) -> int | None:
    """The smallest J whose cosine is at least CLOSE in each quarter that matters; None if no quarter does."""
    quarters, steps = matter(rows), {row.steps for row in rows}
    far = {row.steps for row in rows if row.timesteps in quarters and row.cosine < CLOSE}
    return min(steps - far | {max(steps)}) if quarters else None


def conclusion(rows: list[Row], reach: float) -> str:
    """What the table supports, in one sentence."""
    most, fewest = max(row.steps for row in rows), fewest_steps(rows)
    if fewest is None:
        return (f"With J omega = {reach:g} the ascent moves the noise by less than {MATTERS:.1%} everywhere: "
                "too little to tell the J apart; a larger --reach would.")
    flags = f"--pgd-steps {fewest} --omega {reach / fewest:.3g}"
    where = f"in every quarter where the noise moves by {MATTERS:.1%} or more"
    if fewest == most:
        return f"{flags}: no fewer steps have a cosine of {CLOSE} with {most} {where}."
    rise = min(row.rise for row in rows if row.steps == fewest and row.timesteps in matter(rows))
    return (f"{flags}: {where} the cosine with {most} steps is at least {CLOSE}, the rise of the loss is at "
            f"least {rise:.0%} of theirs, and an iteration takes {fewest + 1} passes through the network "
            f"instead of {most + 1}.")


def table(rows: list[Row], title: str, reach: float) -> str:
    """The rows as Markdown."""
    head = ["timesteps t", "J", "omega", "cosine", "length", "moves", "loss", "rise"]
    cells = [[row.timesteps, f"{row.steps}", f"{reach / row.steps:.3g}", f"{row.cosine:.4f}",
              f"{row.length:.3f}", f"{row.moves:.2%}", f"x {row.loss:.3f}", f"{row.rise:.1%}"]
             for row in rows]
    return markdown(title, head, cells)


def target_of(options: Options, of_run: dict | None) -> str:
    """--target, or what it is if not given; InputError where nothing says so."""
    if options.target or of_run:
        return options.target or of_run["target"]
    if drawn := domains.drawn_by(options.model):
        return domains.family(drawn)[1]
    raise InputError(f"--target: say to which pictures {options.model} is to be adapted; a folder, or one of "
                     f"{', '.join(domains.TARGETS)}")


def main() -> None:
    options, _ = parse(Options, __doc__)
    device = distributed.setup_alone(options.device, "experiments.ascent")
    at_least(options, steps=1, n=1, batch_size=1)
    positive(options, "reach")
    check_seed(options)
    if len(set(options.steps)) < 2:
        raise InputError(f"--steps {' '.join(map(str, options.steps))}: give at least two to compare")
    network, of_run = run_folder.load_model(options.model, options.arch)
    network = need_diffusion_model(network, options.model)
    target = target_of(options, of_run)
    of_target = of_run if of_run and target == of_run["target"] else {}
    pictures, _ = domains.training_images(target, network.image_size, of_target.get("hold_out", 0),
                                          of_target.get("recursive", False))
    usual = settings.suited(settings.Options(target=target, method="tan"), network).adversarial_noise.norm
    uses = settings.METHODS.get(of_run["method"]) if of_run else None
    default = of_run.get("norm", "paper") if uses and uses.adversarial_noise else usual
    chosen = options.norm or default
    network.to(device).model.requires_grad_(False)
    rows = measure(network, pictures, options, chosen == "own", device)
    title = (f"{options.model} on {len(pictures)} pictures of {target}: J omega = {options.reach:g}, "
             f"norm {chosen}, {options.n} noises a quarter, seed {options.seed}, {options.precision}")
    print(f"{table(rows, title, options.reach)}\n\n{conclusion(rows, options.reach)}")


if __name__ == "__main__":
    run(main)
