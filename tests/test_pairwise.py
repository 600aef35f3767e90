"""pairwise.py against a naive loop, PyTorch's own divergence, and the definition of the Haar wavelet."""

import pytest
import torch
import torch.nn.functional as F

import domains
import train_tan
from baselines import pairwise
from checkpoints import run_folder
from plumbing.files import read_metrics
from plumbing.options import InputError
from plumbing.seeds import generator


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_high_frequency_is_what_the_blurred_picture_lacks():
    """The orthonormal Haar transform keeps the energy: LL^2 + LH^2 + HL^2 + HH^2 = x^2; flat pictures have no detail."""
    x = randn(2, 3, 8, 8)
    low, high = torch.tensor([1.0, 1.0]) / 2 ** 0.5, torch.tensor([-1.0, 1.0]) / 2 ** 0.5
    band = lambda rows, columns: F.conv2d(x.flatten(0, 1)[:, None], torch.outer(rows, columns)[None, None], stride=2)[:, 0]
    bands = [band(r, c) for r, c in ((low, low), (low, high), (high, low), (high, high))]
    torch.testing.assert_close(sum(b.square().sum() for b in bands), x.square().sum())
    torch.testing.assert_close(pairwise.high_frequency(x).flatten(0, 1), sum(bands[1:]))
    assert pairwise.high_frequency(torch.ones(1, 3, 4, 4)).abs().max() == 0


def test_similarities_against_a_loop():
    x = randn(5, 3, 4, 4)
    found = pairwise.log_similarities(x).exp()
    for i in range(5):
        others = torch.stack([F.cosine_similarity(x[i].flatten(), x[j].flatten(), dim=0) for j in range(5) if j != i])
        torch.testing.assert_close(found[i], others.softmax(0))


def test_loss():
    adapted, source, x0 = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2)
    divergence = lambda a, b: F.kl_div(pairwise.log_similarities(b), pairwise.log_similarities(a), reduction="none", log_target=True).sum(1)
    high = pairwise.high_frequency
    expected = 0.5 * divergence(adapted, source) + 2 * divergence(high(adapted), high(source))
    expected += 0.05 * (high(adapted) - high(x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(pairwise.pairwise_loss(adapted, source, x0, 0.5, 2.0, 0.05), expected)
    assert pairwise.pairwise_loss(source, source, source, 4, 4, 1).abs().max() < 1e-6
    assert pairwise.pairwise_loss(adapted[:1], source[:1], adapted[:1], 4, 4, 1).abs().max() == 0  # one picture alone


def test_a_run(train, tmp_path):
    """The source network is the one from before: at first the divergences are 0, later they are not."""
    runs = {method: train(tmp_path / method, "--method", method, "--pairwise-weights", 4, 4, 0) for method in ("pa", "finetune")}
    losses = {method: [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for method, folder in runs.items()}
    assert losses["pa"][0] == pytest.approx(losses["finetune"][0], abs=1e-6) and losses["pa"][-1] != losses["finetune"][-1]
    ends = {method: run_folder.load_run(folder)[0].model.state_dict() for method, folder in runs.items()}
    assert ends["pa"].keys() == ends["finetune"].keys() and not any(".adaptor." in key for key in ends["pa"])
    assert any(not torch.equal(ends["pa"][key], value) for key, value in ends["finetune"].items())


def test_the_noisier_the_less_it_weighs(train, tmp_path, monkeypatch):
    """Each picture's gradient comes with its alpha_bar_t, through its own loss and through those of the others."""
    seen, loss = [], train_tan.pairwise_loss

    def spy(adapted, *others):
        adapted.retain_grad()
        seen.append((adapted, *others))
        return loss(adapted, *others)

    monkeypatch.setattr(train_tan, "pairwise_loss", spy)
    scaled = []
    monkeypatch.setattr(train_tan, "scale_gradient", lambda x, factor: scaled.append((x.retain_grad() or x, factor)) or pairwise.scale_gradient(x, factor))
    out = train(tmp_path / "run", "--method", "pa", "--iterations", 1, "--batch-size", 8, "--seed", 3, "--pairwise-weights", 4, 4, 1)
    (adapted, source, x0, *weights), (x, factor) = seen[0], scaled[0]
    torch.testing.assert_close(adapted, source)  # the same network still
    shots = domains.target_images(run_folder.load_run(out)[1]["target"], 16)
    assert all(any(torch.equal(picture, shot) for shot in torch.cat([shots, shots.flip(3)])) for picture in x0) and weights == [4, 4, 1]
    torch.testing.assert_close(adapted, x)
    torch.testing.assert_close(x.grad, factor * adapted.grad)
    g = generator(3, 0, 0)
    torch.randint(len(domains.target_images(run_folder.load_run(out)[1]["target"], 32)), (8,), generator=g)
    schedule = run_folder.load_run(out)[0].schedule
    t = torch.randint(schedule.timesteps, (8,), generator=g)
    torch.testing.assert_close(factor.flatten(), schedule.at(t, torch.ones(8)))


@pytest.mark.parametrize("weights", [[1, 2], [1, 1, -1], [1, 1, "nan"]])
def test_three_weights(train, tmp_path, weights):
    with pytest.raises(InputError, match="--pairwise-weights.*three numbers"):
        train(tmp_path / "run", "--method", "pa", "--pairwise-weights", *weights)


@pytest.mark.parametrize("flags", [["--micro-batch-size", 1], ["--batch-size", 1], ["--batch-size", 7, "--micro-batch-size", 3]])
def test_pictures_need_company(train, tmp_path, flags):
    with pytest.raises(InputError, match="--method pa compares pictures"):
        train(tmp_path / "run", "--method", "pa", *flags)
