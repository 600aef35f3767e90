"""Networks from files, in three steps: identify (what is it?), describe (which network?), fill (its weights).

A network is named by a built-in name, one of our own files, a published file, a folder of diffusers, or a
repository of the Hugging Face Hub; --arch helps where a file does not show its network.  Loading is strict,
and nothing in a file is ever run.
"""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

import classifier
from checkpoints import diffusers_folder, gan, hub, published
from checkpoints.gan import GAN
from checkpoints.layouts import layout_of, translate
from checkpoints.network import Network, build, load_strictly
from checkpoints.weights_file import SUFFIXES, read_parts, read_set
from plumbing import distributed
from plumbing.options import InputError, did_you_mean
from unet import UNet

ASSETS = Path(__file__).parents[1] / "assets"
BUILT_IN = ("toyfaces", "toyfaces-latent", "toychurches", "photofaces")  # source models in assets/
BUILT_IN_GANS = ("toyfaces-stylegan2", "toychurches-stylegan2")  # the same for the GAN baselines
USUAL_NAMES = {"model", "diffusion_pytorch_model", "unet", "unet_ema", "checkpoint", "last", "best", "ema",
               "weights", ".", "..", "/"}  # of files and folders, which do not tell one network from another
NOT_SOURCES = ("toyfaces-classifier", "toyfaces-judge", "toychurches-judge")  # what else is there


def built_in(name: str) -> Path | None:
    """The file of a built-in network; None for any other name."""
    return ASSETS / f"{name}.safetensors" if name in BUILT_IN + BUILT_IN_GANS + NOT_SOURCES else None


def locate(name: str) -> Path:
    """Where the network of this name is: a built-in one, a file or folder, or a repository of the Hub, which
    is fetched.  InputError if there is none, with the built-in name that is nearest.
    """
    if asset := built_in(name):
        if Path(name).exists():
            distributed.say_once(f"note: the built-in {name} is taken; for the one here give ./{name}")
        return asset
    path = Path(name)
    if os.path.lexists(path):
        return hub.snapshot_in(path) if path.is_dir() else path
    if hub.is_name(name):
        return hub.fetch(name)
    if "://" in name:
        raise InputError(f"{name}: links are not fetched; download the file, or of the Hugging Face Hub give "
                         "owner/name")
    beside = path.parent.is_dir() and "/" in name
    meant = did_you_mean(path.name, os.listdir(path.parent) if beside else BUILT_IN + BUILT_IN_GANS)
    raise InputError(f"{name}: no such file or folder{meant}; built-in are {', '.join(BUILT_IN)}, of GANs "
                     f"{', '.join(BUILT_IN_GANS)}; of the Hugging Face Hub give owner/name; where published "
                     "files are: python -m checkpoints")


def is_there(name: str) -> bool:
    """Whether a network of this name is here, or can be on the Hub."""
    return built_in(name) is not None or os.path.lexists(name) or hub.is_name(name)


def title_of(name: str) -> str:
    """What to call a network in titles and names of folders: as its file or, where many are called so, as
    its folder.
    """
    path = Path(name.partition("@")[0] if hub.is_name(name) else name)
    if path.suffix in SUFFIXES and not path.is_dir():
        path = path.with_suffix("")
    names = [part for part in path.parts if part not in USUAL_NAMES]
    return (names or ["model"])[-1]


def pinned(name: str) -> str:
    """The same name for what is here; for a repository of the Hub, with the commit that is taken."""
    path = locate(name)
    return hub.pinned(name, path) if hub.is_name(name) and not os.path.lexists(name) else name


