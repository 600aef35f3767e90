"""adversarial_noise.py against finite differences, closed forms, and the ways in which such loops go wrong elsewhere."""

import pytest
import torch
from torch import nn

import adversarial_noise
from adversarial_noise import norm, worst_case_noise
from ddpm import Schedule
from unet import UNet

SCHEDULE = Schedule()
T = torch.tensor([20, 700, 999])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def x0_and_eps(dtype=torch.float32, size=4):
    return randn(3, 3, size, size, dtype=dtype).clamp(-1, 1), randn(3, 3, size, size, seed=1, dtype=dtype)


def a_bar(t, dtype=torch.float64):
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].to(dtype).view(-1, 1, 1, 1)


class Net(nn.Module):
    """A small nonlinear network that also looks at t."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Dropout(dropout), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x, t):
        return self.layers(x) * (1 + t.view(-1, 1, 1, 1) / 1000)


def tiny_unet():
    torch.manual_seed(0)
    unet = UNet(image_size=8, in_channels=3, model_channels=8, out_channels=6, num_res_blocks=1, attention_resolutions=[2],
                channel_mult=[1, 2], norm_groups=4, dropout=0.5)
    for i, p in enumerate(unet.parameters()):
        p.data += 0.1 * randn(*p.shape, seed=i)  # no layer of zeros
    return unet


@pytest.fixture
def without_norm(monkeypatch):
    """One step then gives eps + omega * gradient, from which the gradient can be read."""
    monkeypatch.setattr(adversarial_noise, "norm", lambda eps, dims, like: eps)


def pgd_gradient(model, x0, t, eps):
    return worst_case_noise(model, SCHEDULE, x0, t, eps, J=1, omega=1.0)[0] - eps


# ---- the step, Eq. 8 -------------------------------------------------------------------------------------------------

def test_gradient_is_the_finite_difference_of_the_loss(without_norm):
    model, (x0, eps), h = Net().double(), x0_and_eps(torch.float64), 1e-5
    loss = lambda eps: (eps - model(a_bar(T).sqrt() * x0 + (1 - a_bar(T)).sqrt() * eps, T)).pow(2).sum((1, 2, 3)).detach()
    gradient = pgd_gradient(model, x0, T, eps)
    for i in range(0, eps[0].numel(), 5):  # the same pixel of each image at a time: an image's loss knows its own noise only
        step = torch.zeros_like(eps).flatten(1)
        step[:, i] = h
        slope = (loss(eps + step.view_as(eps)) - loss(eps - step.view_as(eps))) / (2 * h)
        torch.testing.assert_close(gradient.flatten(1)[:, i], slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(worst_case_noise(model, SCHEDULE, x0, T, eps, J=1)[1][0], loss(eps))


def test_gradient_goes_through_the_network(without_norm):
    model, (x0, eps) = Net(), x0_and_eps()
    xt = SCHEDULE.add_noise(x0, T, eps)
    detached = 2 * (eps - model(xt, T)).detach()  # what is left if eps_theta counts as a constant
    assert (pgd_gradient(model, x0, T, eps) - detached).abs().max() > 0.1


def test_one_step_on_the_gaussian_oracle_is_the_closed_form():
    """eps_theta = k (x_t - sqrt(a) mu): the loss is |r|^2 with r = eps - eps_theta, its gradient 2 (1 - k sqrt(1-a)) r."""
    mu, s, omega = 0.3, 0.5, 0.02
    x0, eps = x0_and_eps(torch.float64)
    a = a_bar(T)
    k = (1 - a).sqrt() / (a * s ** 2 + 1 - a)
    ours, losses = worst_case_noise(lambda x, t: k * (x - a.sqrt() * mu), SCHEDULE, x0, T, eps, J=1, omega=omega)
    r = eps - k * (a.sqrt() * (x0 - mu) + (1 - a).sqrt() * eps)
    ascended = eps + omega * 2 * (1 - k * (1 - a).sqrt()) * r
    rows = ascended.flatten(1)
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, correction=0)).sqrt()
    torch.testing.assert_close(ours, expected.view_as(eps))
    torch.testing.assert_close(losses[0], r.pow(2).sum((1, 2, 3)))


def test_norm():
    eps = norm(5 + 3 * randn(4, 3, 8, 8))
    torch.testing.assert_close(eps.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(eps.pow(2).mean((1, 2, 3)), torch.ones(4))
    points = norm(5 + 3 * randn(100, 2), dims=(0,))  # toy2d: over the batch, each dimension on its own
    torch.testing.assert_close(points.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(points.pow(2).mean(0), torch.ones(2))


def test_norm_gives_a_noise_its_own_moments_back():
    drawn = randn(4, 3, 8, 8)
    eps = norm(5 + 3 * drawn, like=drawn)  # nothing but moments was changed, and they are changed back
    torch.testing.assert_close(eps, drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["paper", "own"])
def test_what_the_mean_of_xt_tells_of_x0(own):
    """R^2 of the brightness of x_0 from the mean of x_t alone: of plain noise a v / (a v + (1 - a) / D), v its variance.

    As printed Norm leaves no noise in the mean: at any timestep it tells the brightness exactly, which in sampling it does not.
    """
    n, size, t = 2000, 8, torch.tensor([900])
    brightness = 0.3 * randn(n, 1, 1, 1)
    x0, eps = brightness + 0.1 * randn(n, 3, size, size, seed=1), randn(n, 3, size, size, seed=2)
    worst, _ = worst_case_noise(Net(), SCHEDULE, x0, t.expand(n), eps, J=2, omega=0.05, own=own)
    assert (worst - norm(eps)).abs().mean() > 0.01  # there was an ascent
    means = [x.mean((1, 2, 3)) for x in (x0, SCHEDULE.add_noise(x0, t.expand(n), worst))]
    told = torch.corrcoef(torch.stack(means))[0, 1].item() ** 2
    a, v = a_bar(t).item(), means[0].var().item()
    plain = a * v / (a * v + (1 - a) / (3 * size ** 2))
    assert plain < 0.01 and told == pytest.approx(plain if own else 1, abs=0.02)


def test_ascent_keeps_each_noises_own_moments():
    x0, eps = x0_and_eps(size=8)
    worst, losses = worst_case_noise(Net(), SCHEDULE, x0, T, eps, J=3, omega=0.05, own=True)
    torch.testing.assert_close(worst.mean((1, 2, 3)), eps.mean((1, 2, 3)))
    torch.testing.assert_close(worst.std((1, 2, 3)), eps.std((1, 2, 3)))
    assert (losses[-1] > losses[0]).all()


# ---- the loop --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [Net(), tiny_unet()], ids=["conv", "unet"])
def test_each_step_makes_the_noise_worse_and_it_stays_normal(model):
    x0, eps = x0_and_eps(size=8)
    eps, losses = worst_case_noise(model, SCHEDULE, x0, T, eps, J=10, omega=0.005)
    means = [loss.mean().item() for loss in losses]
    assert len(means) == 10 and means == sorted(means) and means[-1] > 1.02 * means[0]
    torch.testing.assert_close(eps.mean((1, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(eps.std((1, 2, 3), correction=0), torch.ones(3))
    assert not eps.requires_grad and not losses[-1].requires_grad


def test_batch_can_be_split_anywhere():
    model, (x0, eps) = tiny_unet(), x0_and_eps(size=8)
    whole = worst_case_noise(model, SCHEDULE, x0, T, eps, J=3)[0]
    parts = [worst_case_noise(model, SCHEDULE, x0[i], T[i], eps[i], J=3)[0] for i in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_model_is_called_J_times_with_the_same_x0_and_t():
    model, (x0, eps), calls = Net(), x0_and_eps(), []
    model.register_forward_pre_hook(lambda module, inputs: calls.append([i.detach().clone() for i in inputs]))
    worst_case_noise(model, SCHEDULE, x0, T, eps, J=4)
    assert len(calls) == 4
    for j, (xt, t) in enumerate(list(calls)):
        eps_j = worst_case_noise(model, SCHEDULE, x0, T, eps, J=j)[0]
        assert t.equal(T)
        torch.testing.assert_close(xt, a_bar(T, x0.dtype).sqrt() * x0 + (1 - a_bar(T, x0.dtype)).sqrt() * eps_j)


def test_arguments_are_left_as_they_were():
    (x0, eps), model = x0_and_eps(), Net()
    copies = x0.clone(), eps.clone()
    with torch.no_grad():  # and the caller's no_grad does not matter
        worst_case_noise(model, SCHEDULE, x0, T, eps, J=2)
    assert x0.equal(copies[0]) and eps.equal(copies[1]) and not eps.requires_grad and not x0.requires_grad


# ---- the model is borrowed -------------------------------------------------------------------------------------------

def marked(dropout=0.5):
    """A model with one frozen layer, and its head in eval mode while the rest trains."""
    model = Net(dropout).train()
    model.layers[0].requires_grad_(False)
    model.layers[3].eval()
    return model


def flags(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def test_model_comes_back_unchanged_and_without_gradients():
    model, before, (x0, eps) = marked(), flags(marked()), x0_and_eps()
    worst_case_noise(model, SCHEDULE, x0, T, eps, J=2)
    assert flags(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_no_parameter_needs_a_gradient_inside():
    model, seen, (x0, eps) = marked(), [], x0_and_eps()
    model.register_forward_hook(lambda module, *_: seen.append(flags(module)))
    worst_case_noise(model, SCHEDULE, x0, T, eps, J=1)
    assert not any(seen[0][0]) and not any(seen[0][1])


def test_model_comes_back_unchanged_after_an_exception():
    model, before = marked(), flags(marked())
    x0, eps = x0_and_eps()
    with pytest.raises(RuntimeError):  # x0 does not fit the network
        worst_case_noise(model, SCHEDULE, x0[:, :2], T, eps[:, :2])
    assert flags(model) == before


def test_dropout_is_off():
    model, (x0, eps) = Net(dropout=0.5).train(), x0_and_eps()
    expected = worst_case_noise(Net().eval(), SCHEDULE, x0, T, eps, J=2)[0]
    torch.testing.assert_close(worst_case_noise(model, SCHEDULE, x0, T, eps, J=2)[0], expected)


def test_bfloat16_autocast():
    model, (x0, eps) = tiny_unet(), x0_and_eps(size=8)
    exact = worst_case_noise(model, SCHEDULE, x0, T, eps, J=3)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours, losses = worst_case_noise(model, SCHEDULE, x0, T, eps, J=3)
    assert ours.dtype == losses[0].dtype == torch.float32 and ours.isfinite().all()
    torch.testing.assert_close(ours.mean((1, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    assert 0 < (ours - exact).abs().max() < 0.05  # bfloat16 was used, and was good enough
