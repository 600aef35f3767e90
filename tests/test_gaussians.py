"""gaussians.py: its closed forms against the modules it shares with train_tan.py."""

import functools

import pytest
import scipy.linalg
import torch

import gaussians
from adversarial_noise import norm, worst_case_noise
from classifier import SOURCE, TARGET, log_prob_gradient, similarity_guidance
from ddpm import sample
from gaussians import (
    MEANS,
    MLP,
    SCHEDULE,
    angle,
    bayes_classifier,
    draw_points,
    optimal_predictor,
    wasserstein,
)
from plumbing.seeds import generator

MU_S, MU_T = MEANS.double()
NUMBERS = dict(gamma=5.0, omega=0.02, J=10, learning_rate=0.02)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 250, 999])
def test_optimal_predictor_is_the_regression_of_eps_on_xt(t):
    """E[eps | x_t] of jointly Gaussian variables is the least-squares line, here from a million pairs."""
    n = 1_000_000
    eps, times = randn(n, 1, 2), torch.full((n,), t)
    xt = SCHEDULE.add_noise(MU_S + randn(n, 1, 2, seed=1), times, eps)
    design = torch.cat([xt[:, 0], torch.ones(n, 1, dtype=torch.float64)], 1)
    fitted = design @ torch.linalg.lstsq(design, eps[:, 0]).solution
    assert (fitted - optimal_predictor(xt, times)[:, 0]).abs().max() < 0.02


def test_optimal_predictor_samples_its_domain():
    noise = norm(randn(400, 3, 2), dims=(0,))
    model = functools.partial(optimal_predictor, domain=TARGET)
    x = sample(model, SCHEDULE, (3, 2), range(400), 200, noise=noise, clip=None, batch_size=400)
    assert (x.mean(0) - MU_T).norm(dim=1).max() < 0.02
    assert wasserstein(x).max() < 0.12  # 400 points have correlated coordinates
    assert torch.equal(gaussians.trajectories(model, noise, 200)[[0, -1]], torch.stack([noise, x]))


@pytest.mark.parametrize("t", [20, 500])
def test_bayes_gradient(t):
    """grad log p(T | x) = (1 - p) sqrt(a) (mu_T - mu_S), p the sigmoid of sqrt(a) (mu_T - mu_S) . x."""
    xt, times, a = randn(5, 4, 2), torch.full((5,), t), SCHEDULE.alpha_bar[t]
    direction = a.sqrt() * (MU_T - MU_S)
    expected = torch.sigmoid(-xt @ direction)[..., None] * direction
    found = log_prob_gradient(bayes_classifier, xt.float(), times, TARGET)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)
    opposite = log_prob_gradient(bayes_classifier, xt.float(), times, SOURCE)
    assert (opposite @ (MU_S - MU_T).float() > 0).all()


