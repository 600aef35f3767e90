"""The judge's figures on pictures of which the truth is known."""

import numpy as np
import pytest
import torch

import domains
from domains import judge
from plumbing.pictures import to_tensor


@pytest.fixture(scope="module")
def scores():
    """judge.score of fresh sunglasses, of the source's own faces, of slightly noised copies of the ten shots, and of those mirrored."""
    fresh, source = (to_tensor(domains.draw(domain, 200, seed=5)[0]) for domain in ("sunglasses", "toyfaces"))
    shots = to_tensor(domains.ten_shots("sunglasses")[0]).repeat(20, 1, 1, 1)
    copies = shots + 0.02 * torch.randn(shots.shape, generator=torch.Generator().manual_seed(0))
    return {name: judge.score(pictures, source, "sunglasses") for name, pictures in (("fresh", fresh), ("source", source), ("copies", copies), ("mirrored", copies.flip(3)))}


def test_score_of_known_pictures(scores):
    fresh, source, copies, mirrored = scores.values()
    assert fresh["target"] > 0.97 and source["target"] < 0.03
    assert source["kept"] == 1 and fresh["kept"] > 0.95 and copies["kept"] < 0.4  # `fresh` shows the faces of `source`
    assert fresh["toy FID"] < 0.1 < source["toy FID"] and fresh["toy FID"] < 0.1 < copies["toy FID"]
    assert copies["toy Intra-LPIPS"] < 0.05 * fresh["toy Intra-LPIPS"]
    assert 0.8 < fresh["memorised"] < 1.2 and copies["memorised"] < 0.1 and mirrored["memorised"] < 0.1
    assert fresh["covered"] == 1


def test_kernel_distance_is_near_zero_for_fresh_pictures_however_few(scores):
    pictures, source = (to_tensor(domains.draw(domain, 200, seed=6)[0]) for domain in ("sunglasses", "toyfaces"))
    few = [judge.score(part, part, "sunglasses") for part in pictures.split(25)]
    assert abs(np.mean([s["toy KID"] for s in few])) < 0.5 < 5 < scores["source"]["toy KID"] and min(s["toy FID"] for s in few) > 0.2


def test_fewer_source_samples_than_samples():
    """Attributes kept are counted on the pairs that there are."""
    fresh, source = (to_tensor(domains.draw(domain, 40, seed=5)[0]) for domain in ("sunglasses", "toyfaces"))
    assert judge.score(fresh, source[:15], "sunglasses")["kept"] == judge.score(fresh[:15], source[:15], "sunglasses")["kept"] > 0.9


def test_eyes_cannot_be_seen_behind_sunglasses():
    assert "eyes" not in judge.reference("sunglasses", 32).visible and {"hair_colour", "skin", "pose"} <= set(judge.reference("sunglasses", 32).visible)


def test_larger_pictures_are_reduced(scores):
    small, large = (to_tensor(domains.draw("sunglasses", 50, seed=5, size=size)[0]) for size in (32, 64))
    network = judge.load_judge("toyfaces")
    agree = [torch.equal(a, b) for a, b in zip(judge.attributes(network, small).values(), judge.attributes(network, large).values())]
    assert np.mean(agree) > 0.5
    assert (judge.fit(network, large) - small).abs().mean() < 0.05  # lines round to whole pixels
