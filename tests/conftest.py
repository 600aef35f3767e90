"""A tiny world for the programs: an untrained source at 16x16, folders of pictures, and a way to run train_tan.py on them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_tan
from checkpoints.network import Network, build, save_network
from checkpoints.published import LINEAR

TINY = dict(image_size=16, in_channels=3, model_channels=16, out_channels=3, num_res_blocks=1, attention_resolutions=[2],
            channel_mult=[1, 2], num_head_channels=16, use_scale_shift_norm=True, norm_groups=8)


def call(main, *argv) -> None:
    """A program's main() with this command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, argv)])
        main()


def tiny_network(seed: int = 0, **options) -> Network:
    """An untrained source of which every layer does something (a new one ends in zeros)."""
    torch.manual_seed(seed)
    network = build(dict(network="UNet", config=dict(TINY, **options), schedule=LINEAR), "tiny")
    for p in network.model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return network


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths: `source` (a file of weights), `targets` (five dark pictures), `sources` (eight bright ones); `flags` of a tiny run."""
    folder = tmp_path_factory.mktemp("tiny")
    save_network(folder / "source.safetensors", tiny_network())
    rng = np.random.default_rng(0)
    for name, n, low in (("targets", 5, 0), ("sources", 8, 128)):
        (folder / name).mkdir()
        for i in range(n):
            Image.fromarray(rng.integers(low, low + 128, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    flags = (f"--source {folder}/source.safetensors --target {folder}/targets --source-images {folder}/sources --source-count 8 "
             "--classifier-iterations 3 --iterations 6 --batch-size 4 --pgd-steps 2 --adaptor-width 4 --samples 0 --sample-steps 2 "
             "--previews 1 --device cpu").split()
    return SimpleNamespace(source=folder / "source.safetensors", targets=folder / "targets", sources=folder / "sources", flags=flags)


@pytest.fixture(scope="session")
def train(tiny):
    """train(out, *flags): a run of train_tan.py on the tiny source; later flags win.  Returns its folder."""
    def train(out, *flags):
        call(train_tan.main, *tiny.flags, "--output-dir", out, *flags)
        return out
    return train


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory):
    """The folder of a finished run of six iterations with the whole method.  Not to be changed."""
    return train(tmp_path_factory.mktemp("runs") / "finished")
