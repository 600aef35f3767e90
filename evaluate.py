"""Measure adapted models: the paper's figures on any folders, on the built-in domains what no photo shows.

  python evaluate.py runs/sunglasses
      a finished run from a built-in source to a built-in target: share of samples in the target, attributes
      kept, toy FID, toy Intra-LPIPS (domains/judge.py)
  python evaluate.py --samples runs/photos/drawn --target photos/
      any folders: Intra-LPIPS of the samples around the training pictures (of a small source also --size 32,
      or whatever size its samples have)
  python evaluate.py --samples DIR --target DIR --reference DIR
      and FID, KID to a larger set of pictures of the target domain

The paper's figures (section 5.2): 1,000 samples (sample.py -n 1000) at 256x256, LPIPS-VGG around the ten
training pictures, FID to 2,500 (sunglasses) and 2,700 (babies) pictures.  The weights of LPIPS's backbone and
of Inception are downloaded if --download allows it, else the message says which file to put where.  GAN
samples are scored the same way: only the folders matter.  python -m experiments.tables makes all tables and
figures of section 5.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from checkpoints.perceptual import inception_features, load_inception, load_lpips, lpips_features
from domains import judge
from metrics import frechet_distance, intra_lpips, kernel_distance
from plumbing import distributed
from plumbing.options import (
    InputError,
    Positional,
    Unset,
    at_least,
    check_seed,
    flag,
    flat,
    parse,
    run,
    short,
)
from plumbing.pictures import ImageFolder
from plumbing.progress import bar

COLUMNS = ("target", "kept", "covered", "toy FID", "toy KID", "toy Intra-LPIPS", "memorised")
FEW = 2048  # FID on fewer samples is unreliable


@dataclasses.dataclass
class Sampling:
    """What is drawn from runs."""

    n: Annotated[int, short("-n")] = 1000
    """Samples to draw from each run."""
    steps: int = 25
    """DDIM steps."""


@dataclasses.dataclass
class Folders:
    """Folders of pictures, instead of runs."""

    samples: Unset[str] = None
    """Folder of samples."""
    target: Unset[str] = None
    """Folder of the training pictures."""
    reference: Unset[str] = None
    """Folder of many other pictures of the target domain, for FID and KID."""
    size: int = 256
    """Pixels per side at which all pictures are compared; they are cropped to a square and scaled."""
    cluster_size: Unset[int] = None
    """Compare at most so many random members of a cluster, 50 in Ojha et al. 2021 (default: all)."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Backbone of LPIPS."""
    lpips_backbone: Unset[str] = None
    """Torchvision's weights for it: a file."""
    inception_weights: Unset[str] = None
    """Torch-fidelity's Inception weights: a file."""
    download: bool = False
    """Fetch missing weights from their publishers."""
    seed: int = 0
    """Of the random members that --cluster-size compares."""


