"""Networks from files, in three steps: identify (what is it?), describe (which network?), fill (its weights).

A network is named by a built-in name, one of our own files, a published file or a folder of diffusers; --arch
helps where a file does not show its network.  Loading is strict, and nothing in a file is ever run.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import classifier
from checkpoints import diffusers_folder, published
from checkpoints.layouts import layout_of, translate
from checkpoints.network import Network, build, load_strictly
from plumbing.options import InputError
from unet import UNet

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ("toyfaces", "toyfaces-latent", "toychurches")  # source models in assets/
NOT_SOURCES = ("toyfaces-classifier", "toyfaces-judge", "toychurches-judge")  # what else is there

# A Lightning .ckpt names the class of its callback.  An inert class of that name takes its place: the real
# one is never imported.
CALLBACKS = [type("ModelCheckpoint", (), {"__module__": f"{package}.callbacks.model_checkpoint"})
             for package in ("pytorch_lightning", "lightning.pytorch")]


def built_in(name: str) -> Path | None:
    """The file of a built-in network; None for any other name."""
    return ASSETS / f"{name}.safetensors" if name in BUILT_IN + NOT_SOURCES else None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors of a safetensors or torch file on the CPU (of a Lightning file, its state_dict), and our own
    description if there is one.

    Raises InputError for a file that is missing, damaged, not a flat dict of tensors, or that wants to run
    code.
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
        raise InputError(f"{path}: holds something else than a flat dict of tensors; "
                         "save the model's state_dict() alone")
    return tensors, None


def load_network(path: Path, arch: str | None = None) -> Network:
    """A network from one of our own files, from a published one or from a folder of diffusers.

    arch    what a published file does not show: a name of ARCHITECTURES or a JSON file
    Raises InputError for a file that cannot be read, is not known, or does not hold exactly the weights of
    its network.
    """
    # Identify
    path = Path(path)
    if path.is_dir():
        path = diffusers_folder.weights_in(path)
    tensors, own = read_tensors(path)
    layout = "ours" if own is not None else layout_of(tensors, path)

    # Describe
    if layout == "ours":
        description = _checked(own, tensors, path, arch)
    elif layout.startswith("diffusers"):
        description = diffusers_folder.describe(path.parent, arch, layout)
    else:
        description = published.describe(tensors, layout, path, arch)

    # Fill
    network = build(description, arch or str(path))
    if layout != "ours":
        tensors = translate(tensors, layout, network, path)
    load_strictly(network, tensors, path)
    return network


def _checked(description: dict[str, Any], tensors: dict[str, Tensor], path: Path,
             arch: str | None) -> dict[str, Any]:
    """The description in a file of ours; InputError for an `arch` beside it, or less than a whole network."""
    if arch:
        raise InputError(f"--arch {arch}: for published files; {path} says itself which network it holds")
    if "network" not in description:
        raise InputError(f"{path}: the weights of a run, not a whole network; "
                         "give the run's folder to sample.py or evaluate.py")
    if description.get("first_stage") and not any(key.startswith("first_stage.") for key in tensors):
        raise InputError(f"{path}: the first stage is missing (no first_stage.*), "
                         "without which latents are no pictures")
    return dict(description, layout="this project's own")


def load_source(name: str, arch: str | None = None) -> Network:
    """The pre-trained diffusion model to start from: a built-in name, a file or a folder of diffusers."""
    network = load_network(built_in(name) or Path(name), arch)
    if not isinstance(network.model, UNet):
        raise InputError(f"{name}: a {network.description['network']}, not a diffusion model")
    channels = network.first_stage.embed_dim if network.first_stage else 3
    takes, gives = network.model.in_channels, network.model.out_channels
    if takes != channels or gives not in (channels, 2 * channels):
        raise InputError(f"{name}: takes {takes} channels and gives {gives}; only models of RGB pictures or "
                         "of a first stage's latents can be adapted "
                         f"({channels} in, {channels} or {2 * channels} out)")
    return network


def start_classifier(name: str | None, arch: str | None, source_name: str, source: Network) -> Network:
    """The classifier before it sees a target picture, with a fresh two-way head.

    name   a file (with `arch` if it is a published one); "encoder": the source U-Net's own encoder;
           "scratch": random weights; None: the classifier of a built-in source, or else the encoder
    Raises InputError for a file that holds no classifier, or one for other pictures than the source's x_0.
    """
    if name is None:
        name = str(built_in(f"{source_name}-classifier") or "encoder")
    if name in ("encoder", "scratch"):
        model = classifier.from_unet(source.model, pretrained=name == "encoder")
        return _at_the_noise_of(source, model)
    network = load_network(Path(name), arch)
    remedy = "--classifier encoder uses the source's own"
    if not isinstance(network.model, classifier.Classifier):
        raise InputError(f"--classifier {name}: a diffusion model, not a classifier; {remedy}")
    if network.shape != source.shape:
        takes, x0 = ("x".join(map(str, shape)) for shape in (network.shape, source.shape))
        raise InputError(f"--classifier {name}: made for {takes}, the source's x_0 is {x0}; {remedy}")
    classifier.replace_head(network.model)
    return _at_the_noise_of(source, network.model, started_from=name)


def _at_the_noise_of(source: Network, model: classifier.Classifier, **more: str) -> Network:
    """A classifier that is asked at the source's noise levels, whatever it was trained at before."""
    description = dict(network="Classifier", config=model.config, schedule=source.schedule.config, **more)
    return Network(model, source.schedule, description)
