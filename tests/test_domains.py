"""The built-in domains: what they draw, and which pictures a name or a folder stands for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import domains
from domains import __main__ as program
from plumbing.options import InputError
from plumbing.pictures import read_array, to_uint8

ALL = [*domains.SOURCES, *domains.TARGETS]


@pytest.mark.parametrize("domain", ALL)
def test_shapes_ranges_and_prefix(domain):
    pictures, labels = domains.draw(domain, 6, seed=3)
    assert pictures.shape == (6, 32, 32, 3) and pictures.dtype == np.uint8
    known = domains.ATTRIBUTES[domains.TARGETS.get(domain, domain)]
    assert labels.shape == (6, len(known)) and labels.dtype == np.int64
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
    evaluation = domains.evaluation_pictures(domain, 10)[0]
    target = next(target for target, source in domains.TARGETS.items() if domain in (target, source))
    shots = domains.ten_shots(target)[0]
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


@pytest.mark.parametrize("domain, colour, contrast", [
    ("toyfaces", (174.7, 164.6, 157.0), 58.4), ("sunglasses", (150.9, 150.2, 144.9), 68.1), ("sketches", (208.2, 206.7, 203.7), 49.8),
    ("babies", (170.1, 168.6, 159.7), 57.9), ("modigliani", (149.1, 122.7, 97.0), 43.2), ("raphael", (104.5, 77.0, 51.7), 44.1),
    ("toychurches", (169.7, 162.8, 159.1), 58.5), ("haunted-houses", (87.1, 78.5, 87.0), 36.9), ("landscape-drawings", (208.2, 200.5, 187.9), 47.2)])
def test_the_pictures_are_those_of_the_published_results(domain, colour, contrast):
    """Mean colour and standard deviation of the ten shots, or of ten source pictures: the tables of docs/ were made with these."""
    pictures = domains.ten_shots(domain)[0] if domain in domains.TARGETS else domains.draw(domain, 10, seed=0)[0]
    assert pictures.mean((0, 1, 2)) == pytest.approx(colour, abs=0.5) and pictures.std() == pytest.approx(contrast, abs=0.5)


def test_a_family_is_labelled_domain_by_domain():
    pictures, labels = domains.draw_family("toychurches", 9, seed=0)
    assert len(pictures) == 9 and labels[:, -1].tolist() == [0] * 3 + [1] * 3 + [2] * 3


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


# ---- pictures by name or folder ----------------------------------------------------------------------------

def write(path, colour=(255, 0, 0), size=8):
    """An even picture as PNG."""
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


@pytest.mark.parametrize("name", sorted(domains.TARGETS))
def test_built_in_target(name):
    images = domains.target_images(name, 32)
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    assert np.array_equal(to_uint8(images).numpy(), domains.ten_shots(name, size=32)[0])


def test_target_folder_and_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = sorted(domains.TARGETS)[0]
    write(tmp_path / name / "a.png", size=32)
    assert len(domains.target_images(name, 32)) == 10
    assert domains.target_images(f"./{name}", 32).shape == (1, 3, 32, 32)
    with pytest.raises(InputError, match="nothing.*folder.*" + ".*".join(sorted(domains.TARGETS))):
        domains.target_images("nothing", 32)
    with pytest.raises(InputError, match="a.png.*is a file"):
        domains.target_images(f"{name}/a.png", 32)


def test_built_in_source():
    name = sorted(domains.SOURCES)[0]
    images = domains.source_images(name, 3, 32, seed=1)
    assert images.shape == (3, 3, 32, 32)
    assert np.array_equal(to_uint8(images).numpy(), domains.draw(name, 3, 1, size=32)[0])
    with pytest.raises(InputError, match="nothing.*folder.*" + ".*".join(sorted(domains.SOURCES))):
        domains.source_images("nothing", 3, 32, 0)


def test_a_built_in_name_is_no_folder_to_keep_apart_from(tmp_path, monkeypatch):
    """A run in a folder called sunglasses, of the drawn sunglasses, can go on."""
    monkeypatch.chdir(tmp_path)
    Path("sunglasses").mkdir()
    domains.keep_apart(Path("sunglasses"), "sunglasses", recursive=True)
    for out in ("sunglasses", "sunglasses/run"):
        with pytest.raises(InputError, match=f"--output-dir {out}: pictures are read from there"):
            domains.keep_apart(Path(out), "./sunglasses", recursive=True)


def test_source_folder(tmp_path):
    for i in range(12):
        folder = tmp_path / ("more" if i % 2 else "")  # those in subfolders, too
        folder.mkdir(exist_ok=True)
        write(folder / f"{i}.png", (20 * i,) * 3)
    picked = [domains.source_images(tmp_path, 6, 8, seed) for seed in (0, 0, 1)]
    assert torch.equal(picked[0], picked[1]) and not torch.equal(picked[0], picked[2])
    assert len(picked[0].mean((1, 2, 3)).unique()) == 6  # distinct
    assert len(domains.source_images(tmp_path, 99, 8, 0)) == 12


# ---- python -m domains -------------------------------------------------------------------------------------

def test_program_draws_a_grid_of_each(tmp_path):
    call(program.main, "--size", 16, "--seed", 5, "--output-dir", tmp_path / "new" / "folder")
    for domain in ALL:
        grid = read_array(tmp_path / "new" / "folder" / f"{domain}_16.png")  # pictures of 128 pixels, 4 apart
        second = grid[:128, 132:260].reshape(16, 8, 16, 8, 3)[:, 0, :, 0]
        assert np.array_equal(second, domains.draw(domain, 2, 5, 16)[0][1])


@pytest.mark.parametrize("flags, message", [
    (["--size", 7], "--size 7: must be at least 8"),
    (["--seed", -1], "--seed -1: must be from 0"),
    (["--seed", 2 ** 63], "--seed 9223372036854775808: must be from 0"),
])
def test_program_refuses(tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        call(program.main, *flags, "--output-dir", tmp_path)