def test_ascent_on_the_optimal_predictor():
    """The residual is a eps - sqrt(a (1-a)) (x0 - mu_S), so Eq. 8 is Norm(eps + 2 omega a residual)."""
    x0, eps, t, omega = MU_T + randn(50, 3, 2), randn(50, 3, 2, seed=1), 300, 0.3
    a = SCHEDULE.alpha_bar[t]
    residual = a * eps - (a * (1 - a)).sqrt() * (x0 - MU_S)
    expected = norm(eps + 2 * omega * a * residual, dims=(0,))
    times = torch.full((50,), t)
    found, (loss,) = worst_case_noise(optimal_predictor, SCHEDULE, x0, times, eps, 1, omega, dims=(0,))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, residual.square().sum((1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_output_gradient(gamma):
    """2 sqrt(a (1-a)) (mean x0 - mu_S) - 2 a mean(eps) + 2 sigma_hat^2 gamma mean(grad log p)."""
    x0, eps, t = MU_T + randn(60, 3, 2), randn(60, 3, 2, seed=1), 300
    a, times = SCHEDULE.alpha_bar[t], torch.full((60,), t)
    expected = 2 * (a * (1 - a)).sqrt() * (x0.mean(0) - MU_S) - 2 * a * eps.mean(0)
    xt = SCHEDULE.add_noise(x0, times, eps)
    before = SCHEDULE.alpha_bar[t - 1]
    sigma_hat = (1 - before) * ((a / before) / (1 - a)).sqrt()
    gradient = log_prob_gradient(bayes_classifier, xt.float(), times, TARGET)
    expected += 2 * sigma_hat ** 2 * gamma * gradient.mean(0)
    found = gaussians.output_gradient(optimal_predictor, x0.float(), times, eps.float(), bayes_classifier,
                                      gamma)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def test_output_gradient_is_that_of_the_last_bias():
    model = MLP(3)
    x0, eps, t = randn(20, 3, 2).float(), randn(20, 3, 2, seed=1).float(), torch.full((20,), 400)
    # ||.||^2, mean over points, experiments apart
    loss = (eps - model(SCHEDULE.add_noise(x0, t, eps), t)).square().sum(2).mean(0).sum()
    expected, = torch.autograd.grad(loss, model.biases[-1])
    torch.testing.assert_close(gaussians.output_gradient(model, x0, t, eps), expected[:, 0])


def test_normalised_noise_leaves_the_repeated_gradient_alone():
    """Closed form 3 of the docstring: with mean 0, whatever omega and J, only the shots' mean counts."""
    shots = draw_points(TARGET, 10, 4, generator(1))
    found = gaussians.compare_gradients(optimal_predictor, {}, shots, 300, 20, generator(2), 5.0, 0.5, 5)
    difference = shots.mean(0) - MEANS[SOURCE]
    for method in ("norm only", "adversarial"):
        assert angle(found[method], difference).max() < 0.1
    assert angle(found["reference"], (MEANS[TARGET] - MEANS[SOURCE]).expand(4, 2)).max() < 3


def test_own_norm_gives_each_coordinate_of_the_batch_its_drawn_moments_back():
    """So the gradient knows the noises' own mean again, as it does without adversarial noise."""
    shots = draw_points(TARGET, 10, 4, generator(1))
    noises = {own: gaussians.compare_gradients(optimal_predictor, {}, shots, 300, 2, generator(2), 5.0, 0.02, 3, own)
              for own in (False, True)}
    drawn = torch.randn(10_000, 4, 2, generator=after_points())[:20]
    torch.testing.assert_close(noises[True]["worst"].mean(0), drawn.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(noises[True]["worst"].std(0), drawn.std(0), atol=1e-5, rtol=1e-4)
    assert noises[False]["worst"].mean(0).abs().max() < 1e-5 < drawn.mean(0).abs().min()


def test_guided_is_of_the_drawn_noise_and_TAN_of_the_worst():
    shots, t = draw_points(TARGET, 10, 4, generator(1)), torch.full((20,), 300)
    found = gaussians.compare_gradients(optimal_predictor, {"bayes": bayes_classifier}, shots, 300, 2, generator(2), 5.0, 0.5, 3)
    drawn = torch.randn(10_000, 4, 2, generator=after_points())[:20]
    for name, noise in (("guided, bayes", drawn), ("TAN, bayes", found["worst"])):
        expected = gaussians.output_gradient(optimal_predictor, shots.repeat(2, 1, 1), t, noise, bayes_classifier, 5.0)
        torch.testing.assert_close(found[name], expected, msg=name)
    assert not found["guided, bayes"].allclose(found["TAN, bayes"], rtol=1e-3)


def after_points():
    """The generator as compare_gradients has it when it draws its noises."""
    g = generator(2)
    draw_points(TARGET, 10_000, 4, g)
    return g


def test_the_axes_of_an_ellipse():
    along, across = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)
    x = randn(20_000, 1, 2) @ torch.stack([3 * along, across])
    axes, direction = gaussians.ellipse(x)
    torch.testing.assert_close(axes[0], torch.tensor([1.0, 3.0], dtype=torch.float64), atol=0, rtol=0.03)
    assert (direction[0] @ along).abs() > 0.999


def test_wasserstein_against_the_matrix_square_root():
    x = randn(300, 1, 2) @ torch.tensor([[1.5, 0.0], [0.7, 0.4]], dtype=torch.float64)
    mean, covariance = x[:, 0].mean(0), torch.cov(x[:, 0].T, correction=0)
    root = scipy.linalg.sqrtm(covariance.numpy()).trace().real
    expected = ((mean - MU_T).square().sum() + torch.trace(covariance) + 2 - 2 * root).sqrt()
    torch.testing.assert_close(wasserstein(x)[0], expected)


def test_networks_side_by_side_do_not_mix():
    """The second network's shots change nothing for the first."""
    torch.manual_seed(0)
    model, shots = MLP(1), draw_points(TARGET, 10, 3, generator(1))
    ends = []
    for second in (1, 2):
        *_, adapted = gaussians.adapt(model, shots[:, [0, second]], generator(0, 3), bayes_classifier,
                                      **NUMBERS, iterations=3)
        ends.append(torch.cat([w.flatten(1) for w in adapted.parameters()], 1))
    assert torch.equal(ends[0][0], ends[1][0]) and not torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("classifier, steps, fading, own", [
    (None, 0, 0, False), (bayes_classifier, 0, 0, False), (bayes_classifier, 3, 0, False), (bayes_classifier, 3, 4, False),
    (bayes_classifier, 3, 0, True)])
def test_adapt_is_algorithm_1(classifier, steps, fading, own):
    """Two iterations by hand, from 40 points; the baseline is plain denoising."""
    torch.manual_seed(0)
    model, shots = MLP(1), draw_points(TARGET, 10, 1, generator(1))
    numbers = NUMBERS | dict(J=steps)
    *_, adapted = gaussians.adapt(model, shots, generator(0, 3), classifier, **numbers, iterations=2, fading=fading, own=own)
    g, x0 = generator(0, 3), shots.repeat(4, 1, 1)
    for gamma in (5.0, 5.0 * 3 / 4 if fading else 5.0):
        t, eps = torch.randint(1000, (40,), generator=g), torch.randn(40, 1, 2, generator=g)
        if steps:
            eps, _ = worst_case_noise(model, SCHEDULE, x0, t, eps, steps, 0.02, (0,), own)
        xt = SCHEDULE.add_noise(x0, t, eps)
        guidance = similarity_guidance(classifier, SCHEDULE, xt, t, gamma) if classifier else 0.0
        loss = (eps - model(xt, t) - guidance).square().mean()
        for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p.data -= 0.02 * gradient
    for p, expected in zip(adapted.parameters(), model.parameters()):
        torch.testing.assert_close(p, expected)


def test_select_copies_the_networks_it_names():
    torch.manual_seed(0)
    model, x, t = MLP(3), randn(5, 1, 2).float().expand(5, 3, 2), torch.arange(5)
    other = model.select([2, 2, 0])
    torch.testing.assert_close(other(x, t), model(x, t)[:, [2, 2, 0]])
    torch.testing.assert_close(other.class_logits(x, t), other(x, t).transpose(1, 2))
    other.weights[0].data.zero_()
    assert model.weights[0].abs().sum() > 0


def test_pretraining_learns_the_source():
    torch.manual_seed(0)
    model, x, t = gaussians.pretrain(200, generator(0, 1), progress=iter), draw_points(SOURCE, 500, 1, generator(2)), torch.full((500,), 300)
    xt = SCHEDULE.add_noise(x, t, torch.randn(x.shape, generator=generator(3)))
    errors = [(model(xt, t) - optimal_predictor(xt, t, domain)).square().mean() for domain in (SOURCE, TARGET)]
    assert errors[0] < 0.1 * errors[1]


def test_training_with_the_same_generator_gives_the_same_networks():
    """And classifiers of different shots differ, though they begin as the same."""
    shots = draw_points(TARGET, 10, 2, generator(1))
    for train in (gaussians.pretrain, functools.partial(gaussians.train_classifier, shots)):
        ends = []
        for _ in range(2):
            torch.manual_seed(0)
            ends.append(train(3, generator(0, 1), progress=iter))
        assert torch.equal(ends[0].weights[0], ends[1].weights[0])
    assert not torch.equal(*ends[0].weights[0])
