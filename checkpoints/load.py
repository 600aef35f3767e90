"""Networks in files: this project's own safetensors (architecture in the metadata) and published ones (published.py).

  python -m checkpoints                                        the published networks that are known, and where to get them
  python -m checkpoints ffhq_p2.pt                             what a file is, and whether all of it fits
  python -m checkpoints model.ckpt --convert ldm.safetensors   the same weights as one file of this project, which loads fast

A source is named by a built-in name, one of our own files, a published file or a folder of diffusers; --arch helps where a file does
not show its network.  Loading is strict, and nothing in a file is ever run.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import classifier
from checkpoints import layouts, published
from checkpoints.network import Network, build, check_fit, load_strictly
from plumbing.options import InputError
from unet import UNet

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ("toyfaces", "toyfaces-latent", "toychurches")  # source models in assets/


# A Lightning .ckpt names the class of its callback.  An inert class of that name takes its place: the real one is never imported.
CALLBACKS = [type("ModelCheckpoint", (), {"__module__": f"{package}.callbacks.model_checkpoint"})
             for package in ("pytorch_lightning", "lightning.pytorch")]


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
