"""The judge of a built-in domain: a network that tells what is in a picture, and how it scores a run.

`pretrain.py --network judge` taught it the attributes and the domain of freshly drawn pictures of a source
and its targets; nothing is trained with it.  Its features stand in for those of Inception and LPIPS, whose
weights have to be downloaded: the figures are called toy FID and toy Intra-LPIPS, and compare with each other
only.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import domains
import metrics
from checkpoints import run_folder
from checkpoints.load import ASSETS, load_network, load_source
from checkpoints.network import Network, fingerprint
from metrics import IntraLPIPS, frechet_distance, intra_lpips, kernel_distance
from plumbing.files import read_json, write_text
from plumbing.memory import fitting
from plumbing.options import InputError
from plumbing.pictures import to_tensor
from plumbing.progress import bar
from plumbing.shell import quoted

FRESH = 1000  # newly drawn target pictures to compare with
VISIBLE = 0.8  # an attribute counts in a target if it is read right there so often; sunglasses hide the eyes
FIRST_SEED = 20_000  # of the noises that every run is scored with, beyond those of its pictures
PAIRED = 250  # at most so many of them also go through the source model, to see what of its samples is kept


# ---- what the judge sees ---------------------------------------------------------------------------------

@functools.cache
def load_judge(source: str) -> Network:
    """The judge of a source domain."""
    return load_network(ASSETS / f"{source}-judge.safetensors")


def fit(judge: Network, images: Tensor) -> Tensor:
    """Pictures of any size, reduced to the judge's."""
    size = judge.image_size
    return images if images.shape[2] == size else F.interpolate(images, (size, size), mode="area")


def _clean(images: Tensor) -> Tensor:
    """The timesteps (N,) of pictures without noise."""
    return torch.zeros(len(images), dtype=torch.long)


@torch.no_grad()
def attributes(judge: Network, images: Tensor) -> dict[str, Tensor]:
    """(N, 3, H, W) -> {attribute: index of its most likely value (N,)}, "domain" among them."""
    logits = torch.cat([judge.model(x, _clean(x)) for x in fit(judge, images).split(128)])
    groups = by_attribute(logits, judge.description["attributes"])
    return {name: group.argmax(1) for name, group in groups.items()}


def by_attribute(logits: Tensor, known: dict[str, list[str]]) -> dict[str, Tensor]:
    """Logits of all values side by side (N, V) -> {attribute: those of its values}."""
    return dict(zip(known, logits.split([len(values) for values in known.values()], dim=1), strict=True))


def attribute_loss(logits: Tensor, labels: Tensor, known: dict[str, list[str]]) -> Tensor:
    """Mean over attributes of the cross-entropy, for each picture: what a judge or a classifier of attributes
    learns by.

    logits (N, all values side by side), labels (N, attributes) -> (N,)
    """
    groups = by_attribute(logits, known).values()
    losses = [F.cross_entropy(group, truth, reduction="none") for group, truth in zip(groups, labels.T)]
    return torch.stack(losses).mean(0)


@torch.no_grad()
def features(judge: Network, images: Tensor) -> Tensor:
    """What toy FID compares: (N, 3, H, W) -> mean and standard deviation of the middle features (N, 2C)."""
    middle = [judge.model.encode(x, _clean(x))[0].flatten(2) for x in fit(judge, images).split(128)]
    return torch.cat([torch.cat([m.mean(2), m.std(2)], 1) for m in middle])


