"""Measure adapted models: the paper's figures on any folders; on the drawn domains, what only drawings tell.

  python evaluate.py runs/sunglasses
      a finished run from a drawn source to a drawn target: share of samples in the target, attributes
      kept, toy FID, toy Intra-LPIPS (domains/judge.py)
  python evaluate.py runs/sunglasses --at all
      each of a run's stages, to see when it should have stopped: a table, and stages.png, stages.json in the
      run's folder.  For a run on other pictures: Intra-LPIPS and nearest, with
      --reference also FID and KID
  python evaluate.py --samples runs/photos/drawn --target photos/
      any folders: Intra-LPIPS of the samples around the training pictures, and how near they come to them
  python evaluate.py --samples DIR --target DIR --reference DIR
      and FID, KID to a larger set of pictures of the target domain

The paper's figures (section 5.2): Intra-LPIPS of 1,000 samples (sample.py -n 1000) around the ten training
pictures, FID to 2,500 (sunglasses) and 2,700 (babies) pictures.  It names neither a size nor LPIPS's
backbone: by default they are 256x256 (smaller samples: their own size) and VGG, as is usual.  The weights of
LPIPS's backbone and of Inception are downloaded if --download allows it, else the message says which file to
put where.  GAN samples are scored the same way: only the folders matter.  python -m experiments.tables makes
the tables and figures of sections 5.2 to 5.4.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import domains
from checkpoints import run_folder
from checkpoints.perceptual import inception_features, load_inception, load_lpips, scorer
from domains import judge
from metrics import Images, IntraLPIPS
from plumbing import distributed
from plumbing.figures import save_panels
from plumbing.files import write_text
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
from plumbing.picture_folder import ImageFolder, hash_of, list_images
from plumbing.pictures import size_of
from plumbing.progress import bar
from plumbing.shell import quoted

COLUMNS = ("target", "kept", "covered", "toy FID", "toy KID", "toy Intra-LPIPS", "memorised")
STAGE_COLUMNS = ("toy FID", "target", "toy Intra-LPIPS", "memorised")
FEW = 2048  # FID on fewer samples is unreliable


@dataclasses.dataclass
class Sampling:
    """What is drawn from runs."""

    n: Annotated[int, short("-n")] = 1000
    """Samples to draw from each run."""
    steps: int = 25
    """DDIM steps."""
    source: Unset[str] = None
    """Where the source of the runs is now, if it has moved."""
    at: Unset[str] = None
    """Score stages of the runs: all, or the one after so many iterations (default: the end of each run)."""


@dataclasses.dataclass
class Folders:
    """Folders of pictures, instead of runs; all but samples also for stages of runs on photos."""

    samples: Unset[str] = None
    """Folder of samples."""
    target: Unset[str] = None
    """Folder of the training pictures; for stages of a run where they are now, if they have moved."""
    reference: Unset[str] = None
    """Folder of many other pictures of the target domain, for FID and KID."""
    size: Unset[int] = None
    """Pixels per side at which all pictures are compared; they are cropped to a square and scaled.
    Default: that of the samples, 256 at most; for stages of a run that of its network."""
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
    """Folders of finished runs from a drawn source to a drawn target; with --at of any runs."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or mps."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    folders: Folders = dataclasses.field(default_factory=Folders)


def score_runs(folders: tuple[str, ...], n: int, steps: int, device: torch.device) -> None:
    """Prints a table of toy figures, a row for each run."""
    head = "| run | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS)
    for i, folder in enumerate(map(Path, folders)):
        figures = judge.score_run(folder, n, steps, device)["score"]
        if i == 0:
            print(head)
        print(f"| {folder} | " + " | ".join(f"{figures[name]:.2f}" for name in COLUMNS) + " |", flush=True)
    print(f"""
{n} samples of each, of diffusion models DDIM in {steps} steps. target: share in the target domain; kept:
share of attributes as in the source model's sample from the same noise ({min(n, judge.PAIRED)} pairs);
covered: share of attribute values that appear; toy FID and toy KID (times 1000): distance to fresh target
pictures, lower is better; toy Intra-LPIPS: higher is more diverse; memorised: distance to the nearest
training picture or its mirror image over that of fresh target pictures, far below 1 are copies""")


