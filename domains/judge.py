"""What is in a picture of a built-in domain: the network that evaluate.py counts and measures with, and nothing is trained with.

`pretrain.py --network judge` taught it the attributes and the domain of freshly drawn pictures of a source and all its targets.
Its features stand in for Inception's and LPIPS's, whose weights have to be downloaded: the figures are called toy FID and toy
Intra-LPIPS, and compare with each other only.
"""

import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import domains
from checkpoints.load import ASSETS, load_network
from checkpoints.network import Network
from metrics import IntraLPIPS, frechet_distance, intra_lpips, kernel_distance, squared_distances
from plumbing.pictures import to_tensor

FRESH = 1000  # newly drawn target pictures to compare with
VISIBLE = 0.8  # an attribute counts in a target if the judge reads it there at least so often; sunglasses hide the eyes


@functools.cache
def load_judge(source: str) -> Network:
    """The judge of a source domain."""
    return load_network(ASSETS / f"{source}-judge.safetensors")


def fit(judge: Network, images: Tensor) -> Tensor:
    """Pictures of any size, reduced to the judge's."""
    size = judge.image_size
    return images if images.shape[2] == size else F.interpolate(images, (size, size), mode="area")


@torch.no_grad()
def attributes(judge: Network, images: Tensor) -> dict[str, Tensor]:
    """(N, 3, H, W) -> {attribute: index of its most likely value (N,)}, "domain" among them."""
    known = judge.description["attributes"]
    logits = torch.cat([judge.model(x, torch.zeros(len(x), dtype=torch.long)) for x in fit(judge, images).split(128)])
    return {name: group.argmax(1) for name, group in zip(known, logits.split([len(v) for v in known.values()], dim=1))}


@torch.no_grad()
def features(judge: Network, images: Tensor) -> Tensor:
    """What toy FID compares: (N, 3, H, W) -> the middle features' mean and standard deviation over the picture (N, 2C)."""
    middle = [judge.model.encode(x, torch.zeros(len(x), dtype=torch.long))[0].flatten(2) for x in fit(judge, images).split(128)]
    return torch.cat([torch.cat([m.mean(2), m.std(2)], 1) for m in middle])


@torch.no_grad()
def perceptual_features(judge: Network, images: Tensor) -> Tensor:
    """As LPIPS, without its learnt weights: each level's activations scaled to length 1 at each pixel -> (N, D), whose squared
    Euclidean distance is the toy LPIPS."""
    _, _, levels = judge.model.encode(fit(judge, images), torch.zeros(len(images), dtype=torch.long))
    return torch.cat([(F.normalize(a, dim=1) / (len(levels) * a[0, 0].numel()) ** 0.5).flatten(1) for a in levels], 1)


def intra(judge: Network, pictures: Tensor, shots: Tensor) -> IntraLPIPS:
    """Toy Intra-LPIPS of pictures (N, 3, H, W) around training pictures (K, 3, H, W)."""
    return intra_lpips(functools.partial(perceptual_features, judge), fit(judge, pictures), fit(judge, shots), batch_size=64)


def nearest(judge: Network, pictures: Tensor, shots: Tensor) -> list[float]:
    """Toy LPIPS from each picture (N, 3, H, W) to the nearest training picture (K, 3, H, W) or its mirror image, which training shows as often."""
    centres = list(perceptual_features(judge, torch.cat([shots, shots.flip(3)])))
    return [squared_distances(f, centres).min().item() for rows in pictures.split(64) for f in perceptual_features(judge, rows)]


@dataclasses.dataclass
class Reference:
    """What samples of a target are compared with: FRESH of its pictures that no run has seen, reduced to the judge's size."""
    shots: Tensor                    # the ten training pictures (10, 3, H, W)
    features: Tensor                 # of the fresh pictures, for toy FID and KID
    visible: list[str]               # attributes that can be read in the target's pictures
    shares: dict[str, np.ndarray]    # of each value of a visible attribute, among the fresh pictures
    nearest: float                   # median of what `nearest` gives for the fresh pictures


@functools.cache
def reference(target: str, size: int) -> Reference:
    """The comparison for samples of a built-in target at this size, made once a program."""
    judge = load_judge(domains.TARGETS[target])
    pixels, labels = domains.evaluation_pictures(target, FRESH, size)
    fresh, shots = fit(judge, to_tensor(pixels)), fit(judge, to_tensor(domains.ten_shots(target, size)[0]))
    known = judge.description["attributes"]
    seen, truth = attributes(judge, fresh), dict(zip(known, labels.T))  # the labels lack the last, "domain"
    visible = [name for name in truth if (seen[name].numpy() == truth[name]).mean() >= VISIBLE]
    shares = {name: np.bincount(truth[name], minlength=len(known[name])) / FRESH for name in visible}
    return Reference(shots, features(judge, fresh), visible, shares, float(np.median(nearest(judge, fresh, shots))))


def score(samples: Tensor, of_source: Tensor, target: str) -> dict[str, float]:
    """Adapted samples (N, 3, H, W), and the source model's from the first M <= N of their noises (M, 3, H, W) -> figures, by name.

    target      share of samples the judge puts in the target domain
    kept        share of visible attributes that agree with the source sample from the same noise
    covered     share of the values of visible attributes that appear at least a quarter as often as in fresh target pictures
    toy FID     to FRESH new target pictures; too high for few samples, so it compares at the same N
    toy KID     to the same, times 1000; unbiased: near 0 for fresh target pictures however few
    toy Intra-LPIPS, its std   diversity among the samples that are nearest to the same training picture
    memorised   median distance to the nearest training picture or its mirror image, over that of fresh target pictures: far below 1 are copies
    """
    judge, fresh = load_judge(domains.TARGETS[target]), reference(target, samples.shape[2])
    known = judge.description["attributes"]
    before, after = attributes(judge, of_source), attributes(judge, samples)
    covered = [np.bincount(after[name], minlength=len(share)) / len(samples) >= share / 4 for name, share in fresh.shares.items()]
    diversity, seen = intra(judge, samples, fresh.shots), features(judge, samples)
    return {"target": (after["domain"] == known["domain"].index(target)).float().mean().item(),
            "kept": torch.stack([(after[name][:len(of_source)] == before[name]).float().mean() for name in fresh.visible]).mean().item(),
            "covered": float(np.concatenate(covered).mean()),
            "toy FID": frechet_distance(seen, fresh.features), "toy KID": 1000 * kernel_distance(seen, fresh.features),
            "toy Intra-LPIPS": diversity.mean, "toy Intra-LPIPS std": diversity.std,
            "memorised": float(np.median(nearest(judge, samples, fresh.shots))) / fresh.nearest}
