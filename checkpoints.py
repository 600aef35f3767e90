"""Networks in files: this project's own safetensors (architecture in the metadata) and published ones (published.py).

  python checkpoints.py                                        the published networks that are known, and where to get them
  python checkpoints.py ffhq_p2.pt                             what a file is, and whether all of it fits
  python checkpoints.py model.ckpt --convert ldm.safetensors   the same weights as one file of this project, which loads fast

A source is named by a built-in name, one of our own files, a published file or a folder of diffusers; --arch helps where a file does
not show its network.  Loading is strict, and nothing in a file is ever run.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoencoder
import classifier
import layouts
import published
from ddpm import Schedule, sample
from options import InputError, option, parse, run
from published import ARCHITECTURES
from training import write_atomic
from unet import UNet

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = ("toyfaces", "toyfaces-latent", "toychurches")  # source models in assets/
FIRST_STAGES = {"VQ": autoencoder.VQ, "KL": autoencoder.KL}
NETWORKS = {"UNet": UNet, "Classifier": classifier.Classifier, **FIRST_STAGES}


# A Lightning .ckpt names the class of its callback.  An inert class of that name takes its place: the real one is never imported.
CALLBACKS = [type("ModelCheckpoint", (), {"__module__": f"{package}.callbacks.model_checkpoint"})
             for package in ("pytorch_lightning", "lightning.pytorch")]


@dataclasses.dataclass
class Network:
    """A network, the schedule it was trained with, and what its file says about itself.

    A latent model has a first stage, and its x_0 is scale_factor times the latent of a picture; for a pixel model, x_0 is the picture.
    """
    model: nn.Module
    schedule: Schedule
    description: dict  # network, config, schedule, of latent models first_stage and scale_factor; layout, and what else a file says
    first_stage: nn.Module | None = None
    scale_factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_0."""
        return self.model.in_channels, self.model.image_size, self.model.image_size

    @property
    def image_size(self) -> int:
        """Pixels per side of the pictures."""
        return self.model.image_size * (self.first_stage.factor if self.first_stage else 1)

    def to(self, device: torch.device | str) -> "Network":
        """Moves the network, first stage and all."""
        self.model.to(device)
        if self.first_stage:
            self.first_stage.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> x_0, (B, *shape); both on the network's device."""
        return self.first_stage.encode(images) * self.scale_factor if self.first_stage else images

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> pictures (B, 3, H, W), of a latent model limited to [-1, 1]; both on the network's device."""
        return self.first_stage.decode(x0 / self.scale_factor).clamp(-1, 1) if self.first_stage else x0

    def sample(self, seeds: Sequence[int], steps: int = 50, **options) -> Tensor:
        """Pictures (N, 3, H, W) on the CPU, one for each seed; the options are those of ddpm.sample."""
        device = next(self.model.parameters()).device
        x0 = sample(self.model, self.schedule, self.shape, seeds, steps, clip=self.first_stage is None, device=device, **options)
        return torch.cat([self.decode(part.to(device)).cpu() for part in x0.split(64)]) if self.first_stage and len(x0) else x0

    def state_dict(self) -> dict[str, Tensor]:
        """All weights under the names they have in our own files: the network's, and first_stage. before the first stage's."""
        first_stage = self.first_stage.state_dict() if self.first_stage else {}
        return {**self.model.state_dict(), **{f"first_stage.{key}": value for key, value in first_stage.items()}}


def build(description: dict, where: str) -> Network:
    """An untrained network from its description; InputError if an option is wrong."""
    try:
        model = NETWORKS[description["network"]](**description["config"]).eval()
        network = Network(model, Schedule(**description.get("schedule", {})), description)
        if stage := description.get("first_stage"):
            network.first_stage = FIRST_STAGES[stage["network"]](**stage["config"]).eval().requires_grad_(False)
            network.scale_factor = float(description.get("scale_factor", 1.0))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: does not describe a network this program can build ({type(error).__name__}: {error})") from None
    if network.first_stage and network.first_stage.embed_dim != model.in_channels:
        raise InputError(f"{where}: the first stage gives latents of {network.first_stage.embed_dim} channels, the U-Net takes {model.in_channels}")
    return network