def at_size(images: Tensor, size: int) -> Tensor:
    """Pictures (N, 3, H, W), scaled to (N, 3, size, size) if they are not."""
    if images.shape[2] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def stage_scorer(folder: Path, options: Options, device: torch.device) -> Callable[[int], dict[str, float]]:
    """A function that gives the figures of a run's stage after so many iterations, by name: the judge's if it
    knows the source and the target, else the paper's.
    """
    n, steps, source = options.sampling.n, options.sampling.steps, options.sampling.source
    run = run_folder.read_options(folder)
    if judge.knows(run):
        def judged(iteration: int) -> dict[str, float]:
            figures = judge.score_run(folder, n, steps, device, iteration)["score"]
            return {name: figures[name] for name in STAGE_COLUMNS}
        return judged

    own = run_folder.load_run(folder, run_folder.stages(folder)[0]["iteration"], source)[0].image_size
    size = options.folders.size or max(32, own)
    pictures = functools.partial(domains.training_images, options.folders.target or run["target"],
                                 hold_out=run.get("hold_out", 0), recursive=run.get("recursive", False))
    if options.folders.target is None:
        domains.need_still_there(run["target"], folder)
        if run_folder.pictures_of(folder) not in (None, hash_of(torch.cat(pictures(own)))):
            print(f"warning: {run['target']}: the pictures have changed since the run in {folder} began; the "
                  "figures are about the present ones")
    targets, _ = pictures(size)
    score = comparison(options.folders, targets, reference_of(options.folders, size), size, device)

    def scored(iteration: int) -> dict[str, float]:
        network, _ = run_folder.load_run(folder, iteration, source)
        network.check_steps(steps)
        samples = judge.draw(network.to(device), n, steps, f"{folder} --at {iteration}")
        try:
            return score(at_size(samples, size))[1]
        except ValueError as error:
            raise InputError(f"-n {n}: {error}") from None
    return scored


def score_stages(folder: Path, options: Options, device: torch.device) -> None:
    """Prints a table of a run's stages, or of the one that --at names; all of them also become stages.png and
    stages.json in its folder.
    """
    n, steps, at = options.sampling.n, options.sampling.steps, options.sampling.at
    records = run_folder.stages(folder)
    best, rows = run_folder.best_stage(records), []
    if at != "all":
        run_folder.find_stage(folder, int(at))
        records = [record for record in records if record["iteration"] == int(at)]
    if not records:
        raise InputError(f"{folder}: has no stages that can be read")
    score = stage_scorer(folder, options, device)
    for record in records:
        figures = score(record["iteration"])
        if best is not None:
            figures |= {"held-out loss": record["held_out_loss"], "training loss": record["training_loss"]}
        if not rows:
            print(f"| iterations | {' | '.join(figures)} |\n|---|" + "---|" * len(figures))
        rows.append(dict(iterations=record["iteration"], **figures))
        mark = " (held-out loss lowest)" if record["iteration"] == best else ""
        cells = " | ".join(f"{value:.4g}" for value in figures.values())
        print(f"| {record['iteration']}{mark} | {cells} |", flush=True)
    copies = {"nearest": "near 0 are copies",
              "memorised": "over that of fresh pictures, far below 1 are copies"}
    legend = "".join(f"; {name}: distance to the nearest training picture, {meaning}"
                     for name, meaning in copies.items() if name in rows[0])
    print(f"\n{folder}: {n} samples of each stage, DDIM in {steps} steps{legend}")
    if at == "all":
        curves = {name: [row[name] for row in rows] for name in rows[0] if name != "iterations"}
        save_panels(folder / "stages.png", [row["iterations"] for row in rows], curves, "iterations", best)
        text = json.dumps(dict(n=n, steps=steps, best=best, stages=rows), indent=1)
        write_text(folder / "stages.json", text)


