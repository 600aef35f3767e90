"""The paper's figures of samples (section 5.2): how they lie around the training pictures, how far from more
pictures of the domain.  On any pictures; what only drawings tell is in judge.py.
"""

import functools
import statistics
from collections.abc import Callable

from torch import Tensor, nn

from checkpoints.perceptual import lpips_features
from metrics import Images, IntraLPIPS, frechet_distance, intra_lpips, kernel_distance, nearest
from plumbing.memory import device_memory
from plumbing.options import InputError
from plumbing.progress import bar


def scorer(lpips: nn.Module, targets: Images, size: int, features: Callable[[Images], Tensor] | None = None,
           reference: Images | None = None, cluster_size: int | None = None,
           seed: int = 0) -> Callable[[Images], tuple[IntraLPIPS, dict[str, float]]]:
    """A function that gives the figures of samples around the training pictures, all of them at this size.

    They are Intra-LPIPS; nearest, the median LPIPS to the nearest target or its mirror image; and if there is
    a reference, FID and KID to it by `features`: N pictures -> (N, D).
    cluster_size, seed   as of `intra_lpips`
    Raises InputError for targets that do not fit in memory; the function ValueError as `intra_lpips` does.
    """
    embed = functools.partial(lpips_features, lpips)
    check_memory(embed, targets, size)
    expected = features(reference) if reference else None

    def score(samples: Images) -> tuple[IntraLPIPS, dict[str, float]]:
        found = intra_lpips(embed, samples, targets, cluster_size, seed,
                            progress=functools.partial(bar, text="Intra-LPIPS"))
        distances = nearest(embed, samples, targets, progress=functools.partial(bar, text="nearest"))
        figures = {"Intra-LPIPS": found.mean, "nearest": statistics.median(distances)}
        if reference:
            seen = features(samples)
            figures |= {"FID": frechet_distance(seen, expected), "KID": kernel_distance(seen, expected)}
        return found, figures
    return score


def check_memory(embed: Callable[[Tensor], Tensor], targets: Images, size: int) -> None:
    """InputError if what Intra-LPIPS keeps, two rows of features for each training picture, cannot fit."""
    one = embed(targets[0][None])
    needed, there = 2 * len(targets) * one.nbytes, device_memory(one.device)
    if needed > there:
        raise InputError(
            f"{len(targets)} training pictures at --size {size} need {needed / 2**30:.1f} GiB of "
            f"memory, there are {there / 2**30:.1f}; give fewer (the paper has ten), or a smaller --size")