@torch.no_grad()
def perceptual_features(judge: Network, images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, D), whose squared Euclidean distance is the toy LPIPS.

    As LPIPS without its learnt weights: each level's activations, scaled to length 1 at each pixel.
    """
    _, _, levels = judge.model.encode(fit(judge, images), _clean(images))
    scaled = [F.normalize(a, dim=1) / (len(levels) * a[0, 0].numel()) ** 0.5 for a in levels]
    return torch.cat([a.flatten(1) for a in scaled], 1)


def intra(judge: Network, pictures: Tensor, shots: Tensor) -> IntraLPIPS:
    """Toy Intra-LPIPS of pictures (N, 3, H, W) around training pictures (K, 3, H, W).

    Raises ValueError as metrics.intra_lpips does.
    """
    embed = functools.partial(perceptual_features, judge)
    return intra_lpips(embed, pictures, shots, batch_size=64)


def nearest(judge: Network, pictures: Tensor, shots: Tensor) -> list[float]:
    """Toy LPIPS from each picture (N, 3, H, W) to the nearest training picture (K, 3, H, W) or its mirror
    image, which training shows as often.
    """
    return metrics.nearest(functools.partial(perceptual_features, judge), pictures, shots, batch_size=64)


# ---- scores ----------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Reference:
    """What samples of a target are compared with: FRESH of its pictures that no run has seen."""
    pictures: Tensor                 # (FRESH, 3, H, W)
    features: Tensor                 # theirs, for toy FID and KID
    visible: list[str]               # attributes that can be read in them
    shares: dict[str, np.ndarray]    # of each value of a visible attribute among them


@functools.cache
def reference(target: str, size: int) -> Reference:
    """The comparison for samples of a built-in target at this size, made once a program."""
    judge = load_judge(domains.TARGETS[target])
    pixels, labels = domains.evaluation_pictures(target, FRESH, size)
    fresh, known = to_tensor(pixels), judge.description["attributes"]
    seen, truth = attributes(judge, fresh), dict(zip(known, labels.T))  # the labels lack the last, "domain"
    visible = [name for name in truth if (seen[name].numpy() == truth[name]).mean() >= VISIBLE]
    shares = {name: np.bincount(truth[name], minlength=len(known[name])) / FRESH for name in visible}
    return Reference(fresh, features(judge, fresh), visible, shares)


@functools.cache
def usual_distance(target: str, size: int, hold_out: int) -> float:
    """Median of what `nearest` gives for fresh pictures of a target around its training pictures, but for the
    last `hold_out` of these."""
    shots, _ = domains.training_images(target, size, hold_out)
    judge = load_judge(domains.TARGETS[target])
    return float(np.median(nearest(judge, reference(target, size).pictures, shots)))


def score(samples: Tensor, of_source: Tensor, target: str, hold_out: int = 0) -> dict[str, float]:
    """Adapted samples (N, 3, H, W), and the source model's from the first M <= N of their noises (M, 3, H, W)
    -> figures, by name.  The last `hold_out` of the target's ten pictures were not trained on.

    target      share of samples the judge puts in the target domain
    kept        share of visible attributes that agree with the source sample from the same noise
    covered     share of the values of visible attributes that appear at least a quarter as often as in fresh
                target pictures
    toy FID     to FRESH new target pictures; too high for few samples, so it compares at the same N
    toy KID     to the same, times 1000; unbiased: near 0 for fresh target pictures however few
    toy Intra-LPIPS, its std   diversity among the samples that are nearest to the same training picture
    memorised   median distance to the nearest training picture or its mirror image, over that of fresh target
                pictures: far below 1 are copies

    Raises InputError for so few samples that no two of them are nearest to the same training picture.
    """
    judge, size = load_judge(domains.TARGETS[target]), samples.shape[2]
    known, fresh = judge.description["attributes"], reference(target, size)
    shots, _ = domains.training_images(target, size, hold_out)
    before, after = attributes(judge, of_source), attributes(judge, samples)
    kept = [(after[name][:len(of_source)] == before[name]).float().mean() for name in fresh.visible]
    covered = [np.bincount(after[name], minlength=len(share)) / len(samples) >= share / 4
               for name, share in fresh.shares.items()]
    try:
        diversity = intra(judge, samples, shots)
    except ValueError as error:
        raise InputError(f"-n {len(samples)}: {error}") from None
    seen, distance = features(judge, samples), float(np.median(nearest(judge, samples, shots)))
    return {
        "target": (after["domain"] == known["domain"].index(target)).float().mean().item(),
        "kept": torch.stack(kept).mean().item(),
        "covered": float(np.concatenate(covered).mean()),
        "toy FID": frechet_distance(seen, fresh.features),
        "toy KID": 1000 * kernel_distance(seen, fresh.features),
        "toy Intra-LPIPS": diversity.mean,
        "toy Intra-LPIPS std": diversity.std,
        "memorised": distance / usual_distance(target, size, hold_out),
    }


@functools.cache
def source_weights(source: str) -> str:
    """Tells a source from one of the same name that was trained anew."""
    return fingerprint(load_source(source))


def protocol(target: str, n: int, steps: int, source: str | None = None) -> dict[str, int | str]:
    """How runs from a source to a built-in target are scored; figures compare where all of it is the same.

    Whatever changes what `draw` gives belongs here; an option that is new only where it is not as usual, so
    that the figures of older runs still hold.

    source    None: of pictures that come from none
    """
    judge = load_judge(domains.TARGETS[target])
    found = dict(n=n, steps=steps, paired=min(n, PAIRED), fresh=FRESH, judge=fingerprint(judge))
    return found | (dict(source=source, source_weights=source_weights(source)) if source else {})


def draw(network: Network, n: int, steps: int, name: str) -> Tensor:
    """Samples (n, 3, H, W) from the noises that all runs are scored with."""
    seeds = range(FIRST_SEED, FIRST_SEED + n)
    progress = functools.partial(bar, text=name)
    return fitting(lambda at_once: network.sample(seeds, steps, batch_size=at_once, progress=progress), 64)


@functools.lru_cache(maxsize=2)
def source_samples(source: str, n: int, steps: int, device: torch.device, precision: str = "fp32") -> Tensor:
    """What a built-in source model makes of the noises that runs are scored with: (n, 3, H, W)."""
    network = load_source(source).to(device)
    network.precision = precision
    return draw(network, n, steps, source)


def knows(options: dict) -> bool:
    """Whether a run with these (flat) options went from a drawn source to one of its targets that the judge
    has seen.
    """
    drawn = domains.drawn_by(options["source"])
    target = options["target"]
    return drawn is not None and domains.TARGETS.get(target) == drawn and has_seen(target)


def has_seen(target: str) -> bool:
    """Whether the judge of a drawn target's source has learnt that target."""
    return target in load_judge(domains.TARGETS[target]).description["attributes"]["domain"]


