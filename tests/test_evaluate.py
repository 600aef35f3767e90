"""evaluate.py on folders of pictures, and what it refuses."""

import functools

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import evaluate
import metrics
from checkpoints.perceptual import load_lpips
from plumbing.options import InputError
from plumbing.pictures import load_folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file with random weights in place of torchvision's squeezenet."""
    import lpips
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet1_1-random.pth"
    net = lpips.pretrained_networks.squeezenet(pretrained=False)
    names = {name: name.split(".", 1)[1] for name in net.state_dict()}
    torch.save({f"features.{names[name]}": value for name, value in net.state_dict().items()}, path)
    return path


def test_folders(tmp_path, backbone, capsys):
    rng = np.random.default_rng(0)
    for folder, n in (("samples", 8), ("targets", 3)):
        (tmp_path / folder).mkdir()
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
    call(evaluate.main, "--samples", tmp_path / "samples", "--target", tmp_path / "targets", "--lpips-net", "squeeze", "--lpips-backbone", backbone,
         "--size", 32, "--device", "cpu")
    embed = functools.partial(metrics.lpips_features, load_lpips("squeeze", backbone))
    expected = metrics.intra_lpips(embed, *(load_folder(tmp_path / f, 32) for f in ("samples", "targets")))
    out = capsys.readouterr().out
    assert f"(squeeze, 32x32, 8 samples): {expected.mean:.3f} ± {expected.std:.3f}" in out and " ".join(map(str, expected.sizes)) in out
    assert "warning" not in out
    (tmp_path / "weights.safetensors").touch()  # as if the samples came from a run that has gone on since
    call(evaluate.main, "--samples", tmp_path / "samples", "--target", tmp_path / "targets", "--lpips-net", "squeeze", "--lpips-backbone", backbone,
         "--size", 32, "--device", "cpu")
    assert "samples has pictures older than" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ([], "what to score"),
    (["--samples", "x"], "--target: missing"),
    (["--samples", "docs/images", "--target", "no-such"], "no-such: no such folder"),  # before any weights are looked for
    (["--samples", "docs/images", "--target", "docs/images", "--reference", "no-such"], "no-such: no such folder"),
    (["--samples", "docs/images", "--target", "docs/images", "--lpips-backbone", "none.pth"], "none.pth: no such file"),
    (["--samples", "docs/images", "--target", "docs/images", "--size", "16"], "--size 16: must be at least 32"),
    (["runs/none"], "runs/none: not the folder of a run"),
    (["runs/x", "--target", "y"], "what to score"),
    (["x", "-n", "1"], "-n 1"),
    (["x", "--size", "64"], "--size: is for folders of pictures"),
    (["--samples", "x", "--target", "y", "-n", "10"], "-n: is for runs; --samples are scored as they are"),
])
def test_bad_input(flags, message):
    with pytest.raises(InputError, match=message):
        call(evaluate.main, *flags)


def test_runs_from_other_sources_are_refused(finished):
    with pytest.raises(InputError, match="the judge knows built-in sources"):
        call(evaluate.main, finished, "-n", 2)
