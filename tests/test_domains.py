import numpy as np
import pytest
from PIL import Image

import domains

ALL = [*domains.SOURCES, *domains.TARGETS]


@pytest.mark.parametrize("domain", ALL)
def test_shapes_ranges_and_prefix(domain):
    pictures, labels = domains.draw(domain, 6, seed=3)
    assert pictures.shape == (6, 32, 32, 3) and pictures.dtype == np.uint8
    assert labels.shape == (6, len(domains.ATTRIBUTES[domains.TARGETS.get(domain, domain)])) and labels.dtype == np.int64
    again, again_labels = domains.draw(domain, 3, seed=3)
    assert np.array_equal(again, pictures[:3]) and np.array_equal(again_labels, labels[:3])
    assert not np.array_equal(domains.draw(domain, 3, seed=4)[0], again)
    assert domains.draw(domain, 2, seed=3, size=50)[0].shape == (2, 50, 50, 3)


@pytest.mark.parametrize("source", domains.SOURCES)
def test_every_value_of_every_attribute_occurs(source):
    _, labels = domains.draw(source, 500, seed=0)
    for column, values in zip(labels.T, domains.ATTRIBUTES[source].values()):
        assert np.array_equal(np.unique(column), np.arange(len(values)))


@pytest.mark.parametrize("domain", ALL)
def test_streams_never_share_a_picture(domain):
    train = domains.draw(domain, 10, seed=0)[0]
    evaluation = domains.evaluation_pictures(domain, 10, seed=0)[0]
    shots = domains.ten_shots(domain)[0] if domain in domains.TARGETS else domains.ten_shots(next(t for t, s in domains.TARGETS.items() if s == domain))[0]
    assert shots.shape == (10, 32, 32, 3)
    pictures = np.concatenate([train, evaluation, shots]).reshape(30, -1)
    assert len(np.unique(pictures, axis=0)) == 30


def test_ten_shots_are_fixed_and_varied():
    pictures, labels = domains.ten_shots("sunglasses")
    assert np.array_equal(pictures, domains.ten_shots("sunglasses")[0])
    assert np.array_equal(labels, domains.ten_shots("sketches", size=64)[1])
    for name, column in zip(domains.ATTRIBUTES["toyfaces"], labels.T):
        if name in ("background", "skin", "hair_colour", "hair_style", "mouth", "pose"):
            assert len(np.unique(column)) == len(domains.ATTRIBUTES["toyfaces"][name])


def test_sunglasses_change_the_eye_band_only():
    faces, face_labels = domains.draw("toyfaces", 40, seed=1)
    glasses, labels = domains.draw("sunglasses", 40, seed=1)
    assert np.array_equal(face_labels, labels)
    assert np.array_equal(faces[:, :10], glasses[:, :10]) and np.array_equal(faces[:, 24:], glasses[:, 24:])
    darkened = glasses[:, 10:24].astype(int).sum(-1) < faces[:, 10:24].astype(int).sum(-1) - 60
    assert darkened.sum((1, 2)).min() > 25  # pixels


@pytest.mark.parametrize("domain", ALL)
def test_sizes_show_the_same_picture(domain):
    small = domains.draw(domain, 4, seed=2, size=32)[0].astype(float)
    large = domains.draw(domain, 4, seed=2, size=64)[0]
    reduced = np.stack([np.asarray(Image.fromarray(picture).reduce(2)) for picture in large])
    assert np.abs(reduced - small).mean() < 6  # of 255; lines round to whole pixels


def test_sketches_are_grey_on_paper():
    pictures = domains.draw("sketches", 20, seed=0)[0].astype(int)
    assert (pictures.max(-1) - pictures.min(-1)).max() <= 8
    assert np.median(pictures, axis=(1, 2, 3)).min() > 120


def test_unknown_domain_is_named():
    with pytest.raises(ValueError, match="martians.*toyfaces.*sunglasses"):
        domains.draw("martians", 1, seed=0)
    with pytest.raises(ValueError, match="martians"):
        domains.ten_shots("martians")
