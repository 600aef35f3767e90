"""A tiny world for the programs: an untrained source at 16x16, folders of pictures, a way to run train_tan.py."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: pytest -n 2 has two processes at work

import numpy as np
import pytest
import torch
from PIL import Image

import train_tan
from baselines import gan_transfer
from checkpoints.network import Network, build, save_network
from checkpoints.published import LINEAR
from domains import judge
from experiments import launch
from plumbing.options import flag
from settings import used_by

ROOT = Path(__file__).parent.parent
TINY = dict(image_size=16, in_channels=3, model_channels=16, out_channels=3, num_res_blocks=1,
            attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=16, use_scale_shift_norm=True, norm_groups=8)


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
    """Paths: `source` (a file of weights), `targets` (five dark pictures), `sources` (eight bright ones).

    flags(method) are those of a tiny run.
    """
    folder = tmp_path_factory.mktemp("tiny")
    save_network(folder / "source.safetensors", tiny_network())
    rng = np.random.default_rng(0)
    for name, n, low in (("targets", 5, 0), ("sources", 8, 128)):
        (folder / name).mkdir()
        for i in range(n):
            Image.fromarray(rng.integers(low, low + 128, (16, 16, 3), np.uint8)).save(folder / name / f"{i}.png")
    options = dict(source=folder / "source.safetensors", target=folder / "targets", source_images=folder / "sources",
                   source_count=8, classifier_iterations=3, iterations=6, batch_size=4, pgd_steps=2, adaptor_width=4,
                   learning_rate_decay="none", guidance_fade=0.0,  # so that a run may go on as if it had been meant longer
                   samples=0, sample_steps=2, previews=1, device="cpu")

    def flags(method="tan"):
        given = {name: value for name, value in options.items() if name in used_by(method)}
        unchecked = ["--no-classifier-check"] if "classifier_check" in used_by(method) else []  # the check takes seconds
        return ["--method", method, *unchecked, *(word for name, value in given.items() for word in (flag(name), str(value)))]

    return SimpleNamespace(source=options["source"], targets=options["target"], sources=options["source_images"],
                           flags=flags)


@pytest.fixture(scope="session")
def train(tiny):
    """train(out, *flags): a run of train_tan.py on the tiny source; later flags win.  Returns its folder."""
    def train(out, *flags):
        method = flags[flags.index("--method") + 1] if "--method" in flags else "tan"
        given = tiny.flags(method)
        if "scale-shift" in flags:  # has no width
            at = given.index("--adaptor-width")
            del given[at:at + 2]
        call(train_tan.main, *given, "--output-dir", out, *flags)
        return out
    return train


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory):
    """The folder of a finished run of six iterations with the whole method.  Not to be changed."""
    return train(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A file with random weights in place of torchvision's squeezenet."""
    import lpips
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "squeezenet1_1-random.pth"
    net = lpips.pretrained_networks.squeezenet(pretrained=False)
    torch.save({f"features.{name.split('.', 1)[1]}": value for name, value in net.state_dict().items()}, path)
    return path


@pytest.fixture
def runs_here(monkeypatch):
    """What experiments train is trained in this process; the runs' folders, in order."""
    folders = []

    def call_train(program, arguments, log):
        folders.append(arguments[arguments.index("--output-dir") + 1])
        call((gan_transfer if program is launch.GAN_TRANSFER else train_tan).main, *arguments)
        return 0

    monkeypatch.setattr(launch, "call_train", call_train)
    return folders


@pytest.fixture
def few_fresh(monkeypatch):
    """The judge compares with 60 fresh pictures: fast, and good enough where figures do not matter."""
    made_with_fresh = judge.reference, judge.usual_distance
    monkeypatch.setattr(judge, "FRESH", 60)
    for made in made_with_fresh:
        made.cache_clear()
    yield
    for made in made_with_fresh:
        made.cache_clear()
