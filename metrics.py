"""The measurements of section 5.2, Intra-LPIPS and FID, and KID, unbiased where samples are few.

All take sets of features (N, D).

Where the features come from is the caller's choice: the networks that the field compares by are in
checkpoints/perceptual.py, and the built-in domains have their own (domains/judge.py).
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

# Anything with len() that gives a picture (3, H, W) in [-1, 1] for an index: a tensor, an ImageFolder.
Images = Sequence[Tensor]


def stack(images: Images, rows: Tensor) -> Tensor:
    """The pictures at the indices `rows` (B,) -> (B, 3, H, W)."""
    return torch.stack([images[i] for i in rows.tolist()])


# ---- Intra-LPIPS -------------------------------------------------------------------------------------------

def squared_distances(a: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(D,), K of (D,) -> (K,).

    Differences first: |a|^2 - 2ab + |b|^2 would lose what near pictures differ by.
    """
    return torch.stack([nn.functional.mse_loss(a, b, reduction="sum") for b in others])


@dataclasses.dataclass
class IntraLPIPS:
    """Per cluster, in the order of the targets."""
    clusters: list[float | None]  # mean distance over the pairs; None: dropped, fewer than two samples
    sizes: list[int]              # samples assigned to each target
    assigned: list[int]           # each sample's target, in the order of the samples

    @property
    def mean(self) -> float:
        """The figure the paper prints: the mean over clusters, dropped ones left out."""
        return statistics.mean(c for c in self.clusters if c is not None)

    @property
    def std(self) -> float:
        """Standard deviation over the same clusters (n - 1 in the denominator); 0 for a single one."""
        values = [c for c in self.clusters if c is not None]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def dropped(self) -> int:
        """How many clusters are left out."""
        return self.clusters.count(None)


@torch.no_grad()
def intra_lpips(embed: Callable[[Tensor], Tensor], samples: Images, targets: Images,
                cluster_size: int | None = None, seed: int = 0, batch_size: int = 4,
                progress: Callable[[Iterable], Iterable] = iter) -> IntraLPIPS:
    """Diversity within what looks most like the same training picture (section 5.2; Ojha et al. 2021).

    embed         (B, 3, H, W) -> (B, D), such that the distance of two pictures is the squared Euclidean
                  distance of their features: functools.partial(perceptual.lpips_features, model)
    cluster_size  None: the exact mean over all pairs.  Otherwise over at most so many random members of each
                  cluster, chosen by `seed`; 50 is the reference protocol.
    progress      wraps the batches of samples, e.g. tqdm
    Each picture goes through the network once, N + K in all.  In memory at a time: 2K + batch_size rows of
    features for K targets.  Raises ValueError if no cluster has two samples.
    """
    batches = torch.arange(len(targets)).split(batch_size)
    centres = [f for rows in batches for f in embed(stack(targets, rows))]
    # The mean over pairs of |f_i - f_j|^2 is 2 / (n - 1) times the sum of |f_i - mean|^2, which is kept up to
    # date one f at a time (Welford 1962): exact without a loop over pairs, and nothing cancels where the
    # members are nearly equal.
    means, spreads = [torch.zeros_like(c) for c in centres], [0.0] * len(centres)
    counted, sizes, assigned = [0] * len(centres), [0] * len(centres), [0] * len(samples)
    # In a random order the first members of a cluster are a random subset of it.
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    for rows in progress(order.split(batch_size)):
        for i, f in zip(rows.tolist(), embed(stack(samples, rows))):
            k = assigned[i] = squared_distances(f, centres).argmin().item()
            sizes[k] += 1
            if cluster_size is None or counted[k] < cluster_size:
                counted[k] += 1
                delta = f - means[k]
                means[k] += delta / counted[k]
                spreads[k] += delta.square().sum().item() * (counted[k] - 1) / counted[k]
    clusters = [2 * spread / (n - 1) if n > 1 else None for spread, n in zip(spreads, counted)]
    if clusters.count(None) == len(clusters):
        raise ValueError(f"Intra-LPIPS of {len(samples)} samples: no target has two of them; "
                         "give more samples")
    return IntraLPIPS(clusters, sizes, assigned)


# ---- copies ------------------------------------------------------------------------------------------------

@torch.no_grad()
def nearest(embed: Callable[[Tensor], Tensor], samples: Images, targets: Images, batch_size: int = 4,
            progress: Callable[[Iterable], Iterable] = iter) -> list[float]:
    """Distance of each sample to the nearest target or its mirror image, which training shows as often.

    embed, batch_size and progress as for `intra_lpips`.  In memory at a time: 2K + batch_size rows of
    features for K targets.
    """
    batches = (stack(targets, rows) for rows in torch.arange(len(targets)).split(batch_size))
    centres = [f for pictures in batches for f in embed(torch.cat([pictures, pictures.flip(3)]))]
    return [squared_distances(f, centres).min().item()
            for rows in progress(torch.arange(len(samples)).split(batch_size))
            for f in embed(stack(samples, rows))]


def pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, D), whose squared Euclidean distance is the mean squared difference of pixels."""
    return images.flatten(1) / images[0].numel() ** 0.5


def nearest_rms(samples: Images, targets: Images) -> float:
    """`nearest` without a network, in pixels of [-1, 1]: the root mean square difference, median of samples.

    0 are copies.
    """
    return statistics.median(d ** 0.5 for d in nearest(pixels, samples, targets))


# ---- distances between sets of features --------------------------------------------------------------------

def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FID (Heusel et al. 2017) of features (N, D), (M, D).

    |mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), covariances over N - 1.  With the centred features as
    factors, Sx = X^T X and Sy = Y^T Y, the eigenvalues of Sx Sy are the squared singular values of X Y^T, so
    the trace of the root is their sum.  No root of a matrix is taken, so fewer samples than dimensions do no
    harm to the sum (the estimate itself is biased upwards on few samples).  Raises ValueError for fewer than
    two rows.
    """
    _need_two(x, y)
    x, y = x.cpu().double(), y.cpu().double()
    difference = x.mean(0) - y.mean(0)
    # The triangular factor R of X = QR has the same R^T R = S, in at most D rows.
    rx, ry = (torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5, mode="r").R for z in (x, y))
    trace = rx.square().sum() + ry.square().sum() - 2 * torch.linalg.svdvals(rx @ ry.T).sum()
    return (difference.square().sum() + trace).item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID (Binkowski et al. 2018) of features (N, D), (M, D).

    The squared MMD with the kernel (ab / D + 1)^3, unbiased: it may be slightly negative.  Over all pairs at
    once; the mean over random subsets that other programs print estimates the same and is noisier.  Raises
    ValueError for fewer than two rows.
    """
    _need_two(x, y)
    x, y = x.cpu().double(), y.cpu().double()
    between = _kernel_sum(x, y) / (len(x) * len(y))
    return (_mean_within(x) + _mean_within(y) - 2 * between).item()


def _kernel(inner: Tensor, dimensions: int) -> Tensor:
    return (inner / dimensions + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Over all pairs of a row of x and a row of y; 1024 rows of x at a time."""
    return sum(_kernel(part @ y.T, x.shape[1]).sum() for part in x.split(1024))


def _mean_within(x: Tensor) -> Tensor:
    """The kernel's mean over the pairs of rows of x, without a row and itself."""
    diagonal = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))


def _need_two(*features: Tensor) -> None:
    if min(map(len, features)) < 2:
        counts = " and ".join(str(len(f)) for f in features)
        raise ValueError(f"FID and KID of {counts} pictures: at least 2 are needed of each")
