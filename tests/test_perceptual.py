"""checkpoints/perceptual.py against lpips and torch-fidelity; random backbones, so nothing is downloaded."""

import functools
import hashlib
import io
import itertools
import statistics
import warnings

import lpips
import pytest
import scipy.linalg
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from checkpoints.perceptual import (
    inception_features,
    load_inception,
    load_lpips,
    lpips_features,
    published_weights,
    scorer,
)
from metrics import intra_lpips, kernel_distance, squared_distances
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


# ---- LPIPS -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("net", ["vgg", "squeeze"])
def test_squared_distance_of_features_is_lpips(net):
    model, a, b = random_lpips(net), randn(3, 3, 48, 40).tanh(), randn(3, 3, 48, 40, seed=1).tanh()
    fa, fb = lpips_features(model, a), lpips_features(model, b)
    expected = model(a, b).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close((fa - fb).square().sum(1), expected)
    torch.testing.assert_close(squared_distances(fa[0], fb)[0], expected[0])


def naive_intra_lpips(model, samples, targets):
    """Section 5.2 pair by pair -> (mean per cluster or None, target of each sample)."""
    def distance(a, b):
        return model(a[None], b[None]).item()

    assigned, clusters = [], []
    for sample in samples:
        to_targets = [distance(sample, target) for target in targets]
        assigned.append(to_targets.index(min(to_targets)))
    for k in range(len(targets)):
        members = [sample for sample, j in zip(samples, assigned) if j == k]
        pairs = [distance(a, b) for a, b in itertools.combinations(members, 2)]
        clusters.append(statistics.mean(pairs) if pairs else None)
    return clusters, assigned


@pytest.fixture(scope="module")
def clustered():
    """Seven samples around three of four targets: three, three and one."""
    targets = randn(4, 3, 32, 32).tanh()
    samples = targets[[2, 0, 2, 1, 0, 2, 0]] + 0.3 * randn(7, 3, 32, 32, seed=1)
    return samples.clamp(-1, 1), targets


def test_intra_lpips_is_the_naive_double_loop(squeeze, clustered):
    samples, targets = clustered
    clusters, assigned = naive_intra_lpips(squeeze, samples, targets)
    passes = []
    hook = squeeze.net.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    result = intra_lpips(functools.partial(lpips_features, squeeze), samples, targets)
    hook.remove()
    assert result.assigned == assigned == [2, 0, 2, 1, 0, 2, 0]
    assert result.sizes == [3, 1, 3, 0] and result.dropped == 2
    assert clusters[1] is clusters[3] is result.clusters[1] is result.clusters[3] is None
    kept = clusters[::2]
    assert result.clusters[::2] == pytest.approx(kept, rel=1e-9)
    assert result.mean == pytest.approx(sum(kept) / 2) and result.std == pytest.approx(statistics.stdev(kept))
    assert sum(passes) == len(samples) + len(targets)


def test_intra_lpips_of_nearly_equal_samples(squeeze, clustered):
    """A collapsed model, in float32 as programs run it: distances 1e-7 of the size of the features."""
    targets = clustered[1]
    samples = targets[:1] + 1e-3 + 1e-5 * randn(6, 3, 32, 32, seed=2)
    clusters, _ = naive_intra_lpips(squeeze, samples, targets)
    embed = functools.partial(lpips_features, squeeze)
    result = intra_lpips(lambda x: embed(x).float(), samples, targets)
    assert clusters[0] < 1e-7 * embed(samples[:1]).square().sum().item()
    assert result.clusters[0] == pytest.approx(clusters[0], rel=0.01) and result.sizes == [6, 0, 0, 0]


# ---- files of weights --------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub; returns its folder of checkpoints."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


def torchvision_names(model):
    weights = model.net.state_dict()
    return {"features." + name.split(".", 1)[1]: value.float() for name, value in weights.items()}


def test_backbone_from_a_file_and_from_torch_hub(squeeze, hub, tmp_path):
    weights = torchvision_names(squeeze)
    assert "features.3.squeeze.weight" in weights
    torch.save(weights, tmp_path / "features.pth")
    hub.mkdir(parents=True)
    whole = {**weights, "classifier.1.weight": torch.zeros(1000, 512, 1, 1)}
    torch.save(whole, hub / "squeezenet1_1-b8a52dc0.pth")
    a, b = randn(1, 3, 32, 32).float(), randn(1, 3, 32, 32, seed=1).float()
    for model in load_lpips("squeeze", tmp_path / "features.pth"), load_lpips("squeeze"):
        assert not model.training
        torch.testing.assert_close(model(a, b), squeeze(a.double(), b.double()).float())


def test_missing_weights_say_which_file_goes_where(hub):
    with pytest.raises(InputError) as error:
        load_lpips("vgg")
    message = str(error.value)
    assert message.startswith(str(hub / "vgg16-397923af.pth")) and "\n" not in message
    assert "fetch https://download.pytorch.org/models/vgg16-397923af.pth" in message
    assert "--lpips-backbone FILE" in message
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(InputError, match=f"{name}: not there.*--inception-weights FILE"):
        load_inception()


def test_download_is_checked_and_fails_clearly(hub, tmp_path):
    origin = tmp_path / f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"

    def fetch():
        return published_weights(origin.as_uri(), "--flag", download=True)

    remedy = "put it there, or give it with --flag FILE"
    with pytest.raises(InputError, match=f"could not be downloaded.*{remedy}"):
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
        with pytest.raises(InputError, match="code.pth: a pickled object of class .*, whose code is not run"):
            load(tmp_path / "code.pth")
        with pytest.raises(InputError, match="none.pth: no such file"):
            load(tmp_path / "none.pth")


# ---- Inception ---------------------------------------------------------------------------------------------

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
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    features = inception_features(model, to_tensor(pixels.permute(0, 2, 3, 1)), batch_size=2)
    assert features.shape == (3, 2048) and features.std(0).max() > 0
    torch.testing.assert_close(features, package(pixels)[0])


def test_fid_and_kid_are_those_of_the_features(backbone):
    """In three dimensions, against the closed form with scipy's root of a matrix."""
    g = torch.Generator().manual_seed(0)
    samples, targets, reference = (torch.rand(n, 3, 32, 32, generator=g) ** power * 2 - 1 for n, power in ((9, 1), (3, 1), (7, 2)))
    figures = scorer(load_lpips("squeeze", backbone), targets, 32, lambda images: 50 * images.mean((2, 3)), reference)(samples)[1]
    x, y = (50 * images.mean((2, 3)).double() for images in (samples, reference))
    root = scipy.linalg.sqrtm((torch.cov(x.T) @ torch.cov(y.T)).numpy()).trace().real
    fid = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    assert figures["FID"] == pytest.approx(fid.item(), rel=1e-4)
    assert figures["KID"] == pytest.approx(kernel_distance(x, y), rel=1e-4)