def load_network(path: Path, arch: str | None = None) -> Network | GAN:
    """A network from one of our own files, from a published one or from a folder of diffusers.

    arch    what a published file does not show: a name of ARCHITECTURES or a JSON file
    Raises InputError for a file that cannot be read, is not known, or does not hold exactly the weights of
    its network.
    """
    # Identify
    path = Path(path)
    files = diffusers_folder.files_in(path) if path.is_dir() else [path]
    tensors, own = read_parts(files)
    layout = "ours" if own is not None else layout_of(tensors, files[0])

    # Describe
    if layout == "stylegan2" or own and own.get("network") == gan.NAME:
        return _load_gan(own, tensors, files[0], arch)
    if layout == "ours":
        description = _checked(own, tensors, files[0], arch)
    elif layout.startswith("diffusers"):
        description = diffusers_folder.describe(files[0], arch, layout)
    else:
        description = published.describe(tensors, layout, files[0], arch)

    # Fill
    network = build(description, arch or str(path))
    if layout != "ours":
        tensors = translate(tensors, layout, network, files[0])
    if layout.startswith("diffusers") and network.first_stage:
        tensors |= diffusers_folder.first_stage_weights(network.first_stage, files[0])
    load_strictly(network, tensors, files[0])
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


def _load_gan(own: dict[str, Any] | None, tensors: dict[str, Tensor], path: Path, arch: str | None) -> GAN:
    """A StyleGAN2 from these tensors: our own, or the generator of a published file with `d` beside it."""
    if arch:
        raise InputError(f"--arch {arch}: a StyleGAN2 shows its network itself; leave it out")
    if own is not None:
        description = dict(own, layout="this project's own")
    else:
        discriminator = read_set(path, "d")
        description = gan.describe(tensors, discriminator, path)
        tensors = {**{f"g_ema.{key}": value for key, value in tensors.items()},
                   **{f"d.{key}": value for key, value in discriminator.items()}}
    network = gan.build(description, str(path))
    gan.fill(network, tensors, path)
    return network


def load_gan(name: str) -> GAN:
    """The pre-trained GAN to start from.  InputError for any other network, or a generator alone."""
    network = load_network(locate(name))
    if not isinstance(network, GAN):
        raise InputError(f"{name}: a {network.description['network']}, not a StyleGAN2; train_tan.py adapts "
                         "diffusion models")
    if network.discriminator is None:
        raise InputError(f"{name}: a generator alone; adapting it takes its discriminator, too (the entry d "
                         "of a training state)")
    return network


def load_source(name: str, arch: str | None = None) -> Network | GAN:
    """What was pre-trained and draws, a diffusion model or a GAN: whatever `locate` finds under this name."""
    network = load_network(locate(name), arch)
    return network if isinstance(network, GAN) else need_diffusion_model(network, name)


def load_diffusion_model(name: str, arch: str | None = None) -> Network:
    """The pre-trained diffusion model to start from; InputError for any other network."""
    return need_diffusion_model(load_network(locate(name), arch), name)


def need_diffusion_model(network: Network | GAN, name: str) -> Network:
    """The network, if it is a diffusion model that can be adapted; InputError otherwise."""
    if isinstance(network, GAN):
        raise InputError(f"{name}: a StyleGAN2, not a diffusion model; python -m baselines.gan_transfer "
                         "adapts it, and it is not exported")
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
           "scratch": random weights; None: of toyfaces its own classifier, else the encoder
    Raises InputError for a file that holds no classifier, or one for other pictures than the source's x_0.
    """
    if name is None:
        name = str(built_in(f"{source_name}-classifier") or "encoder")
    if name in ("encoder", "scratch"):
        model = classifier.from_unet(source.model, pretrained=name == "encoder")
        return _at_the_noise_of(source, model)
    network = load_network(locate(name), arch)
    remedy = "--classifier encoder uses the source's own"
    if not isinstance(network.model, classifier.Classifier):
        raise InputError(f"--classifier {name}: a {network.description['network']}, not a classifier; "
                         f"{remedy}")
    if network.shape != source.shape:
        takes, x0 = ("x".join(map(str, shape)) for shape in (network.shape, source.shape))
        raise InputError(f"--classifier {name}: made for {takes}, the source's x_0 is {x0}; {remedy}")
    classifier.replace_head(network.model)
    return _at_the_noise_of(source, network.model, started_from=name)


def _at_the_noise_of(source: Network, model: classifier.Classifier, **more: str) -> Network:
    """A classifier that is asked at the source's noise levels, whatever it was trained at before."""
    description = dict(network="Classifier", config=model.config, schedule=source.schedule.config, **more)
    return Network(model, source.schedule, description)
