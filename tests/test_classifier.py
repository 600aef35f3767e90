"""classifier.py: the gradient is the gradient, fine-tuning learns what can be seen, and augmentation keeps the picture."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny_network
from torch import nn

from classifier import (
    SOURCE,
    TARGET,
    Classifier,
    accuracy_by_quartile,
    augment,
    fine_tune,
    from_unet,
    log_prob_gradient,
    replace_head,
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


# ---- where a classifier comes from -----------------------------------------------------------------------------------

def test_replace_head_keeps_the_rest():
    model, x = tiny_classifier(), randn(2, 3, 16, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    replace_head(model, 5)
    assert model(x, T).shape == (2, 5) and model.config["out_channels"] == 5
    changed = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert changed == {"out.2.c_proj.weight", "out.2.c_proj.bias"}
    assert Classifier(**model.config).load_state_dict(model.state_dict())  # the config describes what it has become


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
    accuracy = accuracy_by_quartile(model, schedule, bright[:8], dark[:8], g, repeats=8)
    assert accuracy[0] > 0.95 and abs(accuracy[3] - 0.5) < 0.15, accuracy
    assert not model.training and not any(p.requires_grad for p in model.parameters())


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


def test_accuracy_by_quartile():
    schedule = Schedule(beta_start=1e-9, beta_end=2e-9)  # no noise: the oracle sees
    source, target = -torch.ones(12, 3, 2, 2), torch.ones(2, 3, 2, 2)
    g = torch.Generator().manual_seed(0)
    assert accuracy_by_quartile(Oracle(), schedule, source, target, g) == [1, 1, 0.5, 0.5]


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


def test_colour_is_one_scale_and_shift_a_channel():
    x = 0.2 * pictures(4)  # far from where it is clamped
    y = augment(x, ("colour",), torch.Generator().manual_seed(0))
    for a, b in zip(x.flatten(0, 1), y.flatten(0, 1)):
        scale = b.std() / a.std()
        torch.testing.assert_close(b, scale * a + (b.mean() - scale * a.mean()))
        assert 0.7 <= scale <= 1.3