def need_seen(target: str) -> None:
    """InputError for a drawn target that its source's judge has not seen: a new one needs a new judge."""
    if not has_seen(target):
        raise InputError(f"{target}: the judge has not seen it, and cannot score it; train one that has "
                         "(docs/built-in-weights.md)")


def score_run(folder: Path, n: int, steps: int, device: torch.device,
              at: int | None = None) -> dict[str, dict]:
    """{"run": what was scored and how, "score": the figures of `score`}; kept in score.json beside the run.

    at    score its stage after so many iterations instead; kept beside the weights of that
    Samples are drawn anew only if the run, `n` or `steps` has changed.  Raises InputError for what is not a
    finished run from a drawn source to one of its targets, for more steps than the model has, and as
    `score` does.
    """
    options = run_folder.read_options(folder)
    source, target = options["source"], options["target"]
    if not knows(options):
        raise InputError(
            f"{folder}: from {source} to {target}; the judge knows drawn sources, and their targets that it "
            "has learnt. Any run's stages are compared by "
            f"python evaluate.py {quoted(folder)} --at all --download")
    network, _ = run_folder.load_run(folder, at)
    network.check_steps(steps)
    run = {name: options.get(name) for name in ("target", "method", "seed", "iterations")}
    run |= protocol(target, n, steps, source) | dict(weights=fingerprint(network))
    path = folder / "score.json"
    if at is not None:
        run["iterations"], path = at, run_folder.stage_file(folder, at).with_suffix(".json")
    if (kept := read_json(path)).get("run") == run:
        return kept
    samples = draw(network.to(device), n, steps, str(folder))
    of_source = source_samples(source, min(n, PAIRED), steps, device, network.precision)
    figures = score(samples, of_source, target, options.get("hold_out", 0))
    found = dict(run=run, score=figures)
    write_text(path, json.dumps(found, indent=1))
    return found
