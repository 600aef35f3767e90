"""Measure adapted models: the paper's Intra-LPIPS and FID on any folders, and on the built-in domains what no photo shows.

  python evaluate.py runs/sunglasses                       a finished run from a built-in source to a built-in target: share of samples
                                                           in the target, attributes kept, toy FID, toy Intra-LPIPS (judge.py)
  python evaluate.py --samples runs/photos/drawn --target photos/
                                                           any folders: Intra-LPIPS of the samples around the training pictures
                                                           (of a small source also --size 32, or whatever size its samples have)
  python evaluate.py --samples DIR --target DIR --reference DIR
                                                           and FID, KID to a larger set of pictures of the target domain

The paper's figures (section 5.2): 1,000 samples (sample.py -n 1000) at 256x256, LPIPS-VGG around the ten training pictures, FID to 2,500
(sunglasses) and 2,700 (babies) pictures.  The weights of LPIPS's backbone and of Inception are downloaded if --download allows it, else
the message says which file to put where.  GAN samples are scored the same way: only the folders matter.
tables.py makes all tables and figures of section 5.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

import domains
import metrics
from checkpoints import run_folder
from checkpoints.load import load_source
from checkpoints.network import fingerprint
from checkpoints.perceptual import BACKBONES, load_inception, load_lpips
from domains import judge
from plumbing import distributed
from plumbing.files import write_atomic
from plumbing.options import InputError, at_least, flag, option, parse, run
from plumbing.pictures import ImageFolder

COLUMNS = ("target", "kept", "covered", "toy FID", "toy KID", "toy Intra-LPIPS", "memorised")
FIRST_SEED = 20_000  # of the noises that every run is scored with, beyond those of its pictures
PAIRED = 250  # at most so many of them also go through the source model, to see what of its samples is kept
FEW = 2048  # FID on fewer samples is unreliable


@dataclasses.dataclass
class Options:
    runs: tuple[str, ...] = option((), "folders of finished runs from a built-in source to a built-in target", positional=True)
    n: int = option(1000, "samples to draw from each run", short="-n", group="runs")
    steps: int = option(25, "DDIM steps", group="runs")

    samples: str | None = option(None, "folder of samples, instead of runs", metavar="DIR", group="folders of pictures")
    target: str | None = option(None, "folder of the training pictures", metavar="DIR", group="folders of pictures")
    reference: str | None = option(None, "folder of many other pictures of the target domain, for FID and KID", metavar="DIR", group="folders of pictures")
    size: int = option(256, "pixels per side at which pictures are compared, for all three figures; they are cropped to a square and scaled", group="folders of pictures")
    cluster_size: int | None = option(None, "compare at most so many random members of a cluster; 50 is the protocol of Ojha et al. 2021 "
                                      "(default: all)", group="folders of pictures")
    lpips_net: str = option("vgg", "backbone of LPIPS", choices=list(BACKBONES), group="folders of pictures")
    lpips_backbone: str | None = option(None, "torchvision's weights for it", metavar="FILE", group="folders of pictures")
    inception_weights: str | None = option(None, "torch-fidelity's Inception weights", metavar="FILE", group="folders of pictures")
    download: bool = option(False, "fetch missing weights from their publishers", group="folders of pictures")
    seed: int = option(0, "of the random members that --cluster-size compares", group="folders of pictures")
    device: str = option("auto", "auto, cpu, cuda or mps")


@functools.lru_cache(maxsize=2)
def source_samples(source: str, n: int, steps: int, device: torch.device) -> torch.Tensor:
    """What a built-in source model makes of the noises that all runs are scored with."""
    return load_source(source).to(device).sample(range(FIRST_SEED, FIRST_SEED + n), steps, progress=_bar(source))


def _bar(text: str):
    return lambda steps: tqdm(steps, desc=text, leave=False, mininterval=1)


def protocol(target: str, n: int, steps: int) -> dict:
    """How the runs to a built-in target are scored; figures compare where all of it is the same."""
    return dict(n=n, steps=steps, paired=min(n, PAIRED), fresh=judge.FRESH, judge=fingerprint(judge.load_judge(domains.TARGETS[target])))


def score_run(folder: Path, n: int, steps: int, device: torch.device) -> dict:
    """One run's figures (judge.score) with what it is; kept in score.json, and drawn again if the run or the number of samples has changed."""
    network, trained = run_folder.load_run(folder)
    drawn = domains.drawn_by(trained["source"])
    if drawn is None or domains.TARGETS.get(trained["target"]) != drawn:
        raise InputError(f"{folder}: from {trained['source']} to {trained['target']}; the judge knows built-in sources and their targets only. For other "
                         f"pictures: python sample.py {folder} -n 1000, then evaluate.py --samples {folder}/drawn --target DIR --size {network.image_size}")
    if steps > network.schedule.timesteps:
        raise InputError(f"--steps {steps}: this model has {network.schedule.timesteps}")
    what = {name: trained[name] for name in ("source", "target", "method", "seed", "iterations")}
    what |= protocol(trained["target"], n, steps) | dict(weights=fingerprint(network))
    kept = folder / "score.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["run"] == what:
        return found
    samples = network.to(device).sample(range(FIRST_SEED, FIRST_SEED + n), steps, progress=_bar(str(folder)))
    found = dict(run=what, score=judge.score(samples, source_samples(trained["source"], min(n, PAIRED), steps, device), trained["target"]))
    write_atomic(kept, lambda temporary: temporary.write_text(json.dumps(found, indent=1)))
    return found


