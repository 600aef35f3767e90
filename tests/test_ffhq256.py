"""The paper's network at its full size, with random weights: does a run finish, strictly loaded, on a CPU?"""

import json

import pytest
import torch
from conftest import call
from PIL import Image

import train_tan
from checkpoints.published import ARCHITECTURES
from unet import UNet


@pytest.mark.slow
def test_one_iteration_at_256_pixels(tmp_path):
    torch.manual_seed(0)
    torch.save(UNet(**ARCHITECTURES["ffhq256"]["config"]).half().state_dict(), tmp_path / "ffhq.pt")
    for folder in ("targets", "sources"):
        (tmp_path / folder).mkdir()
        for i in range(5):
            Image.effect_noise((300, 280), 40 + i).save(tmp_path / folder / f"{i}.png")
    call(train_tan.main, "--source", tmp_path / "ffhq.pt", "--arch", "ffhq256", "--target", tmp_path / "targets",
         "--source-images", tmp_path / "sources", "--output-dir", tmp_path / "run", "--device", "cpu",
         *("--iterations 1 --batch-size 1 --micro-batch-size 1 --pgd-steps 10 --checkpoint-blocks "
           "--classifier-iterations 1 --classifier-batch-size 2 --no-classifier-check "
           "--samples 1 --sample-steps 1 --previews 1").split())
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["iteration"] == 0 and line["pgd_gain"] >= 1
    print(f"{line['seconds']:.0f} s for an iteration of one picture")