def save_network(path: Path, network: Network) -> None:
    """Weights (of a latent model with its first stage) and description in one safetensors file, atomically."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_tensors(path, tensors, network.description)


def save_tensors(path: Path, tensors: dict[str, Tensor], description: dict) -> None:
    write_atomic(path, lambda temporary: save_file(tensors, temporary, {"description": json.dumps(description)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a safetensors or torch file on the CPU (of a Lightning file, its state_dict), and our own description if there is one.

    Raises InputError for a file that is missing, damaged, not a flat dict of tensors, or that wants to run code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                description = (f.metadata() or {}).get("description")
            return load_file(path), json.loads(description) if description else None
        with torch.serialization.safe_globals(CALLBACKS):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; give a file of weights") from None
    except Exception as error:  # on damaged bytes torch's unpickler raises nearly every type there is
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {wanted[1]}, which is code, not data"
        raise InputError(f"{path}: not a file of weights that can be read safely ({reason})") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise InputError(f"{path}: holds something else than a flat dict of tensors; save the model's state_dict() alone")
    return tensors, None


def check_fit(shapes: dict[str, list[int]], tensors: dict[str, Tensor], path: Path) -> None:
    """InputError that names the first keys which are missing, unexpected or misshapen."""
    faults = [f"missing {k}" for k in shapes if k not in tensors] + [f"unexpected {k}" for k in tensors if k not in shapes]
    faults += [f"{k} is {list(tensors[k].shape)}, expected {list(shape)}" for k, shape in shapes.items()
               if k in tensors and list(tensors[k].shape) != list(shape)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(f"{path}: weights do not fit the network: {'; '.join(faults[:3])}{more}; is --arch right?")


@torch.no_grad()
def load_strictly(own: nn.Module | Network, tensors: dict[str, Tensor], path: Path) -> None:
    """Fill the network; InputError if the keys are not exactly its own."""
    state = own.state_dict()
    check_fit({key: value.shape for key, value in state.items()}, tensors, path)
    for key, value in state.items():
        value.copy_(tensors[key])


def load_network(path: Path, arch: str | None = None) -> Network:
    """A network from one of our own files, or from a published one, if need be with `arch`: a name of ARCHITECTURES or a JSON file."""
    path = published.weights_in(Path(path)) if Path(path).is_dir() else Path(path)
    tensors, description = read_tensors(path)
    if description is None:
        return load_published(tensors, path, arch)
    if "network" not in description:
        raise InputError(f"{path}: the weights of a run, not a whole network; give the run's folder to sample.py or evaluate.py")
    network = build(dict(description, layout="this project's own"), str(path))
    if network.first_stage and not any(key.startswith("first_stage.") for key in tensors):
        raise InputError(f"{path}: the first stage is missing (no first_stage.*), without which latents are no pictures")
    load_strictly(network, tensors, path)
    return network


def load_published(tensors: dict[str, Tensor], path: Path, arch: str | None) -> Network:
    """The network in a file of a published layout, with our own names."""
    description, layout = published.describe(tensors, path, arch)
    network = build(description, arch or str(path))
    own = network.state_dict()
    taken, shapes = layouts.sources(own, layout, description["config"], tensors)
    beside = layouts.NOT_WEIGHTS.fullmatch if layout == "latent-diffusion" else lambda key: False
    check_fit(shapes, {key: value for key, value in tensors.items() if not beside(key)}, path)
    heads = lambda key: network.model.heads(own[key].shape[0] // 3) if ".qkv." in key else 1
    load_strictly(network, {key: layouts.join([tensors[k] for k in taken[key]], own[key].shape, heads(key)) for key in own}, path)
    return network


def load_source(name: str, arch: str | None = None) -> Network:
    """The pre-trained diffusion model to start from: a built-in name, a file or a folder of diffusers."""
    built_in = ASSETS / f"{name}.safetensors"
    network = load_network(built_in if built_in.exists() else Path(name), arch)
    if not isinstance(network.model, UNet):
        raise InputError(f"{name}: a {network.description['network']}, not a diffusion model")
    channels = network.first_stage.embed_dim if network.first_stage else 3
    if network.model.in_channels != channels or network.model.out_channels not in (channels, 2 * channels):
        raise InputError(f"{name}: takes {network.model.in_channels} channels and gives {network.model.out_channels}; only models of RGB pictures "
                         f"or of a first stage's latents ({channels} in, {channels} or {2 * channels} out) can be adapted")
    return network


def fingerprint(network: Network) -> str:
    """A short hash of the weights, first stage and all: psi is worth nothing beside another theta."""
    digest = hashlib.sha256(b"" if network.first_stage is None else str(network.scale_factor).encode())
    for key, value in network.state_dict().items():
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def start_classifier(name: str | None, arch: str | None, source_name: str, source: Network) -> Network:
    """The classifier before it sees a target picture, with a fresh two-way head.

    name   a file (with `arch` if it is a published one); "encoder": the source U-Net's own encoder; "scratch": random weights;
           None: the built-in source's classifier, or else the encoder
    """
    built_in = ASSETS / f"{source_name}-classifier.safetensors"
    if name is None:
        name = str(built_in) if built_in.exists() else "encoder"
    if name in ("encoder", "scratch"):
        model = classifier.from_unet(source.model, pretrained=name == "encoder")
        return Network(model, source.schedule, dict(network="Classifier", config=model.config, schedule=source.schedule.config))
    network = load_network(Path(name), arch)
    if not isinstance(network.model, classifier.Classifier):
        raise InputError(f"--classifier {name}: a diffusion model, not a classifier; --classifier encoder uses the source's own")
    made_for = network.model.in_channels, network.model.image_size, network.model.image_size
    if made_for != source.shape:
        raise InputError(f"--classifier {name}: made for {'x'.join(map(str, made_for))}, the source's x_0 is {'x'.join(map(str, source.shape))}; "
                         "--classifier encoder uses the source's own")
    classifier.replace_head(network.model)
    description = dict(network="Classifier", config=network.model.config, schedule=source.schedule.config, started_from=name)
    return Network(network.model, source.schedule, description)  # it is fine-tuned and asked at the source's noise levels


@dataclasses.dataclass
class Options:
    file: str = option("", "file of weights, folder of diffusers, or built-in source (default: list what is known)", positional=True)
    arch: str | None = option(None, f"network of a published file: {', '.join(ARCHITECTURES)}, or a JSON file", metavar="NAME")
    convert: str | None = option(None, "write the network to this file, in this project's own form", metavar="OUT.safetensors")


def report(network: Network, path: Path) -> str:
    """What a file holds, in words."""
    count = lambda model: f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
    about, s = network.description, network.schedule.config
    lines = dict(file=f"{path}, {path.stat().st_size / 1e6:.1f} MB", layout=about["layout"], network=f"{about['network']}, {count(network.model)}",
                 options=", ".join(f"{key} {value}" for key, value in about["config"].items()),
                 schedule=f"{s['name']}, {s['timesteps']} steps",
                 pictures=f"{network.image_size}x{network.image_size}")
    if s["name"] != "cosine":
        lines["schedule"] += f", beta {s['beta_start']:g} to {s['beta_end']:g}"
    if network.first_stage:
        lines["pictures"] += f", as latents {'x'.join(map(str, network.shape))}, scaled by {network.scale_factor:g}"
        lines["first stage"] = f"{about['first_stage']['network']}, {count(network.first_stage)}"
    if "converted_from" in about:
        lines["layout"] += f", converted from {about['converted_from']}"
    lines["fits"] = f"yes, all {len(network.state_dict())} tensors are there and no other"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    if not options.file:
        for name, known in ARCHITECTURES.items():
            print(f"{name:24}{known['files']}\n{'':24}{known['listed']}")
        return
    built_in = ASSETS / f"{options.file}.safetensors"
    path = built_in if built_in.exists() else Path(options.file)
    path = published.weights_in(path) if path.is_dir() else path
    out = options.convert and Path(options.convert)
    if out and (out.suffix != ".safetensors" or out.exists()):
        raise InputError(f"--convert {out}: " + ("is there already; choose another name" if out.exists() else "must end in .safetensors"))
    network = load_network(path, options.arch)
    print(report(network, path))
    if out:
        network.description["converted_from"] = f"{path.name} ({network.description['layout']})"
        out.parent.mkdir(parents=True, exist_ok=True)
        save_network(out, network)
        print(f"written to {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
