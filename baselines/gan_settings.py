"""The options of gan_transfer.py: which method uses what, what suits small and published sources."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import domains
from baselines import gan_methods
from baselines.gan_training import check_groups
from checkpoints.gan import GAN
from checkpoints.load import title_of
from plumbing.options import (
    InputError,
    Unset,
    at_least,
    below,
    check_seed,
    flag,
    flat,
    positive,
    replace,
)
from plumbing.picture_folder import name_of
from plumbing.shell import command

# What suits published networks, and the small ones of assets/ instead; these were chosen on babies.
PUBLISHED = dict(iterations=5000, batch_size=4, r1=10.0, freeze_blocks=3, ewc_weight=5e8, cdc_weight=1000.0)
SMALL = dict(iterations=450, batch_size=16, r1=1.0, freeze_blocks=1, ewc_weight=300.0, cdc_weight=10.0)


@dataclasses.dataclass
class Options:
    """A run of gan_transfer.py."""

    method: Annotated[Literal[tuple(gan_methods.METHODS)], tyro.conf.arg(
        help="; ".join(f"{name}: {uses.text}" for name, uses in gan_methods.METHODS.items()) + ".",
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
    """Steps of discriminator and generator (default: 450; above 64 pixels 5000)."""
    batch_size: Unset[int] = None
    """Pictures a step (default: 16; above 64 pixels 4)."""
    learning_rate: float = 2e-3
    """Of Adam, for both networks."""
    r1: Unset[float] = None
    """Weight of the R1 penalty (default: 1; above 64 pixels 10)."""
    r1_every: int = 16
    """Iterations between its computations."""
    path_length: float = 0.0
    """Weight of the path length penalty; 0: none."""
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
    numbers: gan_methods.Numbers = dataclasses.field(default_factory=gan_methods.Numbers)


def folder_of(options: Options) -> Path:
    """--output-dir, or by default runs/TARGET-METHOD, with -SOURCE where that is unusual."""
    if options.output_dir:
        return Path(options.output_dir)
    unusual = options.source not in (None, usual_source(options.target))
    source = f"-{title_of(options.source)}" if unusual else ""
    return Path("runs") / f"{name_of(options.target)}{source}-{options.method}"


def usual_source(target: str) -> str:
    """The built-in source of a target."""
    return domains.TARGETS.get(target, "toyfaces") + "-stylegan2"


def used_by(method: str) -> frozenset[str]:
    """The names of the options that a method uses."""
    others = {name for other, uses in gan_methods.METHODS.items() if other != method for name in uses.options}
    return frozenset(flat(Options()).keys() - others)


def check(options: Options, typed: frozenset[str], source: GAN) -> None:
    """InputError for numbers that make no sense, for flags that the method does not use, and for a target of
    another source.
    """
    for name in sorted(typed - used_by(options.method)):
        user = next(method for method, uses in gan_methods.METHODS.items() if name in uses.options)
        raise InputError(f"{flag(name)}: --method {options.method} does not use it, only {user}; leave it "
                         "out")
    at_least(options, iterations=0, batch_size=2, r1=0, r1_every=1, path_length=0,
             ema=0, samples=0, previews=1, save_every=1, ada_images=1, freeze_blocks=0, ewc_weight=0,
             fisher_samples=1, cdc_weight=0, anchor_spread=0, patch_block=0, dcl_weights=0, ada_target=-1)
    below(options, ema=1, ada_target=1, patch_block=len(source.discriminator.convs),
          freeze_blocks=len(source.discriminator.convs))
    positive(options, "learning_rate")
    check_seed(options)
    check_groups(options.batch_size, gan_methods.whole if options.method == "cdc" else int)
    if options.method == "cdc" and options.batch_size < 3:
        raise InputError(f"--batch-size {options.batch_size}: cdc judges some pictures whole and the rest in "
                         "patches; give at least 3")
    if len(options.numbers.dcl_weights) != 2:
        raise InputError("--dcl-weights: give two numbers of at least 0")
    domains.check_pair(options.source, options.target)
    domains.keep_apart(folder_of(options), options.target, options.recursive)


def suited(options: Options, source: GAN) -> Options:
    """The options with a number for each that is None."""
    suits = SMALL if source.small else PUBLISHED
    return replace(options, **{name: value for name, value in suits.items() if flat(options)[name] is None})


def command_of(options: Options) -> str:
    """The command that makes this run again, quoted for the shell."""
    names = used_by(options.method) - {"resume", "overwrite"}
    return command("python -m baselines.gan_transfer", options, names)