def score_folders(options: Options, device: torch.device) -> None:
    """Prints the paper's figures for a folder of samples."""
    for name in ("samples", "target"):
        if getattr(options, name) is None:
            raise InputError(f"--{name}: missing; --samples and --target go together")
    samples, targets = ImageFolder(options.samples, options.size), ImageFolder(options.target, options.size)
    reference = ImageFolder(options.reference, options.size) if options.reference else None
    weights = Path(options.samples).parent / "weights.safetensors"
    if weights.exists() and min((file.stat().st_mtime for file in Path(options.samples).glob("*.png")), default=math.inf) < weights.stat().st_mtime:
        print(f"warning: {options.samples} has pictures older than {weights}; if the run went on after they were drawn, draw them again with sample.py")
    embed = functools.partial(metrics.lpips_features, load_lpips(options.lpips_net, options.lpips_backbone, options.download).to(device))
    inception = load_inception(options.inception_weights, options.download).to(device) if reference else None
    found = metrics.intra_lpips(embed, samples, targets, options.cluster_size, options.seed, progress=_bar("Intra-LPIPS"))
    print(f"Intra-LPIPS ({options.lpips_net}, {options.size}x{options.size}, {len(samples)} samples): {found.mean:.3f} ± {found.std:.3f} over "
          f"{len(targets) - found.dropped} clusters, {found.dropped} dropped; sizes {' '.join(map(str, found.sizes))}")
    if inception:
        x, y = (metrics.inception_features(inception, pictures, progress=_bar("Inception")) for pictures in (samples, reference))
        print(f"FID {metrics.frechet_distance(x, y):.2f}, KID {metrics.kernel_distance(x, y):.5f}: {len(x)} samples against {len(y)} pictures")
        if min(len(x), len(y)) < FEW:
            print(f"warning: FID on fewer than {FEW} pictures is too high and compares only with FID on as many; KID does not have that fault")


def main() -> None:
    options, given = parse(Options, description=__doc__)
    if bool(options.runs) == bool(options.samples or options.target or options.reference):
        raise InputError("what to score: give either folders of runs, or --samples DIR --target DIR")
    other = "folders of pictures" if options.runs else "runs"
    for field in dataclasses.fields(Options):
        if field.name in given and field.metadata["group"] == other:
            raise InputError(f"{flag(field)}: is for {other}; {'--samples is not given' if options.runs else '--samples are scored as they are'}; leave it out")
    at_least(options, n=2, steps=1, size=32, cluster_size=2)
    device = distributed.setup(options.device)
    if not options.runs:
        score_folders(options, device)
        return
    print("| run | " + " | ".join(COLUMNS) + " |\n|---|" + "---|" * len(COLUMNS))
    for folder in map(Path, options.runs):
        found = score_run(folder, options.n, options.steps, device)["score"]
        print(f"| {folder} | " + " | ".join(f"{found[column]:.2f}" for column in COLUMNS) + " |", flush=True)
    print(f"\n{options.n} samples of each, DDIM in {options.steps} steps. target: share in the target domain; kept: share of attributes as in the\n"
          f"source model's sample from the same noise ({min(options.n, PAIRED)} pairs); covered: share of attribute values that appear; toy FID and toy\n"
          "KID (times 1000): distance to fresh target pictures, lower is better; toy Intra-LPIPS: higher is more diverse; memorised: distance to the\n"
          "nearest training picture or its mirror image over that of fresh target pictures, far below 1 are copies")


if __name__ == "__main__":
    run(main)
