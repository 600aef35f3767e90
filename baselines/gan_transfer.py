"""The paper's GAN baselines: adapt a pre-trained StyleGAN2 to a new domain from ten pictures.

  python -m baselines.gan_transfer --method cdc --target sunglasses       built-in faces; minutes on a laptop
  python -m baselines.gan_transfer --method cdc --source source_ffhq.pt --target photos/ --batch-size 4
                                                                          CDC's published source
  python -m baselines.gan_transfer --method cdc --target sunglasses --resume

Leaves in runs/TARGET-METHOD/ what train_tan.py leaves of a run, and sample.py and evaluate.py take it as one:
samples.png has the source's pictures above the adapted ones of the same latents, progress.png the same
latents at several iterations, report.html all of it.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import domains
from baselines import gan_methods
from baselines.gan_training import Players, play
from checkpoints import run_folder
from checkpoints.gan import GAN
from checkpoints.load import load_gan, title_of
from checkpoints.run_report import Report
from plumbing import distributed
from plumbing.options import (
    InputError,
    Unset,
    at_least,
    below,
    check_seed,
    command,
    flag,
    flat,
    parse,
    positive,
    replace,
    run,
)
from plumbing.training import EMA, Loop

# Which options each method uses, of those that others do not.
USES = {"ada": ("ada_target", "ada_images"), "freezed": ("freeze_blocks",),
        "ewc": ("ewc_weight", "fisher_samples"), "cdc": ("cdc_weight", "anchor_spread", "patch_block"),
        "dcl": ("dcl_weights",)}
# What suits published networks, and the small ones of assets/ instead; these were chosen on babies.
PUBLISHED = dict(iterations=5000, batch_size=4, learning_rate=2e-3, r1=10.0)
SMALL = dict(iterations=300, batch_size=16, learning_rate=2e-3, r1=0.05)


@dataclasses.dataclass
class Options:
    """A run of gan_transfer.py."""

    method: Annotated[Literal[tuple(gan_methods.METHODS)], tyro.conf.arg(
        help="; ".join(f"{name}: {text}" for name, text in gan_methods.METHODS.items()) + ".",
    )] = "cdc"
    target: str = "sunglasses"
    """Built-in target, or a folder of pictures."""
    recursive: bool = False
    """Take the pictures in subfolders of --target, too."""
    source: Unset[str] = None
    """toyfaces-stylegan2, toychurches-stylegan2 or a file of weights (default: that of a built-in target,
    else toyfaces-stylegan2)."""
    output_dir: Unset[str] = None
    """Where the run goes (default: runs/TARGET-METHOD, with -SOURCE before it for an unusual one)."""
    resume: bool = False
    """Continue the run in --output-dir; its own options hold."""
    overwrite: bool = False
    """Replace the run in --output-dir."""
    iterations: Unset[int] = None
    """Steps of discriminator and generator (default: 300; above 64 pixels 5000)."""
    batch_size: Unset[int] = None
    """Pictures a step (default: 16; above 64 pixels 4)."""
    learning_rate: Unset[float] = None
    """Of Adam, for both networks (default: 2e-3)."""
    r1: Unset[float] = None
    """Weight of the R1 penalty (default: 0.05; above 64 pixels 10)."""
    r1_every: int = 16
    """Iterations between its computations."""
    path_length: float = 0.0
    """Weight of the path length penalty (2 in Karras et al. 2020b; 0: none)."""
    ema: float = 0.99
    """Decay of the running average of the generator's weights, which is what is kept."""
    flip: bool = True
    """Mirror half of the training pictures."""
    samples: int = 32
    """Pairs in samples.png; 0: no pictures."""
    previews: int = 5
    """Rows of progress.png after the first, and stages that are kept."""
    save_every: int = 100
    """Iterations between checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    wanted: gan_methods.Wanted = dataclasses.field(default_factory=gan_methods.Wanted)


def folder_of(options: Options) -> Path:
    """--output-dir, or by default runs/TARGET-METHOD, with -SOURCE where that is unusual."""
    if options.output_dir:
        return Path(options.output_dir)
    unusual = options.source not in (None, usual_source(options.target))
    source = f"-{title_of(options.source)}" if unusual else ""
    return Path("runs") / f"{Path(options.target).resolve().name}{source}-{options.method}"


def usual_source(target: str) -> str:
    """The built-in source of a target."""
    return domains.TARGETS.get(target, "toyfaces") + "-stylegan2"


def used_by(method: str) -> set[str]:
    """The names of the options that say how a run with this method goes."""
    others = {name for other, names in USES.items() if other != method for name in names}
    return flat(Options()).keys() - others - {"resume", "overwrite"}


def check(options: Options, typed: frozenset[str], source: GAN) -> None:
    """InputError for numbers that make no sense, for flags that the method does not use, and for a target of
    another source.
    """
    for method, names in USES.items():
        for name in sorted(typed & set(names)):
            if method != options.method:
                raise InputError(f"{flag(name)}: --method {options.method} does not use it, only {method}; "
                                 "leave it out")
    at_least(options, iterations=0, batch_size=2, r1=0, r1_every=1, path_length=0, ema=0, samples=0,
             previews=1, save_every=1, ada_images=1, freeze_blocks=0, ewc_weight=0, fisher_samples=1,
             cdc_weight=0, anchor_spread=0, patch_block=0, dcl_weights=0)
    below(options, ema=1, patch_block=len(source.discriminator.convs),
          freeze_blocks=len(source.discriminator.convs) + 1)
    positive(options, "learning_rate")
    check_seed(options)
    if len(options.wanted.dcl_weights) != 2:
        raise InputError("--dcl-weights: give two numbers of at least 0")
    drawn_by, drawn_for = domains.drawn_by(options.source), domains.TARGETS.get(options.target)
    if drawn_by and drawn_for and drawn_for != drawn_by:
        raise InputError(f"--target {options.target}: a target of {drawn_for}, not of {drawn_by}; leave "
                         f"--source out, or choose among {', '.join(domains.family(drawn_by)[1:])}")


def suited(options: Options, source: GAN) -> Options:
    """The options with a number for each that is None."""
    suits = SMALL if source.image_size <= 64 else PUBLISHED
    return replace(options, **{name: value for name, value in suits.items() if flat(options)[name] is None})


def main() -> None:
    options, typed = parse(Options, __doc__)
    device = distributed.setup(options.device)
    if distributed.world() > 1:
        raise InputError("gan_transfer: works in one process; start it without torchrun")

    # What is adapted, to what, with which numbers.
    out = folder_of(options)
    if options.resume:
        options = run_folder.resumed(out, options, typed)
    elif options.source is None:
        options = replace(options, source=usual_source(options.target))
    source = load_gan(options.source)
    options = suited(options, source)
    check(options, typed, source)
    targets = domains.target_images(options.target, source.image_size, options.recursive)
    identity = run_folder.identity(source, targets, None)
    state = run_folder.open_run(out, flat(options), identity)

    # Who learns, and what the method adds
    torch.manual_seed(options.seed)
    source.to(device)
    method = gan_methods.make(options.method, source.model, source.discriminator, len(targets),
                              options.wanted, options.seed)
    players = Players(source.model, source.discriminator, method, options.learning_rate, options.r1,
                      options.r1_every, options.path_length)
    ema = EMA(players.drawing, options.ema)
    if state:
        players.load(state["gan"])
    learning, theirs = (sum(p.numel() for p in group) for group in (players.drawing, players.judging))
    print(f"source {options.source}: {source.image_size}x{source.image_size}; training the generator "
          f"({learning / 1e6:.2f} M parameters) and {theirs / 1e6:.2f} M of the discriminator with "
          f"{options.method} on {len(targets)} pictures of {options.target}; {device}", flush=True)

    def real_pictures(g: torch.Generator) -> Tensor:
        chosen = targets[torch.randint(len(targets), (options.batch_size,), generator=g)]
        mirrored = torch.rand(options.batch_size, 1, 1, 1, generator=g) < (0.5 if options.flip else 0)
        return torch.where(mirrored, chosen.flip(3), chosen)

    report = Report(out, flat(options), source, identity["source"], targets, targets[:0], ema, device,
                    command("python -m baselines.gan_transfer", options, used_by(options.method)))
    loop = Loop(out, options.method, options.iterations, options.save_every, options.batch_size,
                players.parameters, players.optimizer, ema, lambda iteration: options.learning_rate, device,
                state, dict(identity, gan=players.state), report.preview)
    play(loop, players, ema, real_pictures, options.batch_size, options.seed, device)
    report.finish("of the generator")


if __name__ == "__main__":
    run(main)
