"""baselines/augment.py against torchvision and formulas of its own."""

import math

import pytest
import torch
import torchvision.transforms.functional as T

from baselines import augment as A

SMOOTH = T.gaussian_blur(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 15, 4.0)
ONE = torch.ones(2)


def inner(x):
    return x[:, :, 16:-16, 16:-16]


@pytest.mark.parametrize("matrix, expected", [
    (A.diagonal(-ONE, ONE), T.hflip(SMOOTH)),
    (A.diagonal(ONE, -ONE), T.vflip(SMOOTH)),
    (A.rotation(ONE * math.pi / 2), T.rotate(SMOOTH, -90)),
    (A.rotation(ONE * math.pi), T.rotate(SMOOTH, 180)),
    (A.rotation(ONE * math.radians(20)), T.rotate(SMOOTH, -20, T.InterpolationMode.BILINEAR)),
    (A.translation(ONE * 2 * 5 / 64, -ONE * 2 * 3 / 64), T.affine(SMOOTH, 0, [5, -3], 1, [0, 0], T.InterpolationMode.BILINEAR)),
    (A.diagonal(ONE * 1.25, ONE * 1.25), T.affine(SMOOTH, 0, [0, 0], 1.25, [0, 0], T.InterpolationMode.BILINEAR)),
    (A.product([A.translation(ONE * 0.25, ONE * 0), A.rotation(ONE * math.pi / 2)]),
     T.rotate(T.affine(SMOOTH, 0, [8, 0], 1, [0, 0]), -90))])
def test_geometry_is_torchvisions(matrix, expected):
    torch.testing.assert_close(inner(A.apply_geometry(SMOOTH, matrix)), inner(expected), rtol=0, atol=2e-3)


def test_colours():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    third = A.hue(ONE * 2 * math.pi / 3)  # a third of a turn about grey: red becomes green, green blue
    torch.testing.assert_close(A.apply_colour(x, third), x[:, [2, 0, 1]])
    torch.testing.assert_close(A.apply_colour(x, A.along_grey(ONE, 0 * ONE)), x.mean(1, keepdim=True).expand_as(x))
    flipped = A.apply_colour(x, A.along_grey(-ONE, ONE))
    torch.testing.assert_close(flipped.mean(1), -x.mean(1))
    torch.testing.assert_close(flipped[:, 0] - flipped[:, 1], x[:, 0] - x[:, 1])
    torch.testing.assert_close(A.apply_colour(x, A.translation(ONE, ONE, ONE)), x + 1)
    torch.testing.assert_close(A.apply_colour(x, A.diagonal(2 * ONE, 2 * ONE, 2 * ONE)), 2 * x)


def test_with_probability_0_nothing_happens():
    g = torch.Generator().manual_seed(0)
    assert A.augment(SMOOTH, 0.0, g) is SMOOTH
    assert torch.equal(A.random_geometry(50, 0.0, 32, g), torch.eye(3).expand(50, 3, 3))
    assert torch.equal(A.random_colour(50, 0.0, g), torch.eye(4).expand(50, 4, 4))


def test_each_transform_comes_as_often_as_it_should():
    """With p = 0.3 a picture keeps its colours with probability 0.7^5, but for luma flips that are none."""
    matrices = A.random_colour(20_000, 0.3, torch.Generator().manual_seed(0))
    kept = (matrices == torch.eye(4)).flatten(1).all(1).float().mean()
    assert abs(kept - 0.7 ** 4 * 0.85) < 0.01
    turned = A.random_geometry(20_000, 0.3, 32, torch.Generator().manual_seed(0))
    kept = (turned == torch.eye(3)).flatten(1).all(1).float().mean()  # the two turns together: 0.7
    assert abs(kept - 0.7 ** 5 * 0.85 * 0.775) < 0.01


def test_pictures_are_changed_as_often_as_p_says():
    """The chances of the last test, multiplied; a shift of 32 pixels by less than half of one is none."""
    x = torch.rand(1500, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = A.augment(x, 0.1, torch.Generator().manual_seed(1))
    kept = ((changed - x).abs().amax((1, 2, 3)) < 1e-3).float().mean()
    assert abs(kept - (0.9 ** 5 * 0.95 * 0.925) * (0.9 ** 4 * 0.95)) < 0.04


def the_only(step, monkeypatch):
    """Of the transforms, counted from 0, this one alone, always."""
    calls = iter(range(8))
    monkeypatch.setattr(A.Draw, "sometimes", lambda self, p, matrix: matrix if next(calls) == step
                        else torch.eye(matrix.shape[1]).expand(self.n, -1, -1))


@pytest.mark.parametrize("step, allowed", [
    (0, lambda m: torch.equal(m.abs(), torch.eye(3).expand_as(m)) and {*m[:, 0, 0].tolist()} == {-1, 1}
        and {*m[:, 1, 1].tolist()} == {1}),                                                  # from left to right
    (1, lambda m: {*map(tuple, m[:, :2, 0].round().int().tolist())} == {(1, 0), (0, 1), (-1, 0), (0, -1)}),
    (2, lambda m: 0.12 < (m[:, :2, 2] / 2).abs().max() <= 0.125),                            # an eighth of the side
    (3, lambda m: torch.equal(m[:, 0, 0], m[:, 1, 1]) and abs(m[:, 0, 0].log2().std() - 0.2) < 0.01),
    (4, lambda m: m[:, 1, 0].atan2(m[:, 0, 0]).abs().max() > 3.1),
    (5, lambda m: (m.det() - 1).abs().max() < 1e-5 and abs(m[:, 0, 0].log2().std() - 0.2) < 0.01),
    (7, lambda m: abs((m[:, :2, 2] / 2).std() - 0.125) < 0.005)])
def test_each_geometric_transform(step, allowed, monkeypatch):
    """The ranges of Karras et al. 2020a, appendix B."""
    the_only(step, monkeypatch)
    assert allowed(A.random_geometry(4000, 1.0, 64, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("step, of, deviation", [
    (0, lambda m: m[:, 0, 3], 0.2), (1, lambda m: m[:, 0, 0].log2(), 0.5),
    (2, lambda m: 3 * m[:, 0, 0] - 2, 1.0),                                                  # luma, 1 or -1
    (3, lambda m: (m.diagonal(dim1=1, dim2=2).sum(1) - 2) / 2, 0.5 ** 0.5),                  # cos of the turn of the hue
    (4, lambda m: (m[:, 0, 0] - m[:, 0, 1]).log2(), 1.0)])                                   # saturation
def test_each_transform_of_colours(step, of, deviation, monkeypatch):
    the_only(step, monkeypatch)
    found = of(A.random_colour(4000, 1.0, torch.Generator().manual_seed(0)))
    assert abs(found.mean()) < 0.05 and found.std() == pytest.approx(deviation, rel=0.05)


def test_gradients_flow_through():
    x = SMOOTH.clone().requires_grad_()
    A.augment(x, 1.0, torch.Generator().manual_seed(0)).square().sum().backward()
    assert x.grad.abs().sum() > 0
