"""toy2d.py: its closed forms against the modules it shares with train_tan.py, and the program on a tiny budget."""

import json

import pytest
import scipy.linalg
import torch
from conftest import call

import toy2d
from adversarial_noise import norm, worst_case_noise
from classifier import SOURCE, TARGET, log_prob_gradient
from ddpm import Schedule, sample
from plumbing.seeds import generator

SCHEDULE = Schedule()
MU_S, MU_T = toy2d.MEANS.double()


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
    assert (fitted - toy2d.optimal_predictor(SCHEDULE)(xt, times)[:, 0]).abs().max() < 0.02


def test_optimal_predictor_samples_its_domain():
    noise = norm(randn(400, 3, 2), dims=(0,))
    x = sample(toy2d.optimal_predictor(SCHEDULE, TARGET), SCHEDULE, (3, 2), range(400), 200, noise=noise, clip=False, batch_size=400)
    error, w2 = toy2d.wasserstein(x)
    assert error.max() < 0.02 and w2.max() < 0.12  # 400 points have correlated coordinates


@pytest.mark.parametrize("t", [20, 500])
def test_bayes_gradient(t):
    """grad log p(T | x) = (1 - p) sqrt(a) (mu_T - mu_S), p the logistic function of sqrt(a) (mu_T - mu_S) . x."""
    xt, times, a = randn(5, 4, 2), torch.full((5,), t), SCHEDULE.alpha_bar[t]
    direction = a.sqrt() * (MU_T - MU_S)
    expected = torch.sigmoid(-xt @ direction)[..., None] * direction
    torch.testing.assert_close(log_prob_gradient(toy2d.bayes_classifier(SCHEDULE), xt.float(), times, TARGET), expected.float(), atol=1e-5, rtol=1e-4)
    opposite = log_prob_gradient(toy2d.bayes_classifier(SCHEDULE), xt.float(), times, SOURCE)
    assert (opposite @ (MU_S - MU_T).float() > 0).all()


