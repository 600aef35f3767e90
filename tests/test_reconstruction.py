"""experiments.reconstruction against PSNR in 8-bit units, and the lpips package."""

import re

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import domains
from checkpoints.load import load_source
from checkpoints.perceptual import load_lpips
from experiments import reconstruction
from plumbing.options import InputError
from plumbing.picture_folder import load_folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with 18 drawn faces of 64x64, two of them in a subfolder."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "more").mkdir()
    for i, pixels in enumerate(domains.draw("toyfaces", 18, 5, 64)[0]):
        Image.fromarray(pixels).save(folder / ("more" if i > 15 else "") / f"{i}.png")
    return folder


def test_figures(pictures, backbone, tmp_path, capsys):
    call(reconstruction.main, "toyfaces-latent", pictures, "--lpips-net", "squeeze", "--lpips-backbone", backbone,
         "--output", tmp_path / "out.png", "--device", "cpu")
    psnr, distance, n, size = re.match(r"PSNR (\S+) dB; LPIPS-squeeze (\S+); (\d+) pictures at (\d+)x", capsys.readouterr().out).groups()
    source, images = load_source("toyfaces-latent"), load_folder(pictures, 64, recursive=True)
    back = source.decode(source.encode(images))
    errors = 127.5 * (back - images).numpy()
    assert float(psnr) == pytest.approx(np.mean([20 * np.log10(255 / np.sqrt(np.mean(e ** 2))) for e in errors]), abs=0.01)
    with torch.no_grad():
        assert float(distance) == pytest.approx(load_lpips("squeeze", backbone)(images, back).mean().item(), abs=1e-4)
    assert (int(n), int(size)) == (18, 64) and 20 < float(psnr) < 40
    assert Image.open(tmp_path / "out.png").width > 16 * 64


@pytest.mark.parametrize("model, flags, says", [
    ("toyfaces", [], "toyfaces: has no first stage"), ("toyfaces-stylegan2", [], "has no first stage"),
    ("toyfaces-latent", ["--size", 30], "--size 30: this first stage needs a multiple of 4")])
def test_what_is_refused(model, flags, says, pictures, tmp_path):
    with pytest.raises(InputError, match=says):
        call(reconstruction.main, model, pictures, *flags, "--output", tmp_path / "out.png")
