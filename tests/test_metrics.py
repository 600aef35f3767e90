"""metrics.py against torch-fidelity, scipy, naive loops and closed forms."""

import itertools
import statistics

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

import metrics


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- Intra-LPIPS, on features that are the pictures themselves ---------------------------------------------

def mean_distance(members):
    """The mean squared distance over all pairs."""
    return statistics.mean((a - b).square().sum().item() for a, b in itertools.combinations(members, 2))


def test_cluster_size_takes_a_random_subset_of_each_cluster():
    """Twelve samples near the first target, three near the second."""
    targets = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 9.0)]).double()
    samples = torch.cat([targets[:1] + randn(12, 3, 2, 2), targets[1:] + randn(3, 3, 2, 2, seed=1)])

    def measure(**options):
        return metrics.intra_lpips(lambda x: x.flatten(1), samples, targets, **options)

    everything = measure()
    assert everything.clusters == pytest.approx([mean_distance(samples[:12]), mean_distance(samples[12:])])
    assert measure(cluster_size=12, seed=5).clusters == pytest.approx(everything.clusters)

    triples = sorted(mean_distance(members) for members in itertools.combinations(samples[:12], 3))
    drawn = [measure(cluster_size=3, seed=seed) for seed in range(60)]
    for result in drawn:
        assert min(abs(result.clusters[0] - d) for d in triples) < 1e-9, "not three members' mean"
        assert result.clusters[1] == pytest.approx(everything.clusters[1]) and result.sizes == [12, 3]
    assert measure(cluster_size=3, seed=7) == drawn[7]
    values = [result.clusters[0] for result in drawn]
    assert len(set(values)) > 40
    # Over the seeds the subsets' mean is the mean over all pairs, within four standard errors.
    error = statistics.pstdev(triples) / 60 ** 0.5
    assert abs(statistics.mean(values) - everything.clusters[0]) < 4 * error


def test_intra_lpips_needs_a_pair():
    far = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    with pytest.raises(ValueError, match="2 samples.*give more samples"):
        metrics.intra_lpips(lambda x: x.flatten(1), far, far)


# ---- Frechet and kernel distances --------------------------------------------------------------------------

def fidelity_fid(x, y):
    of_x, of_y = fid_features_to_statistics(x), fid_features_to_statistics(y)
    return fid_statistics_to_metric(of_x, of_y, False)["frechet_inception_distance"]


def exactly(n, mean, covariance, seed):
    """n rows whose own mean and covariance are exactly these."""
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    z = randn(n, len(mean), seed=seed)
    white = torch.linalg.qr(z - z.mean(0)).Q * (n - 1) ** 0.5
    return white @ torch.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("n, m", [(50, 80), (3, 80)])
def test_frechet_distance_of_gaussians_in_closed_form(n, m):
    # The root of a 2x2 matrix P with eigenvalues a, b: tr = sqrt(a) + sqrt(b) = sqrt(tr P + 2 sqrt(det P)).
    sx = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    sy = torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double()
    root = ((sx @ sy).trace() + 2 * (sx.det() * sy.det()).sqrt()).sqrt()
    expected = 3.0 ** 2 + 1.0 ** 2 + sx.trace() + sy.trace() - 2 * root
    x, y = exactly(n, [1, 2], sx.tolist(), 0), exactly(m, [4, 1], sy.tolist(), 1)
    assert metrics.frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)
    assert metrics.frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_is_the_package_s_and_scipy_s():
    x, y = randn(300, 20), randn(200, 20, seed=1) @ (torch.eye(20) + 0.3 * randn(20, 20, seed=2)) + 0.5
    sx, sy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    by_scipy = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(sx + sy - 2 * root)
    value = metrics.frechet_distance(x, y)
    assert value > 1
    assert value == pytest.approx(by_scipy, rel=1e-8) and value == pytest.approx(fidelity_fid(x, y), rel=1e-8)
    assert metrics.frechet_distance(x.float(), y.float()) == pytest.approx(value, rel=1e-5)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    """Scaled and moved features: Sy = a^2 Sx, (Sx Sy)^(1/2) = a Sx."""
    x, shift = randn(20, 100), randn(100, seed=1)
    variance, mean = x.var(0).sum(), x.mean(0)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-11)
    moved = shift.square().sum().item()
    assert metrics.frechet_distance(x, x + shift) == pytest.approx(moved, rel=1e-10)
    scaled = (0.64 * (mean.square().sum() + variance)).item()
    assert metrics.frechet_distance(x, 0.2 * x) == pytest.approx(scaled, rel=1e-10)
    y = randn(30, 100, seed=2)
    assert metrics.frechet_distance(x, y) == pytest.approx(fidelity_fid(x, y), rel=1e-5)


@pytest.mark.parametrize("n", [40, 1100])  # 1100: more rows than are multiplied at once
def test_kernel_distance_is_the_package_s(n):
    x, y = randn(n, 16), randn(n, 16, seed=1) * 1.2 + 0.3
    package = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=n, verbose=False)
    expected = package["kernel_inception_distance_mean"]
    assert abs(expected) > 0.01 and metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_sets_of_different_sizes_is_the_double_loop():
    def kernel(a, b):
        return (a @ b / 5 + 1).item() ** 3

    def within(rows):
        return statistics.mean(kernel(a, b) for a, b in itertools.permutations(rows, 2))

    x, y = randn(7, 5), randn(4, 5, seed=1) + 1
    expected = within(x) + within(y) - 2 * statistics.mean(kernel(a, b) for a in x for b in y)
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
def test_a_single_picture_has_no_distribution(distance):
    with pytest.raises(ValueError, match="1 and 5 pictures"):
        distance(randn(1, 4), randn(5, 4))


def test_distance_to_the_nearest_picture_in_pixels():
    """Copies and mirrored copies are at 0, a constant offset at itself; the median is over the samples."""
    targets = randn(3, 3 * 8 * 8).view(3, 3, 8, 8)
    assert metrics.nearest_rms(targets, targets) == metrics.nearest_rms(targets.flip(3), targets) == 0
    assert metrics.nearest_rms(targets.flip(2), targets) > 0.5
    moved = targets + torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1, 1)
    assert metrics.nearest_rms(moved, targets) == pytest.approx(0.2, rel=1e-5)
    assert metrics.nearest_rms(moved[2:], targets) == pytest.approx(0.4, rel=1e-5)