def test_ascent_on_the_optimal_predictor():
    """The residual is a eps - sqrt(a (1-a)) (x0 - mu_S), so one step of Eq. 8 is Norm(eps + 2 omega a residual)."""
    x0, eps, t, omega = MU_T + randn(50, 3, 2), randn(50, 3, 2, seed=1), 300, 0.3
    a = SCHEDULE.alpha_bar[t]
    residual = a * eps - (a * (1 - a)).sqrt() * (x0 - MU_S)
    expected = norm(eps + 2 * omega * a * residual, dims=(0,))
    found, (loss,) = worst_case_noise(toy2d.optimal_predictor(SCHEDULE), SCHEDULE, x0, torch.full((50,), t), eps, 1, omega, dims=(0,))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(loss, residual.square().sum((1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_output_gradient(gamma):
    """2 sqrt(a (1-a)) (mean x0 - mu_S) - 2 a mean(eps) + 2 sigma_hat^2 gamma mean(grad log p)."""
    x0, eps, t = MU_T + randn(60, 3, 2), randn(60, 3, 2, seed=1), 300
    a, times = SCHEDULE.alpha_bar[t], torch.full((60,), t)
    classifier = toy2d.bayes_classifier(SCHEDULE)
    expected = 2 * (a * (1 - a)).sqrt() * (x0.mean(0) - MU_S) - 2 * a * eps.mean(0)
    xt = SCHEDULE.add_noise(x0, times, eps)
    before = SCHEDULE.alpha_bar[t - 1]
    sigma_hat = (1 - before) * ((a / before) / (1 - a)).sqrt()
    expected += 2 * sigma_hat ** 2 * gamma * log_prob_gradient(classifier, xt.float(), times, TARGET).mean(0)
    found = toy2d.output_gradient(toy2d.optimal_predictor(SCHEDULE), SCHEDULE, x0.float(), times, eps.float(), classifier, gamma)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


def test_output_gradient_is_that_of_the_last_bias():
    model = toy2d.MLP(3)
    x0, eps, t = randn(20, 3, 2).float(), randn(20, 3, 2, seed=1).float(), torch.full((20,), 400)
    loss = (eps - model(SCHEDULE.add_noise(x0, t, eps), t)).square().sum(2).mean(0).sum()  # ||.||^2, mean over points, experiments apart
    expected, = torch.autograd.grad(loss, model.biases[-1])
    torch.testing.assert_close(toy2d.output_gradient(model, SCHEDULE, x0, t, eps), expected[:, 0])


def test_normalised_noise_leaves_the_repeated_gradient_alone():
    """Closed form 3 of the docstring: with mean 0, whatever omega and J, only the mean of the shots counts."""
    shots = toy2d.draw_points(TARGET, 10, 4, generator(1))
    options = toy2d.Options(omega=0.5, pgd_steps=5)
    found = toy2d.compare_gradients(toy2d.optimal_predictor(SCHEDULE), {}, shots, SCHEDULE, 300, options, 20, generator(2))
    difference = shots.mean(0) - toy2d.MEANS[SOURCE]
    for method in ("norm only", "adversarial"):
        assert toy2d.angle(found[method], difference).max() < 0.1
    assert toy2d.angle(found["reference"], (toy2d.MEANS[TARGET] - toy2d.MEANS[SOURCE]).expand(4, 2)).max() < 3


def test_wasserstein_against_the_matrix_square_root():
    x = randn(300, 1, 2) @ torch.tensor([[1.5, 0.0], [0.7, 0.4]], dtype=torch.float64)
    mean, covariance = x[:, 0].mean(0), torch.cov(x[:, 0].T, correction=0)
    expected = ((mean - MU_T).square().sum() + torch.trace(covariance) + 2 - 2 * scipy.linalg.sqrtm(covariance.numpy()).trace().real).sqrt()
    error, w2 = toy2d.wasserstein(x)
    torch.testing.assert_close(w2[0], expected)
    torch.testing.assert_close(error[0], (mean - MU_T).norm())


def test_networks_side_by_side_do_not_mix():
    """The second network's shots change nothing for the first."""
    torch.manual_seed(0)
    model, shots = toy2d.MLP(1), toy2d.draw_points(TARGET, 10, 3, generator(1))
    ends = []
    for second in (1, 2):
        *_, adapted = toy2d.adapt(model, "TAN", toy2d.bayes_classifier(SCHEDULE), shots[:, [0, second]], SCHEDULE,
                                  toy2d.Options(iterations=3, pgd_steps=2), 0, toy2d.tqdm(disable=True))
        ends.append(torch.cat([w.flatten(1) for w in adapted.parameters()], 1))
    assert torch.equal(ends[0][0], ends[1][0]) and not torch.equal(ends[0][1], ends[1][1])


def test_program_reproduces_and_resists_bad_input(tmp_path, capsys):
    flags = "--draws 3 --repeats 4 --iterations 4 --timesteps 100 500 --pgd-steps 2".split()
    for name in ("a", "b"):
        call(toy2d.main, *flags, "--output-dir", tmp_path / name)
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("a", "b"))
    for results in (first, second):
        results.pop("seconds"), results["options"].pop("output_dir")
    assert first == second and "NaN" not in json.dumps(first)
    assert (tmp_path / "a" / "figure2.png").stat().st_size > 10_000 and (tmp_path / "a" / "measured.png").stat().st_size > 10_000
    assert {row["method"] for row in first["adaptation"]} >= {"baseline", "TAN, ten"} and "| baseline |" in capsys.readouterr().out
    for bad in ("--timesteps 1000", "--draws 0", "--learning-rate nan", "--gamma 0"):
        with pytest.raises(toy2d.InputError, match=bad.split()[0]):
            call(toy2d.main, *bad.split(), "--output-dir", tmp_path / "c")


def test_worst_noise_against_its_recursion():
    """On the optimal predictor Eq. 8 is linear: per coordinate eps = A eps_0 + C d, d the shots about their mean, with A <- p A / s and
    C <- (p C - q) / s, p = 1 + 2 omega a^2, q = 2 omega a sqrt(a (1-a)), s the standard deviation that Norm takes away."""
    shots, omega, steps, t = toy2d.draw_points(TARGET, 10, 6, generator(1)), 0.5, 10, 100
    a = SCHEDULE.alpha_bar[t].item()
    p, q = 1 + 2 * omega * a * a, 2 * omega * a * (a * (1 - a)) ** 0.5
    d = shots - shots.mean(0)
    variance = d.square().mean(0)
    A, C = torch.ones(6, 2), torch.zeros(6, 2)
    for _ in range(steps):
        A, C = p * A, p * C - q
        s = (A ** 2 + C ** 2 * variance).sqrt()
        A, C = A / s, C / s
    correlation = C.prod(1) * (d[..., 0] * d[..., 1]).mean(0)  # of the two coordinates of the noise; its axes are sqrt(1 +- correlation)
    expected = ((1 + correlation.abs()) / (1 - correlation.abs())).sqrt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy2d, "ASCENTS", [(omega, steps)])
        rows = toy2d.measure_noise(toy2d.optimal_predictor(SCHEDULE), "exact", shots.repeat(20, 1, 1), SCHEDULE, 0, toy2d.tqdm(disable=True))
    (ratio, _, away), = [row[4:] for row in rows if row[1] == "100"]
    torch.testing.assert_close(ratio, expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(away, toy2d.angle(shots.mean(0) - toy2d.MEANS[SOURCE], (toy2d.MEANS[TARGET] - toy2d.MEANS[SOURCE]).expand(6, 2)), atol=0.05, rtol=0)