@dataclasses.dataclass
class Options:
    runs: Positional[Unset[tuple[str, ...]]] = None
    """Folders of finished runs from a built-in source to a built-in target."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or mps."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    folders: Folders = dataclasses.field(default_factory=Folders)


def score_runs(folders: tuple[str, ...], n: int, steps: int, device: torch.device) -> None:
    """Prints a table of toy figures, a row for each run."""
    print("| run | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for folder in map(Path, folders):
        figures = judge.score_run(folder, n, steps, device)["score"]
        print(f"| {folder} | " + " | ".join(f"{figures[name]:.2f}" for name in COLUMNS) + " |", flush=True)
    print(f"""
{n} samples of each, DDIM in {steps} steps. target: share in the target domain; kept: share of attributes as
in the source model's sample from the same noise ({min(n, judge.PAIRED)} pairs); covered: share of attribute
values that appear; toy FID and toy KID (times 1000): distance to fresh target pictures, lower is better; toy
Intra-LPIPS: higher is more diverse; memorised: distance to the nearest training picture or its mirror image
over that of fresh target pictures, far below 1 are copies""")


def score_folders(options: Folders, device: torch.device) -> None:
    """Prints the paper's figures for a folder of samples."""
    for name in ("samples", "target"):
        if getattr(options, name) is None:
            raise InputError(f"--{name}: missing; --samples and --target go together")
    samples, targets = ImageFolder(options.samples, options.size), ImageFolder(options.target, options.size)
    reference = ImageFolder(options.reference, options.size) if options.reference else None
    if reference and len(reference) < 2:
        raise InputError(f"--reference {options.reference}: has one picture; FID and KID need at least two")
    warn_of_old(Path(options.samples))

    lpips = load_lpips(options.lpips_net, options.lpips_backbone, options.download).to(device)
    inception = load_inception(options.inception_weights, options.download).to(device) if reference else None
    embed = functools.partial(lpips_features, lpips)
    check_memory(options, embed, targets, device)
    try:
        found = intra_lpips(embed, samples, targets, options.cluster_size, options.seed,
                            progress=functools.partial(bar, text="Intra-LPIPS"))
    except ValueError as error:
        raise InputError(f"--samples {options.samples}: {error}") from None
    print(f"Intra-LPIPS ({options.lpips_net}, {options.size}x{options.size}, {len(samples)} samples): "
          f"{found.mean:.3f} ± {found.std:.3f} over {len(targets) - found.dropped} clusters, "
          f"{found.dropped} dropped; sizes {' '.join(map(str, found.sizes))}")

    if reference:
        features = functools.partial(inception_features, inception,
                                     progress=functools.partial(bar, text="Inception"))
        x, y = features(samples), features(reference)
        print(f"FID {frechet_distance(x, y):.2f}, KID {kernel_distance(x, y):.5f}: "
              f"{len(x)} samples against {len(y)} pictures")
        if min(len(x), len(y)) < FEW:
            print(f"warning: FID on fewer than {FEW} pictures is too high and compares only with FID on as "
                  "many; KID does not have that fault")


def warn_of_old(samples: Path) -> None:
    """Says so if samples beside a run were drawn before its weights were written."""
    weights = samples.parent / "weights.safetensors"
    drawn = min((file.stat().st_mtime for file in samples.glob("*.png")), default=math.inf)
    if weights.exists() and drawn < weights.stat().st_mtime:
        print(f"warning: {samples} has pictures older than {weights}; if the run went on after they were "
              "drawn, draw them again with sample.py")


def memory(device: torch.device) -> float:
    """The bytes of memory that a device has; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # a system without it, or without these names
        return math.inf
    return pages * size if pages > 0 else math.inf


def check_memory(options: Folders, embed: Callable[[Tensor], Tensor], targets: ImageFolder,
                 device: torch.device) -> None:
    """InputError if what Intra-LPIPS keeps, two rows of features for each training picture, cannot fit."""
    needed, there = 2 * len(targets) * embed(targets[0][None]).nbytes, memory(device)
    if needed > there:
        raise InputError(
            f"--target {options.target}: {len(targets)} training pictures at --size {options.size} need "
            f"{needed / 2**30:.1f} GiB of memory, there are {there / 2**30:.1f}; give fewer (the paper has "
            "ten), or a smaller --size")


def main() -> None:
    options, typed = parse(Options, __doc__)
    if bool(options.runs) == bool({"samples", "target", "reference"} & typed):
        raise InputError("what to score: give either folders of runs, or --samples DIR --target DIR")
    if options.runs:
        other, why = options.folders, "is for folders of pictures; --samples is not given"
    else:
        other, why = options.sampling, "is for runs; --samples are scored as they are"
    for name in flat(other):
        if name in typed:
            raise InputError(f"{flag(name)}: {why}; leave it out")
    at_least(options, n=2, steps=1, size=32, cluster_size=2)
    check_seed(options)
    device = distributed.setup(options.device)
    if distributed.world() > 1:
        raise InputError("evaluate.py: works in one process; start it without torchrun")
    if options.runs:
        score_runs(options.runs, options.sampling.n, options.sampling.steps, device)
    else:
        score_folders(options.folders, device)


if __name__ == "__main__":
    run(main)
