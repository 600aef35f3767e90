"""metrics.py against lpips and torch-fidelity, naive loops and closed forms, with random backbones: nothing is downloaded."""

import functools
import hashlib
import io
import itertools
import statistics
import warnings

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

import metrics
from checkpoints.perceptual import load_inception, load_lpips, published_weights
from plumbing.options import InputError
from plumbing.pictures import to_tensor


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_lpips(net):
    """A random backbone under the genuine linear weights, in float64 so that sums in another order agree."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False).requires_grad_(False).double()


@pytest.fixture(scope="module")
def squeeze():
    return random_lpips("squeeze")


# ---- LPIPS -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_squared_distance_of_features_is_lpips(net):
    model, a, b = random_lpips(net), randn(3, 3, 48, 40).tanh(), randn(3, 3, 48, 40, seed=1).tanh()
    fa, fb = metrics.lpips_features(model, a), metrics.lpips_features(model, b)
    expected = model(a, b).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close((fa - fb).square().sum(1), expected)
    torch.testing.assert_close(metrics.squared_distances(fa[0], fb)[0], expected[0])


def naive_intra_lpips(model, samples, targets):
    """Section 5.2 pair by pair -> (mean per cluster or None, target of each sample)."""
    distance = lambda a, b: model(a[None], b[None]).item()
    assigned = [min(range(len(targets)), key=lambda k: distance(s, targets[k])) for s in samples]
    clusters = []
    for k in range(len(targets)):
        pairs = [distance(a, b) for a, b in itertools.combinations([s for s, j in zip(samples, assigned) if j == k], 2)]
        clusters.append(statistics.mean(pairs) if pairs else None)
    return clusters, assigned


@pytest.fixture(scope="module")
def clustered():
    """Seven samples around three of four targets: three, three and one."""
    targets = randn(4, 3, 32, 32).tanh()
    return (targets[[2, 0, 2, 1, 0, 2, 0]] + 0.3 * randn(7, 3, 32, 32, seed=1)).clamp(-1, 1), targets


def test_intra_lpips_is_the_naive_double_loop(squeeze, clustered):
    samples, targets = clustered
    clusters, assigned = naive_intra_lpips(squeeze, samples, targets)
    passes = []
    hook = squeeze.net.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    result = metrics.intra_lpips(functools.partial(metrics.lpips_features, squeeze), samples, targets)
    hook.remove()
    assert result.assigned == assigned == [2, 0, 2, 1, 0, 2, 0] and result.sizes == [3, 1, 3, 0] and result.dropped == 2
    assert clusters[1] is clusters[3] is result.clusters[1] is result.clusters[3] is None
    kept = clusters[::2]
    assert result.clusters[::2] == pytest.approx(kept, rel=1e-9)
    assert result.mean == pytest.approx(sum(kept) / 2) and result.std == pytest.approx(statistics.stdev(kept))
    assert sum(passes) == len(samples) + len(targets)


def test_intra_lpips_of_nearly_equal_samples(squeeze, clustered):
    """A collapsed model, in float32 as programs run it: distances ten million times under the size of the features."""
    targets = clustered[1]
    samples = targets[:1] + 1e-3 + 1e-5 * randn(6, 3, 32, 32, seed=2)
    clusters, _ = naive_intra_lpips(squeeze, samples, targets)
    embed = functools.partial(metrics.lpips_features, squeeze)
    result = metrics.intra_lpips(lambda x: embed(x).float(), samples, targets)
    assert clusters[0] < 1e-7 * embed(samples[:1]).square().sum().item()
    assert result.clusters[0] == pytest.approx(clusters[0], rel=0.01) and result.sizes == [6, 0, 0, 0]


def test_cluster_size_takes_a_random_subset_of_each_cluster():
    """On features that are the pictures themselves: twelve samples near the first target, three near the second."""
    targets = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 9.0)]).double()
    samples = torch.cat([targets[:1] + randn(12, 3, 2, 2), targets[1:] + randn(3, 3, 2, 2, seed=1)])
    measure = lambda **options: metrics.intra_lpips(lambda x: x.flatten(1), samples, targets, **options)
    distance = lambda members: statistics.mean((a - b).square().sum().item() for a, b in itertools.combinations(members, 2))
    everything = measure()
    assert everything.clusters == pytest.approx([distance(samples[:12]), distance(samples[12:])])
    assert measure(cluster_size=12, seed=5).clusters == pytest.approx(everything.clusters)

    triples = sorted(distance(members) for members in itertools.combinations(samples[:12], 3))
    drawn = [measure(cluster_size=3, seed=seed) for seed in range(60)]
    for result in drawn:
        assert min(abs(result.clusters[0] - d) for d in triples) < 1e-9, "not the mean over the pairs of three members"
        assert result.clusters[1] == pytest.approx(everything.clusters[1]) and result.sizes == [12, 3]
    assert measure(cluster_size=3, seed=7) == drawn[7]
    values = [result.clusters[0] for result in drawn]
    assert len(set(values)) > 40
    # Over the seeds the subsets' mean is the mean over all pairs, within four standard errors.
    assert abs(statistics.mean(values) - everything.clusters[0]) < 4 * statistics.pstdev(triples) / 60 ** 0.5


def test_intra_lpips_needs_a_pair():
    far = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    with pytest.raises(InputError, match="2 samples.*give more samples"):
        metrics.intra_lpips(lambda x: x.flatten(1), far, far)


# ---- Frechet and kernel distances ------------------------------------------------------------------------------------

def fidelity_fid(x, y):
    return fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)["frechet_inception_distance"]


def exactly(n, mean, covariance, seed):
    """n rows whose own mean and covariance are exactly these."""
    mean, covariance = torch.tensor(mean).double(), torch.tensor(covariance).double()
    z = randn(n, len(mean), seed=seed)
    white = torch.linalg.qr(z - z.mean(0)).Q * (n - 1) ** 0.5
    return white @ torch.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("n, m", [(50, 80), (3, 80)])
def test_frechet_distance_of_gaussians_in_closed_form(n, m):
    # The root of a 2x2 matrix P with eigenvalues a, b: tr = sqrt(a) + sqrt(b) = sqrt(tr P + 2 sqrt(det P)).
    sx, sy = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double()
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
    moved = lambda a, b: metrics.frechet_distance(x, a * x + b)
    assert moved(1, 0) == pytest.approx(0, abs=1e-11)
    assert moved(1, shift) == pytest.approx(shift.square().sum().item(), rel=1e-10)
    assert moved(0.2, 0) == pytest.approx((0.64 * (mean.square().sum() + variance)).item(), rel=1e-10)
    y = randn(30, 100, seed=2)
    assert metrics.frechet_distance(x, y) == pytest.approx(fidelity_fid(x, y), rel=1e-5)


@pytest.mark.parametrize("n", [40, 1100])  # 1100: more rows than are multiplied at once
def test_kernel_distance_is_the_package_s(n):
    x, y = randn(n, 16), randn(n, 16, seed=1) * 1.2 + 0.3
    package = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=n, verbose=False)["kernel_inception_distance_mean"]
    assert abs(package) > 0.01 and metrics.kernel_distance(x, y) == pytest.approx(package, rel=1e-9)


def test_kernel_distance_of_sets_of_different_sizes_is_the_double_loop():
    x, y = randn(7, 5), randn(4, 5, seed=1) + 1
    k = lambda a, b: (a @ b / 5 + 1).item() ** 3
    within = lambda s: statistics.mean(k(a, b) for a, b in itertools.permutations(s, 2))
    expected = within(x) + within(y) - 2 * statistics.mean(k(a, b) for a in x for b in y)
    assert metrics.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
def test_a_single_picture_has_no_distribution(distance):
    with pytest.raises(InputError, match="1 and 5 pictures"):
        distance(randn(1, 4), randn(5, 4))


# ---- files of weights ------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub; returns its folder of checkpoints."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


def torchvision_names(model):
    return {"features." + name.split(".", 1)[1]: value.float() for name, value in model.net.state_dict().items()}


def test_backbone_from_a_file_and_from_torch_hub(squeeze, hub, tmp_path):
    weights = torchvision_names(squeeze)
    assert "features.3.squeeze.weight" in weights
    torch.save(weights, tmp_path / "features.pth")
    hub.mkdir(parents=True)
    torch.save({**weights, "classifier.1.weight": torch.zeros(1000, 512, 1, 1)}, hub / "squeezenet1_1-b8a52dc0.pth")
    a, b = randn(1, 3, 32, 32).float(), randn(1, 3, 32, 32, seed=1).float()
    for model in load_lpips("squeeze", tmp_path / "features.pth"), load_lpips("squeeze"):
        assert not model.training
        torch.testing.assert_close(model(a, b), squeeze(a.double(), b.double()).float())


def test_missing_weights_say_which_file_goes_where(hub):
    with pytest.raises(InputError) as error:
        load_lpips("vgg")
    message = str(error.value)
    assert message.startswith(str(hub / "vgg16-397923af.pth")) and "\n" not in message
    assert "fetch https://download.pytorch.org/models/vgg16-397923af.pth" in message and "--lpips-backbone FILE" in message
    with pytest.raises(InputError, match="weights-inception-2015-12-05-6726825d.pth: not there.*--inception-weights FILE"):
        load_inception()


def test_download_is_checked_and_fails_clearly(hub, tmp_path):
    origin = tmp_path / f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    fetch = lambda: published_weights(origin.as_uri(), "--flag", download=True)
    with pytest.raises(InputError, match="could not be downloaded.*put it there, or give it with --flag FILE"):
        fetch()
    origin.write_bytes(b"something else")
    with pytest.raises(InputError, match="could not be downloaded .*hash"):
        fetch()
    assert not list(hub.iterdir())
    origin.write_bytes(b"weights")
    assert fetch() == hub / origin.name and fetch().read_bytes() == b"weights"


def test_weights_of_another_network_and_unsafe_files(squeeze, tmp_path):
    torch.save(torchvision_names(squeeze), tmp_path / "squeeze.pth")
    with pytest.raises(InputError, match="squeeze.pth: not torchvision's weights for alex"):
        load_lpips("alex", tmp_path / "squeeze.pth")
    with pytest.raises(InputError, match="squeeze.pth: not the Inception weights"):
        load_inception(tmp_path / "squeeze.pth")
    torch.save(squeeze, tmp_path / "code.pth")
    for load in functools.partial(load_lpips, "squeeze"), load_inception:
        with pytest.raises(InputError, match="code.pth: not a file of weights that can be read safely"):
            load(tmp_path / "code.pth")
        with pytest.raises(InputError, match="none.pth: no such file"):
            load(tmp_path / "none.pth")


def test_inception_features_are_the_package_s(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    package = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    monkeypatch.undo()
    torch.save(package.state_dict(), tmp_path / "inception.pth")
    model = load_inception(tmp_path / "inception.pth")
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = metrics.inception_features(model, to_tensor(pixels.permute(0, 2, 3, 1)), batch_size=2)
    assert features.shape == (3, 2048) and features.std(0).max() > 0
    torch.testing.assert_close(features, package(pixels)[0])