def score_folders(options: Folders, device: torch.device) -> None:
    """Prints the paper's figures for a folder of samples."""
    for name in ("samples", "target"):
        if getattr(options, name) is None:
            raise InputError(f"--{name}: missing; --samples and --target go together")
    drawn = samples_in(Path(options.samples))
    size = options.size or min(256, max(32, min(size_of(list_images(drawn)[0]))))
    samples, targets = ImageFolder(drawn, size), ImageFolder(options.target, size)
    reference = reference_of(options, size)
    warn_of_old(drawn)
    score = comparison(options, targets, reference, size, device)
    try:
        found, figures = score(samples)
    except ValueError as error:
        raise InputError(f"--samples {options.samples}: {error}") from None
    few = len(targets) <= 20
    sizes = f"sizes {' '.join(map(str, found.sizes))}" if few else f"largest size {max(found.sizes)}"
    print(f"Intra-LPIPS ({options.lpips_net}, {size}x{size}, {len(samples)} samples): "
          f"{found.mean:.3f} ± {found.std:.3f} over {len(targets) - found.dropped} clusters, "
          f"{found.dropped} dropped; {sizes}\n"
          f"LPIPS to the nearest training picture or its mirror image, median: {figures['nearest']:.3f}")
    if reference:
        print(f"FID {figures['FID']:.2f}, KID {figures['KID']:.5f}: "
              f"{len(samples)} samples against {len(reference)} pictures")
        if min(len(samples), len(reference)) < FEW:
            print(f"warning: FID on fewer than {FEW} pictures is too high and compares only with FID on as "
                  "many; KID does not have that fault")


def samples_in(folder: Path) -> Path:
    """The folder of samples; of a run, that in which sample.py put them: beside it are other pictures."""
    if not (folder / "options.json").exists():
        return folder
    if not (folder / "drawn").is_dir():
        raise InputError(f"--samples {folder}: a run without samples; draw them with python sample.py "
                         f"{quoted(folder)}")
    print(f"note: {folder} is a run; its samples are taken, {folder / 'drawn'}")
    return folder / "drawn"


def reference_of(options: Folders, size: int) -> ImageFolder | None:
    """The pictures of --reference, if it is given; InputError if there is only one."""
    reference = ImageFolder(options.reference, size, recursive=True) if options.reference else None
    if reference and len(reference) < 2:
        raise InputError(f"--reference {options.reference}: has one picture; FID and KID need at least two")
    return reference


def comparison(options: Folders, targets: Images, reference: Images | None, size: int,
               device: torch.device) -> Callable[[Images], tuple[IntraLPIPS, dict[str, float]]]:
    """`scorer` with the networks that the options name.  InputError for weights that are not there, too."""
    lpips = load_lpips(options.lpips_net, options.lpips_backbone, options.download).to(device)
    features = None
    if reference:
        inception = load_inception(options.inception_weights, options.download).to(device)
        features = functools.partial(inception_features, inception,
                                     progress=functools.partial(bar, text="Inception"))
    return scorer(lpips, targets, size, features, reference, options.cluster_size, options.seed)


def warn_of_old(samples: Path) -> None:
    """Says so if samples beside a run were drawn before its weights were written."""
    weights = samples.parent / "weights.safetensors"
    drawn = min((file.stat().st_mtime for file in samples.glob("*.png")), default=math.inf)
    if weights.exists() and drawn < weights.stat().st_mtime:
        print(f"warning: {samples} has pictures older than {weights}; if the run went on after they were "
              "drawn, draw them again with sample.py")


def unused(options: Options) -> dict[str, str]:
    """The options that have nothing to say about what is scored, and why: {name: reason}."""
    if not options.runs:
        return dict.fromkeys(flat(options.sampling), "is for runs; --samples are scored as they are")
    if options.sampling.at and not any(judge.knows(run_folder.read_options(run)) for run in options.runs):
        return {}
    of_folders = ("is for folders of pictures (--samples DIR), and for stages of runs that the judge does "
                  "not know; give those alone")
    return {**dict.fromkeys(flat(options.folders), of_folders),
            "source": "is for stages (--at) of a run whose source has moved; a built-in one does not"}


def main() -> None:
    options, typed = parse(Options, __doc__)
    at = options.sampling.at
    if bool(options.runs) == bool({"samples", *(() if at else ("target", "reference"))} & typed):
        raise InputError("what to score: give either folders of runs, or --samples DIR --target DIR")
    reasons = unused(options)
    for name in sorted(reasons.keys() & typed):
        raise InputError(f"{flag(name)}: {reasons[name]}; leave it out")
    if at and at != "all" and not at.isdecimal():
        raise InputError(f"--at {at}: give all, or the iterations of a stage")
    at_least(options, n=2, steps=1, size=32, cluster_size=2)
    check_seed(options)
    device = distributed.setup_alone(options.device, "evaluate.py")
    if at:
        for folder in map(Path, options.runs):
            score_stages(folder, options, device)
    elif options.runs:
        score_runs(options.runs, options.sampling.n, options.sampling.steps, device)
    else:
        score_folders(options.folders, device)


if __name__ == "__main__":
    run(main)
