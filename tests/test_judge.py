"""The judge's figures on pictures of which the truth is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import domains
from domains import judge
from plumbing.options import InputError
from plumbing.pictures import to_tensor


def faces(n, seed, size=32):
    """The same scenes with and without sunglasses, (n, 3, H, W) each."""
    return [to_tensor(domains.draw(domain, n, seed, size)[0]) for domain in ("sunglasses", "toyfaces")]


@pytest.fixture(scope="module")
def scores():
    """judge.score of four kinds of pictures.

    Fresh sunglasses, the source's own faces, slightly noised copies of the ten shots, and those mirrored.
    """
    fresh, source = faces(200, seed=5)
    shots = to_tensor(domains.ten_shots("sunglasses")[0]).repeat(20, 1, 1, 1)
    copies = shots + 0.02 * torch.randn(shots.shape, generator=torch.Generator().manual_seed(0))
    kinds = dict(fresh=fresh, source=source, copies=copies, mirrored=copies.flip(3))
    return {name: judge.score(pictures, source, "sunglasses") for name, pictures in kinds.items()}


def test_score_of_known_pictures(scores):
    fresh, source, copies, mirrored = scores.values()
    assert fresh["target"] > 0.97 and source["target"] < 0.03
    assert source["kept"] == 1 and copies["kept"] < 0.4
    assert fresh["kept"] > 0.95  # they show the faces of `source`
    assert fresh["toy FID"] < 0.1 < source["toy FID"] and fresh["toy FID"] < 0.1 < copies["toy FID"]
    assert copies["toy Intra-LPIPS"] < 0.05 * fresh["toy Intra-LPIPS"]
    assert 0.8 < fresh["memorised"] < 1.2 and copies["memorised"] < 0.1 and mirrored["memorised"] < 0.1
    assert fresh["covered"] == 1


def test_one_face_covers_one_value_of_each_attribute():
    pictures = faces(1, seed=5)[0].repeat(4, 1, 1, 1)
    visible, known = judge.reference("sunglasses", 32).visible, judge.load_judge("toyfaces").description["attributes"]
    expected = len(visible) / sum(len(known[name]) for name in visible)
    assert judge.score(pictures, pictures, "sunglasses")["covered"] == pytest.approx(expected) and expected < 0.5


def test_toy_lpips_by_the_pixel():
    """The mean over levels and pixels of the squared distance of activations of length 1."""
    network, (a, b) = judge.load_judge("toyfaces"), faces(1, 5)
    (_, _, of_a), (_, _, of_b) = (network.model.encode(x, torch.zeros(1, dtype=torch.long)) for x in (a, b))
    levels = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(1).mean() for x, y in zip(of_a, of_b)]
    x, y = (judge.perceptual_features(network, pictures) for pictures in (a, b))
    torch.testing.assert_close((x - y).square().sum(), torch.stack(levels).mean(), rtol=1e-4, atol=1e-7)


def test_the_loss_of_attributes_is_one_number_a_picture():
    known, g = dict(hair=["a", "b", "c"], pose=["left", "right"]), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 5, generator=g), torch.tensor([[2, 0], [0, 1], [1, 1], [2, 1]])
    expected = [(F.cross_entropy(row[:3], hair) + F.cross_entropy(row[3:], pose)) / 2 for row, (hair, pose) in zip(logits, labels)]
    torch.testing.assert_close(judge.attribute_loss(logits, labels, known), torch.stack(expected))


def test_kernel_distance_is_near_zero_for_fresh_pictures_however_few(scores):
    pictures, _ = faces(200, seed=6)
    few = [judge.score(part, part, "sunglasses") for part in pictures.split(25)]
    assert abs(np.mean([s["toy KID"] for s in few])) < 0.5 < 5 < scores["source"]["toy KID"]
    assert min(s["toy FID"] for s in few) > 0.2


def test_fewer_source_samples_than_samples():
    """Attributes kept are counted on the pairs that there are."""
    fresh, source = faces(40, seed=5)
    whole, part = (judge.score(pictures, source[:15], "sunglasses") for pictures in (fresh, fresh[:15]))
    assert whole["kept"] == part["kept"] > 0.9


def test_too_few_samples_are_an_error_of_the_user():
    shots = to_tensor(domains.ten_shots("sunglasses")[0][:2])
    with pytest.raises(InputError, match="-n 2: Intra-LPIPS of 2 samples: no target has two of them"):
        judge.score(shots, shots, "sunglasses")


def test_eyes_cannot_be_seen_behind_sunglasses():
    visible = judge.reference("sunglasses", 32).visible
    assert "eyes" not in visible and {"hair_colour", "skin", "pose"} <= set(visible)


def test_larger_pictures_are_reduced():
    (small, _), (large, _) = faces(50, 5), faces(50, 5, size=64)
    network = judge.load_judge("toyfaces")
    of_small, of_large = judge.attributes(network, small), judge.attributes(network, large)
    assert np.mean([torch.equal(of_small[name], of_large[name]) for name in of_small]) > 0.5
    assert (judge.fit(network, large) - small).abs().mean() < 0.05  # lines round to whole pixels


def test_fewer_samples_at_once_where_memory_is_short():
    sizes = []

    def sample(seeds, steps, batch_size, **_):
        sizes.append(batch_size)
        if batch_size > 16:
            raise torch.OutOfMemoryError
        return torch.zeros(len(seeds), 3, 8, 8)
    assert judge.draw(SimpleNamespace(sample=sample), 5, 2, "name").shape == (5, 3, 8, 8) and sizes == [64, 32, 16]
