"""A network with its schedule and description, and the one file format of this project."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoencoder
from classifier import Classifier
from ddpm import Schedule, sample
from plumbing import distributed
from plumbing.files import write_atomic
from plumbing.options import InputError
from unet import AttentionBlock, UNet

SMALL_SIZE = 64  # pixels a side
FIRST_STAGES = {"VQ": autoencoder.VQ, "KL": autoencoder.KL}
NETWORKS = {"UNet": UNet, "Classifier": Classifier, **FIRST_STAGES}


@dataclasses.dataclass
class Network:
    """A network, the schedule it was trained with, and what its file says about itself.

    A latent model has a first stage, and its x_0 is scale_factor times the latent of a picture; for a pixel
    model, x_0 is the picture.

    precision    fp32 or bf16: what the network samples in; first stages always compute in fp32
    clip         what sampling limits the predicted x_0 to, if to anything: for pictures 1; for latents, once
                 they are adapted, the largest of the training pictures
    description  network, config and schedule; of latent models first_stage, scale_factor, clip; layout, and
                 what else a file says (made_by, converted_from, ...)
    """
    model: nn.Module
    schedule: Schedule
    description: dict[str, Any]
    first_stage: nn.Module | None = None
    scale_factor: float = 1.0
    precision: str = "fp32"
    clip: float | None = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_0."""
        return self.model.in_channels, self.model.image_size, self.model.image_size

    @property
    def image_size(self) -> int:
        """Pixels per side of the pictures."""
        return self.model.image_size * (self.first_stage.factor if self.first_stage else 1)

    @property
    def small(self) -> bool:
        """Whether other settings than a paper's for 256x256 suit it."""
        return self.image_size <= SMALL_SIZE

    def to(self, device: torch.device | str) -> "Network":
        """Moves the network, first stage and all, and lays it out as convolutions are fastest."""
        for model in (self.model, self.first_stage):
            if model:
                model.to(device, memory_format=distributed.layout(device))
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> x_0, (B, *shape), in fp32; both on the network's device."""
        with torch.autocast(images.device.type, enabled=False):
            return self.first_stage.encode(images) * self.scale_factor if self.first_stage else images

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> pictures (B, 3, H, W), of a latent model within [-1, 1], in fp32; both on its device."""
        with torch.autocast(x0.device.type, enabled=False):
            return self.first_stage.decode(x0 / self.scale_factor).clamp(-1, 1) if self.first_stage else x0

    def sample(self, seeds: Sequence[int], steps: int = 50, batch_size: int = 64, **options: Any) -> Tensor:
        """Pictures (N, 3, H, W) on the CPU, one for each seed; the options are those of ddpm.sample."""
        device = next(self.model.parameters()).device
        with distributed.autocast(device, self.precision):
            x0 = sample(self.model, self.schedule, self.shape, seeds, steps, clip=self.clip, device=device,
                        batch_size=batch_size, **options)
        if self.first_stage is None or len(x0) == 0:
            return x0
        return torch.cat([self.decode(part.to(device)).cpu() for part in x0.split(batch_size)])

    def check_steps(self, steps: int, flag: str = "--steps") -> None:
        """InputError that names the flag for more sampling steps than the schedule has timesteps."""
        if steps > self.schedule.timesteps:
            raise InputError(f"{flag} {steps}: this model has {self.schedule.timesteps}")

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, named as in our own files: the network's, and the first stage's after first_stage."""
        first_stage = self.first_stage.state_dict(prefix="first_stage.") if self.first_stage else {}
        return {**self.model.state_dict(), **first_stage}


def build(description: dict[str, Any], where: str) -> Network:
    """An untrained network from its description, which is from `where`; InputError if an option is wrong."""
    try:
        model = NETWORKS[description["network"]](**description["config"]).eval()
        if model.image_size % model.factor:
            raise ValueError(f"image_size {model.image_size} must be divisible by {model.factor}")
        network = Network(model, Schedule(**description.get("schedule", {})), description)
        if stage := description.get("first_stage"):
            first_stage = FIRST_STAGES[stage["network"]](**stage["config"])
            network.first_stage = first_stage.eval().requires_grad_(False)
            network.scale_factor = float(description.get("scale_factor", 1.0))
            clip = description.get("clip")
            network.clip = None if clip is None else float(clip)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
            TypeError, ValueError) as error:  # an option of the wrong type or size raises nearly anything
        raise InputError(f"{where}: does not describe a network this program can build "
                         f"({type(error).__name__}: {error})") from None
    if network.first_stage and network.first_stage.embed_dim != model.in_channels:
        latent = network.first_stage.embed_dim
        raise InputError(f"{where}: the first stage gives latents of {latent} channels, "
                         f"the U-Net takes {model.in_channels}")
    return network


def save_network(path: Path, network: Network) -> None:
    """Weights, of a latent model with its first stage, and description in one file, atomically."""
    save_tensors(path, network.state_dict(), {"description": json.dumps(network.description)})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, atomically."""
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata))


def fingerprint(network: Network) -> str:
    """A short hash of the weights, first stage and all: psi is worth nothing beside another theta.

    And of what else tells one latent model's samples from another's.
    """
    begins = ""
    if network.first_stage:
        begins = f"{network.scale_factor}" + (f" {network.clip}" if network.clip else "")
    return digest(network.state_dict(), begins)


def reading(network: Network) -> dict[str, Any]:
    """What the weights of a diffusion model mean where they do not show it themselves, as in JSON.

    The same for each spelling of the same network: files of other programs come with other options.
    """
    config, schedule = network.model.config, network.schedule.config
    modules = [*network.model.modules(), *(network.first_stage.modules() if network.first_stage else ())]
    return dict(
        prediction=network.schedule.prediction,
        schedule=[schedule[name] for name in ("name", "timesteps", "beta_start", "beta_end")
                  if schedule["name"] != "cosine" or not name.startswith("beta")],
        image_size=network.model.image_size,
        sinusoids=[config["flip_sin_to_cos"], config["freq_shift"]],
        padding=None if config["resblock_updown"] else config["downsample_padding"],
        heads=[m.num_heads for m in modules if isinstance(m, AttentionBlock)],
        norms=[list(norm) for norm in sorted({(m.num_groups, m.eps) for m in modules
                                              if isinstance(m, nn.GroupNorm)})])


def digest(tensors: Mapping[str, Tensor], begins: str = "") -> str:
    """A short hash of tensors and their names."""
    found = hashlib.sha256(begins.encode())
    for key, value in tensors.items():
        found.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def check_fit(shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor], path: Path) -> None:
    """InputError that names the first keys which are missing, unexpected or misshapen."""
    faults = [f"missing {key}" for key in shapes if key not in tensors]
    faults += [f"unexpected {key}" for key in tensors if key not in shapes]
    faults += [f"{key} is {list(tensors[key].shape)}, expected {list(shape)}" for key, shape in shapes.items()
               if key in tensors and list(tensors[key].shape) != list(shape)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{path}: weights do not fit the network: {'; '.join(faults[:3])}{more}; "
                         "is --arch right?")


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """InputError if weights are NaN or infinite."""
    broken = [key for key, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN or Inf ({broken[0]}, "
                         "...): the "
                         "training that made this file diverged, or it was cast to half precision; take "
                         "another one")


@torch.no_grad()
def load_strictly(own: nn.Module | Network, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill the network; InputError if the keys are not exactly its own."""
    state = own.state_dict()
    check_fit({key: value.shape for key, value in state.items()}, tensors, path)
    check_finite(tensors, path)
    for key, value in state.items():
        value.copy_(tensors[key])
