"""classifier.py: the gradient is the gradient, fine-tuning learns what can be seen, and augmentation keeps the picture."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_network
from torch import nn

import classifier
from classifier import (
    SOURCE,
    TARGET,
    Classifier,
    accuracy_by_quarter,
    augment,
    fade,
    fine_tune,
    from_unet,
    guided_loss,
    limited,
    log_prob_gradient,
    make_classifier,
    replace_head,
    similarity_guidance,
)
from ddpm import Schedule

T = torch.tensor([3, 800])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_classifier(seed=0):
    torch.manual_seed(seed)
    return Classifier(**dict(TINY, out_channels=2)).eval()


# ---- the gradient of log p -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("label", [SOURCE, TARGET])
def test_gradient_by_finite_differences(label):
    model = tiny_classifier().double().requires_grad_(False)
    model.time_embed.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    xt, directions, h = randn(2, 3, 16, 16, dtype=torch.float64), randn(5, 2, 3, 16, 16, seed=1, dtype=torch.float64), 1e-5
    log_p = lambda x: F.log_softmax(model(x, T), 1)[:, label]  # (B,): each image's own
    # log_prob_gradient takes the softmax in float32, hence 1e-4
    gradient = log_prob_gradient(model, xt, T, label)
    for v in directions:
        slope = (log_p(xt + h * v) - log_p(xt - h * v)) / (2 * h)
        torch.testing.assert_close((gradient * v).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_linear_classifier():
    w, xt = randn(2, 48), randn(3, 3, 4, 4, seed=1)  # logits W x: grad log p_T = (1 - p_T) (w_T - w_S)
    model = lambda x, t: x.flatten(1) @ w.T
    p = model(xt, None).softmax(1)[:, TARGET:]
    closed = ((1 - p) * (w[TARGET] - w[SOURCE])).view_as(xt)
    torch.testing.assert_close(log_prob_gradient(model, xt, None), closed)
    torch.testing.assert_close(log_prob_gradient(model, xt[:1], None), closed[:1])  # not divided by the batch size
    with torch.no_grad():
        torch.testing.assert_close(log_prob_gradient(model, xt, None), closed)


# ---- the loss --------------------------------------------------------------------------------------------------------

def test_guided_loss_is_eq_6():
    eps, predicted, gradient = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma_hat, gamma = 0.3, 5.0
    numbers = lambda i: zip(*(x[i].flatten().tolist() for x in (eps, predicted, gradient)))
    by_hand = [sum((e - p - sigma_hat ** 2 * gamma * g) ** 2 for e, p, g in numbers(i)) / 64 for i in range(2)]
    torch.testing.assert_close(guided_loss(eps, predicted, sigma_hat ** 2 * gamma * gradient), torch.tensor(by_hand))


def test_without_guidance_it_is_eq_1():
    eps, predicted = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided_loss(eps, predicted, 0.0).mean(), torch.nn.functional.mse_loss(predicted, eps))


def test_the_loss_pulls_the_prediction_to_eps_minus_guidance():
    eps, guidance = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    predicted = eps.clone().requires_grad_()  # right without guidance
    gradient, = torch.autograd.grad(guided_loss(eps, predicted, guidance).sum(), predicted)
    torch.testing.assert_close(gradient, 2 / 16 * guidance)  # descent moves it against the guidance
    assert guided_loss(eps, eps - guidance, guidance).allclose(torch.zeros(2), atol=1e-12)


def test_similarity_guidance():
    w, xt, t, schedule = randn(2, 48), randn(4, 3, 4, 4, seed=1), torch.tensor([100, 499, 500, 999]), Schedule()
    model = lambda x, t: x.flatten(1) @ w.T
    gradient, sigma_hat = log_prob_gradient(model, xt, t), schedule.sigma_hat(t, xt)
    torch.testing.assert_close(similarity_guidance(model, schedule, xt, t, 3.0), 3 * sigma_hat ** 2 * gradient)
    guidance = similarity_guidance(model, schedule, xt, t, 3.0, power=1, below=500)
    torch.testing.assert_close(guidance[:2], 3 * (sigma_hat * gradient)[:2])
    assert guidance[:2].any() and not guidance[2:].any()
    for nothing in (similarity_guidance(None, schedule, xt, t, 3.0), similarity_guidance(model, schedule, xt, t, 0.0)):
        assert nothing == 0


def test_gamma_falls_linearly_to_0():
    assert [fade(done, 8) for done in (0, 2, 4, 7, 8, 9)] == [1, 0.75, 0.5, 0.125, 0, 0]
    assert [fade(done, 0) for done in (0, 0.5, 1)] == [1, 1, 1]  # as printed


def test_no_picture_is_pulled_further_than_the_limit():
    guidance, residual = randn(3, 3, 4, 4), randn(3, 3, 4, 4, seed=1)
    guidance = guidance * torch.tensor([0.1, 10, 0]).view(3, 1, 1, 1)
    short, long, none = limited(guidance, residual, 0.5)
    assert short.equal(guidance[0]) and not none.any()
    assert long.norm().item() == pytest.approx(0.5 * residual[1].norm().item())
    torch.testing.assert_close(long / long.norm(), guidance[1] / guidance[1].norm())  # shorter, not turned
    assert limited(guidance, residual, None) is guidance and limited(0.0, residual, 0.5) == 0
    assert not limited(guidance, torch.zeros_like(residual), 0.5).any()


# ---- where a classifier comes from -----------------------------------------------------------------------------------

def test_replace_head_keeps_the_rest():
    torch.manual_seed(0)
    model, x = Classifier(**dict(TINY, out_channels=5)).eval(), randn(2, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    replace_head(model)
    assert model(x, T).shape == (2, 2) and model.config["out_channels"] == 2
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed == {"out.2.c_proj.weight", "out.2.c_proj.bias"}
    described = {k: v.shape for k, v in Classifier(**model.config).state_dict().items()}
    assert described == {k: v.shape for k, v in model.state_dict().items()}  # the config says what it has become


def test_from_unet():
    unet, x = tiny_network().model, randn(2, 3, 16, 16)
    model, untrained = from_unet(unet), from_unet(unet, pretrained=False)
    assert model.encode(x, T)[0].equal(unet.encode(x, T)[0]) and model(x, T).shape == (2, 2)
    assert not untrained.encode(x, T)[0].equal(unet.encode(x, T)[0])
    model.input_blocks[0][0].weight.data.zero_()
    assert unet.input_blocks[0][0].weight.abs().min() > 0  # a copy, not the U-Net's own


def test_from_unet_leaves_psi_behind():
    import adaptor
    unet, x = tiny_network().model, randn(2, 3, 16, 16)
    features = unet.encode(x, T)[0]
    adaptor.attach(unet, 4)
    assert from_unet(unet).encode(x, T)[0].equal(features)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------

def test_fine_tuning():
    """Slightly bright against slightly dark: told apart while there is anything to see, by chance where only noise is left."""
    schedule, g = Schedule(beta_end=0.05), torch.Generator().manual_seed(0)  # alpha_bar < 1e-6 in its last quarter
    bright, dark = torch.full((16, 3, 16, 16), 0.1), torch.full((10, 3, 16, 16), -0.1)
    model = tiny_classifier()
    fine_tune(model, schedule, bright, dark, 60, 16, 2e-3, (), g)
    accuracy = accuracy_by_quarter(model, schedule, bright[:8], dark[:8], g, repeats=8)
    assert accuracy[0] > 0.95 and abs(accuracy[3] - 0.5) < 0.15, accuracy
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_fine_tuning_sees_all_timesteps():
    model, seen = tiny_classifier(), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    fine_tune(model, Schedule(timesteps=8), randn(4, 3, 16, 16), randn(4, 3, 16, 16, seed=1), 12, 16, 1e-3, (), stream(0))
    assert {*torch.cat(seen).tolist()} == {*range(8)}


def test_fine_tuning_comes_from_its_generator():
    def tune(seed):
        model = tiny_classifier()
        fine_tune(model, Schedule(), randn(4, 3, 16, 16), randn(4, 3, 16, 16, seed=1), 2, 4, 1e-3, ("flip", "shift"),
                  torch.Generator().manual_seed(seed))
        return model.out[2].c_proj.weight
    torch.manual_seed(1)
    first = tune(0)
    torch.manual_seed(2)
    assert tune(0).equal(first) and not tune(1).equal(first)


class Oracle(nn.Module):
    """Right about the target below t = 500, wrong above; always right about the source."""
    def forward(self, x, t):
        target = (x.mean((1, 2, 3)) > 0) & (t < 500)
        return torch.stack([~target, target], 1).float()


def test_accuracy_by_quarter():
    schedule = Schedule(beta_start=1e-9, beta_end=2e-9)  # no noise: the oracle sees
    source, target = -torch.ones(12, 3, 2, 2), torch.ones(2, 3, 2, 2)
    g = torch.Generator().manual_seed(0)
    assert accuracy_by_quarter(Oracle(), schedule, source, target, g) == [1, 1, 0.5, 0.5]
    assert accuracy_by_quarter(Oracle(), schedule, source, target, g, micro_batch_size=5) == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("timesteps", [4, 10, 999])
def test_quarters_hold_every_timestep(timesteps):
    seen = []

    class Recorder(Oracle):
        def forward(self, x, t):
            assert len(x) <= 7
            seen.append(t)
            return super().forward(x, t)

    schedule = Schedule(timesteps=timesteps, beta_start=1e-9, beta_end=2e-9)
    pictures, g = torch.ones(60, 3, 2, 2), torch.Generator().manual_seed(0)
    accuracy_by_quarter(Recorder(), schedule, pictures, pictures, g, repeats=100, micro_batch_size=7)
    bounds = [min(t for t in range(timesteps) if t * 4 // timesteps == quarter) for quarter in range(4)] + [timesteps]
    for first, end, part in zip(bounds, bounds[1:], torch.cat(seen).chunk(4)):
        assert part.unique().tolist() == list(range(first, end))
    with pytest.raises(ValueError, match="3 timesteps"):
        accuracy_by_quarter(Oracle(), Schedule(timesteps=3), pictures, pictures, g)


# ---- augmentation ----------------------------------------------------------------------------------------------------

def pictures(n=64):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_augmentation():
    assert augment(pictures(), (), torch.Generator()).equal(pictures())


@pytest.mark.parametrize("kinds", [("flip",), ("shift",), ("colour",), ("flip", "shift", "colour")])
def test_augmentations(kinds):
    x = pictures()
    y = augment(x, kinds, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.dtype == x.dtype and -1 <= y.min() and y.max() <= 1 and not y.equal(x)
    assert augment(x, kinds, torch.Generator().manual_seed(0)).equal(y) and not augment(x, kinds, torch.Generator().manual_seed(1)).equal(y)


def test_flip():
    x = pictures()
    mirrored = [b.equal(a.flip(2)) for a, b in zip(x, augment(x, ("flip",), torch.Generator().manual_seed(0)))]
    assert 16 < sum(mirrored) < 48
    kept = [b.equal(a) for a, b in zip(x, augment(x, ("flip",), torch.Generator().manual_seed(0)))]
    assert all(a != b for a, b in zip(mirrored, kept))


def test_shift_moves_by_up_to_a_sixteenth():
    x = -torch.ones(64, 3, 64, 64)
    x[:, :, 30:34, 30:34] = 1  # a square in the middle
    y = (augment(x, ("shift",), torch.Generator().manual_seed(0)) + 1) / 2
    at = torch.arange(64.0)
    for across in (1, 2):
        centre = (y[:, 0].sum(across) * at).sum(1) / y[:, 0].sum((1, 2)) - 31.5
        assert 3 < centre.abs().max() < 4.5 and centre.min() < 0 < centre.max()
    areas = y[:, 0].sum((1, 2)) / 16  # of a square whose side changes by up to 5 %: from 0.95^-2 to 1.05^-2
    assert 0.9 < areas.min() < 0.93 and 1.07 < areas.max() < 1.11


def test_colour_is_one_scale_and_shift_a_channel():
    x = 0.2 * pictures(4)  # far from where it is clamped
    y = augment(x, ("colour",), torch.Generator().manual_seed(0))
    scales = []
    for a, b in zip(x.flatten(0, 1), y.flatten(0, 1)):
        scales.append(b.std() / a.std())
        torch.testing.assert_close(b, scales[-1] * a + (b.mean() - scales[-1] * a.mean()))
    assert 0.7 <= min(scales) < 0.85 and 1.15 < max(scales) <= 1.3
    moved = augment(torch.zeros(200, 3, 2, 2), ("colour",), torch.Generator().manual_seed(0))[:, :, 0, 0]  # grey: by the shift alone
    assert moved.abs().max() <= 0.3 and moved.std() == pytest.approx(0.3 / 3 ** 0.5, rel=0.05)


# ---- p_phi of a run --------------------------------------------------------------------------------------------------

def bright_and_dark():
    """Twenty bright pictures of the source, ten dark ones of the target."""
    return 0.3 + 0.1 * randn(20, 3, 16, 16), -0.3 + 0.1 * randn(10, 3, 16, 16, seed=1)


def stream(number):
    return torch.Generator().manual_seed(number)


def test_the_classifier_of_a_run_prefers_the_target():
    source, target = bright_and_dark()
    schedule = Schedule()
    model, accuracy = make_classifier(tiny_classifier, schedule, source, target, ("flip",), 40, 16, 2e-3, stream)
    t, x0 = torch.full((8,), 100), torch.full((8, 3, 16, 16), 0.3)
    noise = randn(8, 3, 16, 16, seed=2)
    bright, dark = (F.log_softmax(model(schedule.add_noise(x, t, noise), t), 1)[:, TARGET] for x in (x0, -x0))
    assert (dark > bright + 1).all() and accuracy[0] > 0.9 and len(accuracy) == 4


@pytest.fixture
def calls(monkeypatch):
    """What the trainings and the check of a run's classifier were called with, instead of doing anything."""
    seen = dict(trained=[], checked=[])
    monkeypatch.setattr(classifier, "fine_tune", lambda model, schedule, *a: seen["trained"].append((model, *a)))
    monkeypatch.setattr(classifier, "accuracy_by_quarter",
                        lambda model, schedule, *a, **more: seen["checked"].append((model, *a, more)) or [0.5] * 4)
    return seen


