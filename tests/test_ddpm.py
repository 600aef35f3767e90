"""ddpm.py against diffusers' schedulers and against oracles known in closed form.

For data x_0 ~ N(mu, s^2 I) the best noise predictor is E[eps|x_t] = sqrt(1-a) (x_t - sqrt(a) mu) / (a s^2 + 1 - a), a = alpha_bar_t.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm import Schedule, predict_eps, sample

SCHEDULE = Schedule()  # linear, T = 1000
A = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # its alpha_bar, computed on its own; A[t-1] needs t > 0
T_AND_S = [(0, -1), (1, 0), (500, 499), (999, 998), (980, 960), (500, 480), (19, -1)]  # single steps and strides of 20


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def full(t, n=2):
    return torch.full((n,), t)


def gaussian(mu, s):
    def model(x, t):
        a = torch.from_numpy(A).float()[t].view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s ** 2 + 1 - a)
    return model


# ---- noise levels ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, theirs", [("linear", "linear"), ("scaled-linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("timesteps, beta_start, beta_end", [(1000, 1e-4, 0.02), (100, 0.0015, 0.0195)])
def test_alpha_bar_is_diffusers(name, theirs, timesteps, beta_start, beta_end):
    expected = DDPMScheduler(timesteps, beta_start, beta_end, theirs).alphas_cumprod.double()  # computed there in float32
    schedule = Schedule(name, timesteps, beta_start, beta_end)
    torch.testing.assert_close(schedule.alpha_bar, expected, rtol=3e-4, atol=0)
    assert Schedule(**schedule.config).alpha_bar.equal(schedule.alpha_bar)


def test_at_takes_each_t_and_gives_one_before_the_first():
    a = SCHEDULE.at(torch.tensor([-1, 0, 7, 999]), torch.zeros(4, 3, 2, 2, dtype=torch.float64))
    assert a.shape == (4, 1, 1, 1)
    np.testing.assert_allclose(a.flatten(), [1, A[0], A[7], A[999]], rtol=1e-12)


def test_noise_levels_are_not_rounded_to_half_precision():
    assert SCHEDULE.at(torch.tensor([999]), torch.zeros(1, dtype=torch.float16)).item() == pytest.approx(SCHEDULE.alpha_bar[999].item(), rel=1e-6)


def test_add_noise_is_the_papers_second_line():
    x0, eps, t = randn(3, 2), randn(3, 2, seed=1), torch.tensor([0, 400, 999])
    expected = np.sqrt(A[t])[:, None] * x0.numpy() + np.sqrt(1 - A[t])[:, None] * eps.numpy()
    np.testing.assert_allclose(SCHEDULE.add_noise(x0, t, eps), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2), (3, 3, 4, 4)])
def test_the_true_eps_leads_back_to_x0(shape):
    x0, eps, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 400, 999])
    xt = SCHEDULE.add_noise(x0, t, eps)
    torch.testing.assert_close(SCHEDULE.predict_x0(xt, t, eps), x0)
    torch.testing.assert_close(SCHEDULE.reverse_step(xt, t, full(-1, 3), eps), x0)


# ---- Eq. 6: sigma_hat ------------------------------------------------------------------------------------------------

def test_sigma_hat_is_the_printed_formula():
    t = np.arange(1, 1000)
    expected = (1 - A[t - 1]) * np.sqrt((A[t] / A[t - 1]) / (1 - A[t]))
    ours = SCHEDULE.sigma_hat(torch.from_numpy(t), torch.zeros(999, 1, dtype=torch.float64))
    np.testing.assert_allclose(ours.flatten(), expected, rtol=1e-9)
    assert SCHEDULE.sigma_hat(full(0), torch.zeros(2, 1)).eq(0).all()


@pytest.mark.parametrize("t", [1, 50, 500, 999])
def test_sigma_hat_enters_in_its_first_power(t):
    """Eq. 2's mean = Eq. 3 with eps - sigma_hat gamma g for eps.  Printed: the square in Eq. 6, alpha_bar under Eq. 3's first root."""
    alpha, gamma = A[t] / A[t - 1], 5.0
    x, eps, g = (randn(2, 4, seed=i) for i in range(3))
    mean = lambda eps: (x - (1 - alpha) / np.sqrt(1 - A[t]) * eps) / np.sqrt(alpha)  # Eq. 3
    variance = (1 - alpha) * (1 - A[t - 1]) / (1 - A[t])                             # sigma_t^2, of q(x_{t-1}|x_t, x_0)
    guided = mean(eps) + variance * gamma * g                                        # Eq. 2
    sigma_hat = SCHEDULE.sigma_hat(full(t), x)
    torch.testing.assert_close(mean(eps - sigma_hat * gamma * g), guided, rtol=1e-9, atol=1e-9)
    assert (mean(eps - sigma_hat ** 2 * gamma * g) - guided).abs().max() > 1e-4
    # reverse_step's own correction of eps is Eq. 2 with the variance beta_t in place of sigma_t^2
    step = SCHEDULE.reverse_step(x, full(t), full(t - 1), eps, 0 * x, eta=1, guidance=gamma * g)
    torch.testing.assert_close(step, mean(eps) + (1 - alpha) * gamma * g / np.sqrt(alpha))


# ---- one reverse step against diffusers (its alpha_bar is float32, hence the tolerance) -------------------------------

CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t, s", T_AND_S)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0, 0.7])
def test_step_is_diffusers_ddim(t, s, eta, clip):
    x, eps, noise = (randn(2, 3, 4, 4, seed=i) for i in range(3))
    theirs = DDIMScheduler(1000, 1e-4, 0.02, clip_sample=clip is not None, clip_sample_range=clip or 1.0, set_alpha_to_one=True)
    theirs.num_inference_steps = 50 if t - s == 20 else 1000
    expected = theirs.step(eps, t, x, eta=eta, variance_noise=noise if eta else None).prev_sample
    torch.testing.assert_close(SCHEDULE.reverse_step(x, full(t), full(s), eps, noise, eta, clip), expected, **CLOSE)


@pytest.mark.parametrize("t, s", T_AND_S[:-1])
@pytest.mark.parametrize("eta, variance_type", [(1.0, "fixed_small"), ("large", "fixed_large")])
def test_step_is_diffusers_ddpm(t, s, eta, variance_type):
    theirs = DDPMScheduler(1000, 1e-4, 0.02, variance_type=variance_type, clip_sample=False)
    if t - s == 20:
        theirs.set_timesteps(50)
    x, eps, noise = (randn(2, 3, 4, 4, seed=i) for i in range(3))
    expected = theirs.step(eps, t, x, generator=torch.Generator().manual_seed(2)).prev_sample  # draws the same noise
    torch.testing.assert_close(SCHEDULE.reverse_step(x, full(t), full(s), eps, noise, eta), expected, **CLOSE)


def test_step_takes_a_t_of_its_own_for_each_image():
    x, eps, noise = (randn(3, 3, 4, 4, seed=i) for i in range(3))
    t, s = torch.tensor([5, 300, 999]), torch.tensor([-1, 299, 800])
    for eta in (0.0, 1.0, "large"):
        single = [SCHEDULE.reverse_step(x[i:i + 1], t[i:i + 1], s[i:i + 1], eps[i:i + 1], noise[i:i + 1], eta) for i in range(3)]
        torch.testing.assert_close(SCHEDULE.reverse_step(x, t, s, eps, noise, eta), torch.cat(single))


# ---- sampling against the analytic oracle ----------------------------------------------------------------------------

MU, S = 0.3, 0.5


@pytest.mark.parametrize("shape, seeds", [((2,), range(8)), ((3, 4, 4), range(2))])
def test_ddim_follows_the_probability_flow(shape, seeds):
    """For a Gaussian the flow is the linear map from N(sqrt(a) mu, a s^2 + 1 - a) to N(mu, s^2); 1000 steps leave less than 2 % of s."""
    xT = randn(len(seeds), *shape, dtype=torch.float32)
    expected = MU + S * (xT - A[-1] ** 0.5 * MU) / (A[-1] * S ** 2 + 1 - A[-1]) ** 0.5
    ours = sample(gaussian(MU, S), SCHEDULE, shape, seeds, steps=1000, noise=xT, clip=None)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02 * S)


@pytest.mark.parametrize("eta", [0.0, 1.0, "large"])
@pytest.mark.parametrize("shape, seeds", [((2,), range(100)), ((3, 64, 64), [7])])
def test_samples_have_the_mean_and_std_of_the_data(shape, seeds, eta):
    """Tolerance: 4 standard errors of n independent numbers, and 1 % of s for the 1000 steps."""
    x = sample(gaussian(MU, S), SCHEDULE, shape, seeds, steps=1000, eta=eta, clip=None)
    assert x.shape == (len(seeds), *shape)
    assert abs(x.mean() - MU) < S * (4 / x.numel() ** 0.5 + 0.01)
    assert abs(x.std() - S) < S * (4 / (2 * x.numel()) ** 0.5 + 0.01)


@pytest.mark.parametrize("eta", [0.0, 1.0, "large"])
def test_a_sample_depends_on_its_seed_alone(eta):
    run = lambda seeds, batch_size=64: sample(gaussian(MU, S), SCHEDULE, (3, 4, 4), seeds, steps=7, eta=eta, batch_size=batch_size)
    together = run([3, 4, 5])
    torch.testing.assert_close(together, torch.cat([run([3]), run([4]), run([5])]))
    torch.testing.assert_close(together, run([3, 4, 5], batch_size=2))
    assert together.equal(run([3, 4, 5]))
    assert (together[0] - together[1]).abs().max() > 0.01


def test_given_noise_alone_decides_ddim():
    xT = randn(3, 2, dtype=torch.float32)
    run = lambda seeds, **more: sample(gaussian(MU, S), SCHEDULE, (2,), seeds, steps=7, noise=xT, **more)
    torch.testing.assert_close(run([0, 1, 2]), run([7, 8, 9], batch_size=2))
    assert (run([0, 1, 2], eta=1) - run([7, 8, 9], eta=1)).abs().max() > 0.01


def test_clip_keeps_images_in_range():
    run = lambda **more: sample(gaussian(0.9, S), SCHEDULE, (3, 4, 4), [0], steps=7, **more)
    assert run().abs().max() <= 1 < run(clip=None).abs().max()


def test_steps_go_from_the_noisiest_to_the_image():
    seen, reached = [], []
    def model(x, t):
        seen.append(t.tolist())
        return 0 * x
    sample(model, SCHEDULE, (2,), [0, 1], steps=3, on_step=lambda s, x: reached.append(s))
    assert [s[0] for s in seen] == SCHEDULE.subset(3) and all(s[0] == s[1] for s in seen)
    assert SCHEDULE.subset(3)[0] == 999 and SCHEDULE.subset(3)[-1] == 0 and reached == SCHEDULE.subset(3)[1:] + [-1]
    assert SCHEDULE.subset(25)[:4] == [999, 957, 916, 874]  # 999 less 41.625 each, to the nearest
    assert SCHEDULE.subset(1) == [999] and SCHEDULE.subset(1000) == list(range(999, -1, -1))


def test_learned_variance_is_ignored():
    oracle = gaussian(MU, S)
    twice = lambda x, t: torch.cat([oracle(x, t), torch.full_like(x, 9.0)], dim=1)
    for shape in ((2,), (3, 4, 4)):
        a, b = (sample(model, SCHEDULE, shape, [0, 1], steps=5, eta=1) for model in (oracle, twice))
        assert a.equal(b)
    half = lambda x, t: oracle(x, t).bfloat16()
    assert predict_eps(half, torch.zeros(1, 2), full(3, 1), SCHEDULE).dtype == torch.float32


# ---- classifier guidance ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t, s", T_AND_S)
def test_guided_step(t, s):
    """The effect of a unit gradient does not jump with eta, and grows to beta / sqrt(alpha) at eta = 1."""
    x, eps, noise, g = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2), torch.ones(2, 3, 4, 4)

    def effect(eta):
        guided, free = (SCHEDULE.reverse_step(x, full(t), full(s), eps, noise, eta, guidance=gradient)
                        for gradient in (g, None))
        return (guided - free).flatten()[0].item()

    alpha = A[t] / (A[s] if s >= 0 else 1.0)
    effects = [effect(eta) for eta in (0.0, 0.01, 0.1, 0.5, 1.0)]
    assert effects == sorted(effects) and effects[1] == pytest.approx(effects[0], rel=0.01)
    assert effects[-1] == pytest.approx((1 - alpha) / alpha ** 0.5, rel=1e-4)
    assert effect("large") == pytest.approx(effects[-1], rel=1e-6)


M = torch.tensor([2.0, -1.0])  # two classes, N(M, I) and N(-M, I); at every t the noised ones are N(+-sqrt(a) M, I)


def mixture(x, t):
    a = torch.from_numpy(A).float()[t][:, None]
    return (1 - a).sqrt() * (x - a.sqrt() * M * torch.tanh(a.sqrt() * (x @ M)[:, None]))


def gradient_of_bayes(x, t):
    """grad log p(y = first class|x_t), by autograd through the exact classifier."""
    x.requires_grad_()
    a = torch.from_numpy(A).float()[t]
    return torch.autograd.grad(F.logsigmoid(2 * a.sqrt() * (x @ M)).sum(), x)[0]


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5, 1.0, "large"])
def test_bayes_guidance_turns_the_mixture_into_one_class(eta):
    """eps of the mixture - sqrt(1-a) grad log p(y|x_t) is eps of the class, by Bayes: the very same samples."""
    run = lambda model, **more: sample(model, SCHEDULE, (2,), range(40), steps=20, eta=eta, clip=None, **more)
    free, guided = run(mixture), run(mixture, gradient=gradient_of_bayes)
    assert 8 < (free @ M > 0).sum() < 32
    torch.testing.assert_close(guided, run(gaussian(M, 1.0)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("eta", [1.0, "large"])
def test_guided_ddpm_samples_the_wanted_class(eta):
    run = lambda **more: sample(mixture, SCHEDULE, (2,), range(100), steps=200, eta=eta, clip=None, gradient=gradient_of_bayes, **more)
    x = run(gamma=1.0)
    assert ((x.mean(0) - M).abs() < 0.4 + 0.1).all() and (x @ M > 0).float().mean() > 0.95  # 4 standard errors and 0.1
    assert (run(gamma=-1.0) @ M > 0).float().mean() < 0.5  # gamma counts: pushed away


# ---- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps: choose 1 to 1000"):
        sample(gaussian(0, 1), SCHEDULE, (2,), [0], steps=steps)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="'quadratic'"):
        Schedule("quadratic")


def test_a_table_made_while_sampling_serves_training():
    schedule, x, t = Schedule(), torch.randn(2, 3), torch.tensor([-1, 999])
    with torch.inference_mode():
        schedule.at(t, x)
    w = torch.ones(2, 3, requires_grad=True)
    (schedule.at(t, x) * w * w).sum().backward()  # an inference tensor could not be kept for this
    assert w.grad is not None
    assert schedule.at(t, x) is not schedule.at(t, x.double()) and schedule.at(t, x.double()).dtype == torch.float64
    torch.testing.assert_close(schedule.at(t, x.double())[:, 0], torch.tensor([1, schedule.alpha_bar[999]], dtype=torch.float64))
