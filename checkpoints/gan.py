"""StyleGAN2 networks in files: our own, and the training states in which CDC publishes its sources.

A published file has entries g_ema (the averaged generator, which draws), g and d; what its names do not say,
its shapes do.  One with a generator alone can draw, but not be adapted.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.stylegan2 import Discriminator, Generator
from checkpoints.network import SMALL_SIZE, check_finite, check_fit
from ddpm import draw
from plumbing.options import InputError

NAME = "StyleGAN2"


@dataclasses.dataclass
class GAN:
    """A generator with its discriminator; it draws as a `Network` does."""
    model: Generator
    discriminator: Discriminator | None
    description: dict[str, Any]
    precision: str = "fp32"
    first_stage: None = None
    clip: None = None

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.model.size

    @property
    def small(self) -> bool:
        """Whether other settings than a paper's for 256x256 suit it."""
        return self.image_size <= SMALL_SIZE

    def to(self, device: torch.device | str) -> "GAN":
        """Moves both networks; the discriminator's are laid out as convolutions are fastest."""
        self.model.to(device)
        if self.discriminator:
            self.discriminator.to(device, memory_format=torch.channels_last)
        return self

    @torch.inference_mode()
    def sample(self, seeds: Sequence[int], steps: int = 1, batch_size: int = 64,
               progress: Callable[[Iterable], Iterable] = iter, **_: Any) -> Tensor:
        """Pictures (N, 3, H, W) on the CPU, one for each seed: z, then the noise of each layer.

        What steers a diffusion model's sampling means nothing here, and is not looked at.
        """
        device, parts = self.model.input.input.device, []
        for first in progress(range(0, len(seeds), batch_size)):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[first:first + batch_size]]
            z = draw((self.model.style_dim,), generators).to(device)
            noise = [draw(fixed.shape[1:], generators).to(device) for fixed in self.model.fixed_noise]
            parts.append(self.model.synthesize(self.model.style(z), noise)[0].cpu())
        return torch.cat(parts) if parts else torch.empty(0, 3, self.image_size, self.image_size)

    def check_steps(self, steps: int, flag: str = "--steps") -> None:
        """Any number will do: a GAN draws in one pass."""

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, the generator's after g_ema, the discriminator's after d."""
        of_d = self.discriminator.state_dict(prefix="d.") if self.discriminator else {}
        return {**self.model.state_dict(prefix="g_ema."), **of_d}


def build(description: dict[str, Any], where: str) -> GAN:
    """Untrained networks from their description; InputError if an option is wrong."""
    try:
        config = description["config"]
        generator, discriminator = Generator(**config["generator"]).eval(), None
        if config["discriminator"]:
            discriminator = Discriminator(**config["discriminator"]).eval()
            if discriminator.size != generator.size:
                raise ValueError(f"one draws at {generator.size}, the other judges at {discriminator.size}")
        return GAN(generator, discriminator, description)
    except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: does not describe a StyleGAN2 this program can build "
                         f"({type(error).__name__}: {error})") from None


def describe(generator: dict[str, Tensor], discriminator: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """What a published generator and discriminator (or nothing) are, from names and shapes."""
    try:
        layers = [key for key in generator if re.fullmatch(r"convs\.\d+\.conv\.weight", key)]
        size = 4 * 2 ** (len(layers) // 2)
        found = dict(size=size, style_dim=generator["style.1.weight"].shape[1],
                     n_mlp=sum(bool(re.fullmatch(r"style\.\d+\.weight", key)) for key in generator),
                     channel_base=generator[f"convs.{len(layers) - 1}.conv.weight"].shape[1] * size,
                     channel_max=generator["input.input"].shape[1])
        other = None
        if discriminator:
            channels = discriminator["convs.0.0.weight"].shape[0]
            other = dict(size=size, channel_base=channels * size,
                         channel_max=discriminator["final_linear.1.weight"].shape[1])
    except (IndexError, KeyError) as error:
        raise InputError(f"{path}: a StyleGAN2 of another layout than that of its common PyTorch port "
                         f"(no {error.args[0]})") from None
    return dict(network=NAME, config=dict(generator=found, discriminator=other),
                layout="StyleGAN2, PyTorch port")


@torch.no_grad()
def fill(gan: GAN, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill both networks; InputError if the keys, g_ema.* and d.*, are not exactly their own.

    The filters of blurs are constants: some files have them, some do not.
    """
    own = {key: value for key, value in gan.state_dict().items() if not key.endswith(".kernel")}
    tensors = {key: value for key, value in tensors.items() if not key.endswith(".kernel")}
    check_fit({key: value.shape for key, value in own.items()}, tensors, path)
    check_finite(tensors, path)
    for key, value in own.items():
        value.copy_(tensors[key])
