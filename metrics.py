"""The measurements of section 5.2: Intra-LPIPS, FID, KID, and the distance to the nearest training picture.

Distances between sets are functions of features (N, D); where the features come from is the caller's choice.  The published
networks that the field compares by are LPIPS (Zhang et al. 2018) and the Inception network of FID (Heusel et al. 2017).
Their packages are imported where they are needed: that takes a second, and the built-in domains do without them.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from plumbing.options import InputError
from plumbing.pictures import to_uint8

# Anything with len() that gives a picture (3, H, W) in [-1, 1] for an index: a tensor, or a data.ImageFolder that reads as needed.
Images = Sequence[Tensor]


# ---- the published networks ------------------------------------------------------------------------------------------


@torch.no_grad()
def inception_features(model: nn.Module, images: Images, batch_size: int = 32, progress: Callable = lambda steps: steps) -> Tensor:
    """What FID and KID compare: N pictures of any one size, rounded to 8 bits and scaled to 299x299 -> float32 (N, 2048), CPU."""
    device = next(model.parameters()).device
    look = lambda x: model(to_uint8(x).permute(0, 3, 1, 2).to(device))[0].cpu()
    return torch.cat([look(_stack(images, rows)) for rows in progress(torch.arange(len(images)).split(batch_size))])


def _stack(images: Images, rows: Tensor) -> Tensor:
    return torch.stack([images[i] for i in rows.tolist()])


# ---- Intra-LPIPS -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def lpips_features(model: nn.Module, images: Tensor) -> Tensor:
    """Features between which LPIPS is the squared Euclidean distance: (B, 3, H, W) in [-1, 1] -> (B, D), on the model's device.

    model   lpips.LPIPS with its linear layers.  LPIPS (Zhang et al. 2018, Eq. 1) sums over layers l the mean over pixels of
            sum_c w_lc (a_lc - b_lc)^2, where a, b are the layer's activations scaled to length 1 at each pixel and no w_lc is
            negative: put sqrt(w_lc / pixels_l) into the features and a plain sum of squares is left.
    D is 8.0 million for VGG at 256x256: 32 MB a picture.
    """
    import lpips
    layers = []
    for activations, linear in zip(model.net(model.scaling_layer(images.to(model.scaling_layer.shift))), model.lins):
        a = lpips.normalize_tensor(activations)                                  # (B, C, h, w)
        w = linear.model[-1].weight                                              # (1, C, 1, 1)
        layers.append(a.mul_((w / a[0, 0].numel()).sqrt()).flatten(1))           # (B, C h w)
    return torch.cat(layers, dim=1)                                              # (B, D)


def squared_distances(a: Tensor, others: Sequence[Tensor]) -> Tensor:
    """(D,), K of (D,) -> (K,).  Differences first: |a|^2 - 2ab + |b|^2 would lose what near pictures differ by."""
    return torch.stack([nn.functional.mse_loss(a, b, reduction="sum") for b in others])


@dataclasses.dataclass
class IntraLPIPS:
    """Per cluster, in the order of the targets."""
    clusters: list[float | None]  # mean distance over the pairs of each cluster; None: dropped, fewer than two samples
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
        return self.clusters.count(None)


@torch.no_grad()
def intra_lpips(embed: Callable[[Tensor], Tensor], samples: Images, targets: Images, cluster_size: int | None = None, seed: int = 0,
                batch_size: int = 4, progress: Callable = lambda steps: steps) -> IntraLPIPS:
    """Diversity within what looks most like the same training picture (section 5.2; Ojha et al. 2021).

    embed            (B, 3, H, W) -> (B, D), such that the distance of two pictures is the squared Euclidean distance of their
                     features: functools.partial(lpips_features, model)
    cluster_size     None: the exact mean over all pairs.  Otherwise over at most so many random members of each cluster, chosen by
                     `seed`; 50 is the reference protocol.
    Each picture goes through the network once, N + K in all.  In memory at a time: 2K + batch_size rows of features for K targets.
    Raises InputError if no cluster has two samples.
    """
    centres = [f for rows in torch.arange(len(targets)).split(batch_size) for f in embed(_stack(targets, rows))]
    # The mean over pairs of |f_i - f_j|^2 is 2 / (n - 1) times the sum of |f_i - mean|^2, which is kept up to date one f at a
    # time (Welford 1962): exact without a loop over pairs, and nothing cancels where the members are nearly equal.
    means, spreads, counted = [torch.zeros_like(c) for c in centres], [0.0] * len(centres), [0] * len(centres)
    sizes, assigned = [0] * len(centres), [0] * len(samples)
    # In a random order the first members of a cluster are a random subset of it.
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    for rows in progress(order.split(batch_size)):
        for i, f in zip(rows.tolist(), embed(_stack(samples, rows))):
            k = assigned[i] = squared_distances(f, centres).argmin().item()
            sizes[k] += 1
            if cluster_size is None or counted[k] < cluster_size:
                counted[k] += 1
                delta = f - means[k]
                means[k] += delta / counted[k]
                spreads[k] += delta.square().sum().item() * (counted[k] - 1) / counted[k]
    clusters = [2 * spread / (n - 1) if n > 1 else None for spread, n in zip(spreads, counted)]
    if clusters.count(None) == len(clusters):
        raise InputError(f"Intra-LPIPS of {len(samples)} samples: no target has two of them; give more samples")
    return IntraLPIPS(clusters, sizes, assigned)


# ---- distances between sets of features ------------------------------------------------------------------------------

def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FID (Heusel et al. 2017) of features (N, D), (M, D): |mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), covariances over N - 1.

    With the centred features as factors, Sx = X^T X and Sy = Y^T Y, the eigenvalues of Sx Sy are the squared singular values
    of X Y^T, so the trace of the root is their sum.  No root of a matrix is taken, so fewer samples than dimensions do no harm
    to the sum (the estimate itself is biased upwards on few samples).  Raises InputError for fewer than two rows.
    """
    _need_two(x, y)
    x, y = x.cpu().double(), y.cpu().double()
    difference = x.mean(0) - y.mean(0)
    # The triangular factor R of X = QR has the same R^T R = S, in at most D rows.
    rx, ry = (torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5, mode="r").R for z in (x, y))
    trace = rx.square().sum() + ry.square().sum() - 2 * torch.linalg.svdvals(rx @ ry.T).sum()
    return (difference.square().sum() + trace).item()


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """KID (Binkowski et al. 2018) of features (N, D), (M, D): squared MMD with the kernel (ab / D + 1)^3, unbiased.

    Over all pairs at once; the mean over random subsets that other programs print estimates the same and is noisier.  It may be
    slightly negative.  Raises InputError for fewer than two rows.
    """
    _need_two(x, y)
    x, y = x.cpu().double(), y.cpu().double()
    kernel = lambda inner: (inner / x.shape[1] + 1) ** 3
    total = lambda a, b: sum(kernel(part @ b.T).sum() for part in a.split(1024))
    within = lambda a: (total(a, a) - kernel(a.square().sum(1)).sum()) / (len(a) * (len(a) - 1))  # without a picture and itself
    return (within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))).item()


def _need_two(*features: Tensor) -> None:
    if min(map(len, features)) < 2:
        raise InputError(f"FID and KID of {' and '.join(str(len(f)) for f in features)} pictures: at least 2 are needed of each")
