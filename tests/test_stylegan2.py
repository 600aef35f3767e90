"""baselines/stylegan2.py against the published network's outputs (tests/golden), scipy and closed forms."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from baselines.gan_training import discriminator_loss, generator_loss, path_lengths, r1_penalty
from baselines.stylegan2 import Blur, Discriminator, Generator, ModulatedConv2d, Upsample, with_deviation

GOLDEN = Path(__file__).parent / "golden"


def test_a_new_style_scales_by_1():
    """As in Karras et al. 2020b, section B: the biases of the affine transforms begin at 1, all others at 0."""
    biases = {key: value for key, value in Generator(16, 8, 2, channel_base=64, channel_max=16).state_dict().items() if key.endswith("bias")}
    assert len(biases) > 10 and all((value == ("modulation" in key)).all() for key, value in biases.items())


def filled(cls, name):
    """A golden file's network, filled by its rule, and the file."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    model, tensors = cls(**golden["config"]).eval(), {}
    for i, key in enumerate(sorted(golden["keys"])):
        if key.endswith(".kernel"):
            tensors[key] = model.state_dict()[key]
            continue
        values = np.random.RandomState(i).standard_normal(golden["keys"][key]).astype(np.float32) * 0.05
        if key.endswith("modulation.bias"):
            values = 1 + values
        elif key.endswith("weight") and values.ndim in (2, 4, 5) or key.startswith("noises") or key == "input.input":
            values = values * 20
        tensors[key] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(tensors)  # strict: names and shapes are the published ones
    return model, golden


@torch.no_grad()
def test_the_generator_draws_what_the_published_one_draws():
    model, golden = filled(Generator, "stylegan2_generator_16")
    z = torch.from_numpy(np.random.RandomState(12345).standard_normal((2, 32)).astype(np.float32))
    torch.testing.assert_close(model.style(z).flatten(), torch.tensor(golden["w"]), rtol=0, atol=2e-6)
    torch.testing.assert_close(model.synthesize(model.style(z), model.fixed_noise)[0].flatten(), torch.tensor(golden["output"]), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_discriminator_decides_as_the_published_one_does():
    model, golden = filled(Discriminator, "stylegan2_discriminator_16")
    x = torch.from_numpy(np.random.RandomState(12345).standard_normal((4, 3, 16, 16)).astype(np.float32))
    torch.testing.assert_close(model(x).flatten(), torch.tensor(golden["output"]), rtol=0, atol=1e-4)


def test_widths_of_the_published_networks():
    """256x256 as CDC publishes it, Karras et al.'s configuration F."""
    with torch.device("meta"):
        generator, judge = Generator(256), Discriminator(256)
    assert [layer.conv.weight.shape[1] for layer in generator.convs[1::2]] == [512, 512, 512, 512, 256, 128]
    assert round(sum(p.numel() for p in judge.parameters()) / 1e6, 1) == 28.9
    with pytest.raises(ValueError, match="size 48: a StyleGAN2 has a power of two"):
        Generator(48)


@torch.no_grad()
def test_demodulation_gives_unit_variance():
    """Inputs of unit variance come out with unit variance, whatever the style."""
    torch.manual_seed(0)
    conv, w = ModulatedConv2d(64, 32, 3, 8), 5 * torch.randn(2, 8)
    out = conv(torch.randn(2, 64, 64, 64), w)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(out.var((2, 3)), torch.ones(2, 32), rtol=0.1, atol=0)
    conv.demodulate = False
    assert conv(torch.randn(2, 64, 64, 64), w).var((2, 3)).std() > 0.5


@torch.no_grad()
def test_modulation_scales_the_weights_of_each_picture():
    """Equations 1 and 3 of Karras et al. 2020b, picture by picture."""
    torch.manual_seed(0)
    conv, x, w = ModulatedConv2d(4, 6, 3, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 8)
    expected = []
    for image, style in zip(x, conv.modulation(w)):
        weight = conv.weight[0] * conv.scale * style[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        expected.append(F.conv2d(image[None], weight, padding=1))
    torch.testing.assert_close(conv(x, w), torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer, before", [(Blur((2, 1)), lambda x: x), (Upsample(), lambda x: np.kron(x, [[1, 0], [0, 0]]))])
def test_blur_and_upsampling_against_scipy(layer, before):
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    kernel = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64 * (4 if isinstance(layer, Upsample) else 1)
    full = scipy.signal.convolve2d(before(x[0, 0].numpy()), kernel)  # padded by 3 on each side
    size = layer.double()(x).shape[-1]
    np.testing.assert_allclose(layer(x)[0, 0], full[1:1 + size, 1:1 + size], atol=1e-12)


def test_r1_and_path_length_against_gradients_by_hand():
    torch.manual_seed(0)
    a, images = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    logits = (a * images.square()).sum((1, 2, 3))                             # its gradient: 2 a x
    expected = (2 * a * images).square().sum((1, 2, 3)).mean()
    penalty = r1_penalty(logits, images)
    torch.testing.assert_close(penalty, expected)
    assert torch.autograd.grad(penalty, images)[0].abs().sum() > 0            # can be descended

    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    jacobian = torch.randn(3 * 4 * 4, 7, dtype=torch.float64)
    drawn = (w @ jacobian.T).view(5, 3, 4, 4)
    y = torch.randn(drawn.shape, dtype=torch.float64)
    torch.testing.assert_close(path_lengths(drawn, w, y), (y.flatten(1) / 4 @ jacobian).norm(dim=1))


def test_losses_are_the_logistic_ones():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    expected = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    torch.testing.assert_close(discriminator_loss(real, fake), expected)
    torch.testing.assert_close(generator_loss(fake), -fake.sigmoid().log().mean())


@pytest.mark.parametrize("n, group", [(4, 4), (8, 4), (6, 3), (5, 1), (1, 1)])
def test_deviation_within_groups(n, group):
    x = torch.randn(n, 3, 2, 2)
    added = with_deviation(x)[:, 3]
    for i in range(n):
        mates = x[i % (n // group)::n // group]
        expected = (mates.var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(added[i], expected.expand(2, 2))


@torch.no_grad()
def test_noise_and_the_start_of_training():
    """A new network draws without noise; its mapping keeps the variance."""
    torch.manual_seed(0)
    model = Generator(16, style_dim=32, n_mlp=4, channel_base=128, channel_max=32)
    z = torch.randn(512, 32)

    def drawn(noise):
        return model.synthesize(model.style(z[:2]), noise)[0]

    drawn_noise = model.draw_noise(2, torch.Generator().manual_seed(0))
    assert torch.equal(drawn(drawn_noise), drawn(model.fixed_noise))
    model.convs[0].noise.weight.fill_(1.0)
    assert not torch.equal(drawn(drawn_noise), drawn(model.fixed_noise))
    assert 0.3 < model.style(z).var() < 1.5
    assert math.isclose(model.style[0](3 * z).square().mean(), 1, abs_tol=1e-3)
