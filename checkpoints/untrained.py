"""Networks without weights, as the flags of pretrain.py describe them."""

from pathlib import Path
from typing import Any

from checkpoints import gan
from checkpoints.load import load_network
from checkpoints.network import FIRST_STAGES, Network, build
from checkpoints.pretrain_settings import Adversarial, Latent, Shape
from ddpm import Schedule
from plumbing.options import InputError


def new_network(kind: str, size: int, shape: Shape, latent: Latent, adversarial: Adversarial,
                attributes: dict[str, list[str]], made_by: str) -> Network | gan.GAN:
    """A network of this kind for pictures of this size; InputError if there can be none.

    attributes   what a classifier or judge tells: names and values
    made_by      the command that trains it, or all in turn
    """
    stage = first_stage(latent.first_stage, kind, size) if latent.first_stage else None
    seen, factor = size // stage.model.factor if stage else size, 2 ** (len(shape.channel_mult) - 1)
    if kind != "stylegan2" and seen % factor:
        raise InputError(f"--size {size}: the sides of what the network sees must be divisible by {factor} "
                         "(--channel-mult)")
    if kind == "stylegan2":
        described = stylegan2(size, shape, adversarial)
    elif kind.upper() in FIRST_STAGES:
        described = autoencoder(kind, size, shape, latent)
    else:
        described = diffusion(size, shape, stage, None if kind == "unet" else attributes)
    described["made_by"] = made_by
    if kind == "stylegan2":
        return gan.build(described, "the network flags")
    network = build(described, "the network flags")
    if stage:
        network.first_stage.load_state_dict(stage.model.state_dict())
    return network


def first_stage(file: str, kind: str, size: int) -> Network:
    """The first stage of --first-stage; InputError if a network of this kind and size cannot stand on it."""
    stage = load_network(Path(file))
    if kind != "unet" or stage.description["network"] not in FIRST_STAGES or size % stage.model.factor:
        raise InputError(f"--first-stage {file}: only for --network unet, and must be a kl or vq whose "
                         "factor divides --size")
    return stage


# ---- descriptions, as `build` reads them -------------------------------------------------------------------

def diffusion(size: int, shape: Shape, stage: Network | None,
              attributes: dict[str, list[str]] | None) -> dict[str, Any]:
    """A U-Net, on latents if there is a first stage; or, with attributes to tell, a classifier."""
    channels = 3
    if stage:
        size, channels = size // stage.model.factor, stage.model.embed_dim
    outputs = channels if attributes is None else sum(map(len, attributes.values()))
    config = dict(image_size=size, in_channels=channels, model_channels=shape.channels, out_channels=outputs,
                  num_res_blocks=shape.res_blocks, attention_resolutions=shape.attention,
                  channel_mult=shape.channel_mult, num_head_channels=shape.head_channels,
                  use_scale_shift_norm=True, norm_groups=shape.norm_groups)
    found = dict(network="UNet" if attributes is None else "Classifier", config=config,
                 schedule=Schedule().config)
    if stage:
        kept = ("network", "config", "made_by")
        found["first_stage"] = {name: stage.description[name] for name in kept}
    if attributes is not None:
        found["attributes"] = attributes
    return found


def autoencoder(kind: str, size: int, shape: Shape, latent: Latent) -> dict[str, Any]:
    """A first stage, kl or vq."""
    ddconfig = dict(z_channels=latent.latent_channels, double_z=kind == "kl", resolution=size,
                    ch=shape.channels, ch_mult=shape.channel_mult, num_res_blocks=shape.res_blocks,
                    norm_groups=shape.norm_groups)
    codebook = dict(n_embed=latent.codes) if kind == "vq" else {}
    config = dict(ddconfig=ddconfig, embed_dim=latent.latent_channels, **codebook)
    return dict(network=kind.upper(), config=config)


def stylegan2(size: int, shape: Shape, adversarial: Adversarial) -> dict[str, Any]:
    """Generator and discriminator."""
    channels = dict(size=size, channel_base=shape.channels * size,
                    channel_max=shape.channels * max(shape.channel_mult))
    mapping = dict(style_dim=adversarial.style_dim, n_mlp=adversarial.mapping_layers)
    return dict(network=gan.NAME, config=dict(generator=channels | mapping, discriminator=channels))