def test_the_check_is_on_pictures_that_were_held_out(calls):
    source, target = bright_and_dark()
    kinds = ("flip", "colour")
    model, accuracy = make_classifier(tiny_classifier, Schedule(), source, target, kinds, 7, 6, 1e-3, stream,
                                      micro_batch_size=3)
    trial, final = calls["trained"]
    (checked, held_source, held_target, g, more), = calls["checked"]
    assert checked is trial[0] and model is final[0] and checked is not model and accuracy == [0.5] * 4
    assert torch.equal(torch.cat([held_source, trial[1]]), source)  # disjoint, and together all
    assert torch.equal(torch.cat([held_target, trial[2]]), target)
    assert (len(held_source), len(held_target)) == (4, 2) and more == dict(micro_batch_size=3)
    assert torch.equal(final[1], source) and torch.equal(final[2], target)
    assert g.initial_seed() == classifier.ACCURACY
    for _, _, _, iterations, batch_size, rate, changes, g, micro, _ in calls["trained"]:
        assert (iterations, batch_size, rate, changes, micro) == (7, 6, 1e-3, kinds, 3)
        assert g.initial_seed() == classifier.BATCHES


def test_of_latents_changed_versions_are_encoded(calls):
    source, target = bright_and_dark()
    model, accuracy = make_classifier(tiny_classifier, Schedule(), source, target, ("colour",), 1, 4, 1e-3, stream,
                                      encode=lambda images: 2 * images, check=False)
    (_, seen_source, seen_target, _, _, _, changes, *_), = calls["trained"]
    assert accuracy is None and not calls["checked"] and changes == ()
    expected = [2 * augment(images.repeat(n, 1, 1, 1), ("colour",), stream(4)) for images, n in ((source, 2), (target, 16))]
    assert torch.equal(seen_source, expected[0]) and torch.equal(seen_target, expected[1])


def test_fine_tuning_in_small_parts_is_the_same():
    def tune(micro):
        model, seen = tiny_classifier(), []
        model.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), module.training)))
        fine_tune(model, Schedule(), randn(4, 3, 16, 16), randn(4, 3, 16, 16, seed=1), 1, 8, 1e-3, (), stream(0), micro)
        return model.out[2].c_proj.weight, seen
    (whole, at_once), (split, parts) = tune(None), tune(3)
    assert at_once == [(8, True)] and parts == [(3, True), (3, True), (2, True)]
    torch.testing.assert_close(split, whole)


class Idle(nn.Module):
    """Its weight changes nothing."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x, t):
        return 0 * self.w.expand(len(x), 2)


def test_weights_decay():
    """By 0.05 times the learning rate a step, as in guided-diffusion."""
    model = Idle()
    fine_tune(model, Schedule(), randn(2, 3, 4, 4), randn(2, 3, 4, 4), 2, 4, 0.1, (), stream(0))
    torch.testing.assert_close(model.w.data, torch.full((2,), 0.995 ** 2))
