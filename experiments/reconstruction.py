"""What a first stage gives back of pictures that it was not trained on: PSNR, LPIPS, and a picture.

  python -m experiments.reconstruction runs/pretrain-photos-kl/model.safetensors held_out/
  python -m experiments.reconstruction toyfaces-latent pictures/ --lpips-net squeeze --lpips-backbone FILE

The network is a first stage, or a latent diffusion model, whose first stage is taken.  PSNR in dB, the mean
over pictures of 10 log10(4 / mean squared error), as pictures are in [-1, 1].  --output: the first sixteen
pictures, below them what comes back.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Literal

import torch

from autoencoder import KL, VQ
from checkpoints.load import load_network, locate
from checkpoints.perceptual import load_lpips, lpips_features
from plumbing import distributed
from plumbing.options import InputError, Positional, Unset, at_least, parse, run
from plumbing.picture_folder import ImageFolder
from plumbing.pictures import save_grid
from plumbing.progress import bar

SHOWN = 16


@dataclasses.dataclass
class Options:
    model: Positional[str]
    """A first stage or a latent diffusion model, by the names that train_tan.py --source takes."""
    pictures: Positional[str]
    """Folder of pictures, with its subfolders."""
    size: Unset[int] = None
    """Pixels per side to which they are cropped and scaled (default: those of the network)."""
    lpips_net: Literal["none", "squeeze", "alex", "vgg"] = "none"
    """Backbone of LPIPS."""
    lpips_backbone: Unset[str] = None
    """Torchvision's weights for it: a file."""
    download: bool = False
    """Fetch missing weights from their publisher."""
    output: str = "reconstruction.png"
    """The picture."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


def first_stage_of(name: str) -> tuple[KL | VQ, int]:
    """A first stage and the size of its pictures; InputError for a network that has none."""
    network = load_network(locate(name))
    stage = network.first_stage or network.model
    if not isinstance(stage, (KL, VQ)):
        raise InputError(f"{name}: has no first stage")
    return stage, network.image_size


@torch.no_grad()
def main() -> None:
    options, _ = parse(Options, __doc__)
    at_least(options, size=8)
    device = distributed.setup_alone(options.device, "experiments.reconstruction")
    stage, usual = first_stage_of(options.model)
    stage, size = stage.to(device).eval(), options.size or usual
    if size % stage.factor:
        raise InputError(f"--size {size}: this first stage needs a multiple of {stage.factor}")
    lpips = None
    if options.lpips_net != "none":
        lpips = load_lpips(options.lpips_net, options.lpips_backbone, options.download).to(device)
    folder, psnr, distances, shown = ImageFolder(options.pictures, size, recursive=True), [], [], []
    for rows in bar(torch.arange(len(folder)).split(SHOWN), "pictures"):
        images = folder.batch(rows).to(device)
        back = stage.decode(stage.encode(images)).clamp(-1, 1)
        psnr += (10 * torch.log10(4 / (back - images).square().mean((1, 2, 3)))).tolist()
        if lpips:
            pairs = zip(lpips_features(lpips, images), lpips_features(lpips, back))
            distances += [(a - b).square().sum().item() for a, b in pairs]
        shown = shown or [images.cpu(), back.cpu()]
    save_grid(Path(options.output), torch.cat(shown), columns=len(shown[0]))
    text = f"; LPIPS-{options.lpips_net} {statistics.mean(distances):.4f}" if lpips else ""
    print(f"PSNR {statistics.mean(psnr):.2f} dB{text}; {len(folder)} pictures at {size}x{size}; "
          f"{options.output}")


if __name__ == "__main__":
    run(main)
