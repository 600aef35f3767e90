"""pairwise.py against a naive loop, PyTorch's own divergence, and the definition of the Haar wavelet."""

import pytest
import torch
import torch.nn.functional as F
from conftest import call, tiny_network
from torch import nn

import train_tan
from baselines import pairwise
from checkpoints import run_folder
from checkpoints.load import load_source
from ddpm import Schedule, predict_eps
from plumbing.files import load_checkpoint, read_metrics
from plumbing.options import InputError
from plumbing.picture_folder import load_folder
from settings import Options


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


class Linear(nn.Module):
    """eps_theta(x_t, t) = w x_t."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, xt, t):
        return self.w * xt


def test_the_source_network_is_the_one_from_before_and_x0_is_limited():
    schedule, model = Schedule(), Linear(0.3)
    added = pairwise.PairwiseLosses(model, schedule, 1.0, (4.0, 4.0, 1.0))
    model.w.data.fill_(0.9)  # training goes on
    xt, x0, t = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), torch.tensor([10, 300, 700, 999])
    before, now = (schedule.predict_x0(xt, t, w * xt) for w in (0.3, 0.9))
    assert before.abs().max() > 10 and now.abs().max() > 10  # where nearly all is noise
    expected = pairwise.pairwise_loss(now.clamp(-1, 1), before.clamp(-1, 1), x0, 4.0, 4.0, 1.0)
    torch.testing.assert_close(added(xt, t, model(xt, t), x0), expected)
    assert all(not p.requires_grad for p in added.source.parameters())


def test_bf16_is_for_the_networks_alone():
    """The similarities of two networks that hardly differ: in bf16 their KL came out negative."""
    added, xt, t = pairwise.PairwiseLosses(Linear(0.3), Schedule(), 1e6, (1.0, 0.0, 0.0)), randn(4, 3, 8, 8), torch.tensor([100, 200, 300, 400])
    eps = 0.3 * xt + 0.1 * randn(4, 3, 8, 8, seed=1)
    exact = added(xt, t, eps, xt)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(added(xt, t, eps, xt), exact)
    assert (exact > 0).all()


def test_the_noisier_the_less_it_weighs(monkeypatch):
    """Each picture's gradient comes with its alpha_bar_t, through its own loss and through those of the others."""
    schedule, t = Schedule(), torch.tensor([10, 200, 400, 500])
    added = pairwise.PairwiseLosses(Linear(0.3), schedule, 1e6, (4.0, 4.0, 1.0))
    xt, x0, eps = randn(4, 3, 8, 8), randn(4, 3, 8, 8, seed=1), randn(4, 3, 8, 8, seed=2).requires_grad_()
    gradient, = torch.autograd.grad(added(xt, t, eps, x0).sum(), eps)
    monkeypatch.setattr(pairwise, "scale_gradient", lambda x, factor: x)
    unscaled, = torch.autograd.grad(added(xt, t, eps, x0).sum(), eps)
    torch.testing.assert_close(gradient, schedule.at(t, xt) * unscaled)


def test_a_run(train, tmp_path):
    """At first the divergences are 0, later they are not; what comes out is all of theta."""
    pa = train(tmp_path / "pa", "--method", "pa", "--pairwise-weights", 4, 4, 0)
    finetune = train(tmp_path / "finetune", "--method", "finetune")
    losses = {folder: [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (pa, finetune)}
    assert losses[pa][0] == pytest.approx(losses[finetune][0], abs=1e-6) and losses[pa][-1] > losses[finetune][-1] + 1e-5
    ends = [run_folder.load_run(folder)[0].model.state_dict() for folder in (pa, finetune)]
    assert ends[0].keys() == ends[1].keys() and not any(".adaptor." in key for key in ends[0])
    assert any(not torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_a_resumed_run_compares_as_many_pictures(train, tmp_path):
    run = train(tmp_path / "run", "--method", "pa", "--iterations", 1)
    with pytest.raises(InputError, match="began with 1 process.es. and micro-batches of 4, now it would be .* of 2"):
        call(train_tan.main, "--output-dir", run, "--resume", "--iterations", 2, "--micro-batch-size", 2)


@pytest.mark.parametrize("weights", [[1, 2], [1, 1, -1], [1, 1, "nan"]])
def test_three_weights(train, tmp_path, weights):
    with pytest.raises(InputError, match="--pairwise-weights.*(three numbers|must be at least 0)"):
        train(tmp_path / "run", "--method", "pa", "--pairwise-weights", *weights)


@pytest.mark.parametrize("flags", [["--micro-batch-size", 1], ["--batch-size", 1], ["--batch-size", 7, "--micro-batch-size", 3]])
def test_pictures_need_company(train, tmp_path, flags):
    with pytest.raises(InputError, match="--method pa compares pictures"):
        train(tmp_path / "run", "--method", "pa", *flags)


def test_what_sampling_limits_x0_to():
    source, options = tiny_network(), Options(method="pa")
    assert train_tan.pairwise_losses(source, options).clip == 1
    source.clip = 3.5  # of latents
    assert train_tan.pairwise_losses(source, options).clip == 3.5


def test_what_a_run_compares(train, tiny, tmp_path, monkeypatch):
    seen, original = [], pairwise.PairwiseLosses.__call__
    monkeypatch.setattr(pairwise.PairwiseLosses, "__call__", lambda self, *a: seen.append(a) or original(self, *a))
    train(tmp_path / "run", "--method", "pa", "--iterations", 1)
    (xt, t, eps, x0), = seen
    shots, network = load_folder(tiny.targets, 16), load_source(str(tiny.source))
    assert all(any(x.equal(shot) for shot in torch.cat([shots, shots.flip(3)])) for x in x0)
    torch.testing.assert_close(eps, predict_eps(network.model, xt, t, network.schedule))  # before the first step
    noise = (xt - network.schedule.at(t, x0).sqrt() * x0) / (1 - network.schedule.at(t, x0)).sqrt()
    assert abs(noise.std() - 1) < 0.1


def test_a_checkpoint_that_does_not_say_what_was_compared(train, tmp_path):
    run = train(tmp_path / "run", "--method", "pa", "--iterations", 1)
    state = load_checkpoint(run / "checkpoint.pt")
    del state["compared"]  # as it was saved once
    torch.save(state, run / "checkpoint.pt")
    call(train_tan.main, "--output-dir", run, "--resume", "--iterations", 2)
    assert len(read_metrics(run / "metrics.jsonl")) == 2
