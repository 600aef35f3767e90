"""Folders of diffusers: reading a UNet2DModel and its scheduler, writing a U-Net and a first stage as theirs.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoder import KL, VQ
from checkpoints.layouts import names
from checkpoints.published import ARCHITECTURES, LINEAR, read_json
from plumbing.options import InputError
from unet import UNet

# Options of UNet2DModel that unet.py does not have, with the one value that means the same network.
FIXED = dict(center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None,
             mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, act_fn="silu",
             add_attention=True, class_embed_type=None, num_class_embeds=None)
# (attention, resblock_updown): types of a level's blocks on the way down and up.
BLOCKS = {(False, False): ("DownBlock2D", "UpBlock2D"), (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
          (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
          (True, True): ("AttnDownBlock2D", "AttnUpBlock2D")}
# Options of which there are two here, the default first.
CHOICES = dict(resnet_time_scale_shift=("default", "scale_shift"), downsample_type=("conv", "resnet"),
               upsample_type=("conv", "resnet"))
# Options of a scheduler that ddpm.Schedule does not have, likewise.
FIXED_SCHEDULE = dict(prediction_type="epsilon", trained_betas=None, rescale_betas_zero_snr=False)
# diffusers' names: ours.
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder of diffusers, with or without unet/."""
    for place in (folder / "unet", folder):
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (place / name).exists():
                return place / name
    raise InputError(f"{folder}: neither the folder of a run (no options.json) nor one of diffusers "
                     "(no diffusion_pytorch_model.safetensors or .bin)")


def describe(place: Path, arch: str | None, layout: str) -> dict[str, Any]:
    """What the weights in the folder `place` are, from the config.json beside them and the scheduler's.

    arch    whose schedule to take if there is none: a name of ARCHITECTURES or a JSON file
    layout  in words, as it shall stand in the description
    Raises InputError for what unet.py cannot be.
    """
    place = place.resolve()
    folder = place.parent if place.name == "unet" else place
    theirs = _read(place / "config.json")
    for part in ("vqvae", "vae"):
        if (folder / part).is_dir():
            raise InputError(f"{folder}: a latent pipeline of diffusers ({part}/); "
                             "of those only the original .ckpt can be read")
    config = _unet_config(theirs, place / "config.json")
    return dict(network="UNet", config=config, schedule=_schedule_in(folder, arch), layout=layout)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: diffusers' description of the network cannot be read ({error})") from None


def _unet_config(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    """Options of our UNet from those of a UNet2DModel."""
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            raise InputError(f"{file}: {key} is {theirs[key]!r}; only {value!r} can be read")
    chosen = {key: theirs.get(key, values[0]) for key, values in CHOICES.items()}
    for key, values in CHOICES.items():
        if chosen[key] not in values:
            raise InputError(f"{file}: {key} is {chosen[key]!r}; only {values[0]!r} and {values[1]!r} can be "
                             "read")
    if chosen["downsample_type"] != chosen["upsample_type"]:
        raise InputError(f"{file}: upsample_type is {chosen['upsample_type']!r}; only the same as "
                         "downsample_type can be read")
    updown = chosen["downsample_type"] == "resnet"
    scale_shift = chosen["resnet_time_scale_shift"] == "scale_shift"
    groups, middle = theirs.get("norm_num_groups", 32), theirs.get("attn_norm_num_groups")
    if middle != groups and (middle is not None or scale_shift):  # None: of scale_shift, no norm at all
        raise InputError(f"{file}: attn_norm_num_groups is {middle!r}; only {groups!r} can be read")
    try:
        widths, down, up = theirs["block_out_channels"], theirs["down_block_types"], theirs["up_block_types"]
        attention = [kind == "AttnDownBlock2D" for kind in down]
        if (list(down), list(up)) != _block_types(attention, updown):
            raise InputError(f"{file}: down_block_types {down} and up_block_types {up}; only (Attn)Down"
                             "Block2D, with 'resnet' ResnetDownsampleBlock2D, and their mirror image can be "
                             "read")
        if any(w % widths[0] for w in widths):
            raise InputError(f"{file}: block_out_channels {widths}; only multiples of the first can be read")
        if not isinstance(theirs["sample_size"], int):
            raise InputError(f"{file}: sample_size is {theirs['sample_size']}; "
                             "only a number (square pictures) can be read")
        return dict(
            image_size=theirs["sample_size"], in_channels=theirs["in_channels"], model_channels=widths[0],
            out_channels=theirs["out_channels"], num_res_blocks=theirs["layers_per_block"],
            attention_resolutions=[2 ** i for i, a in enumerate(attention) if a],
            channel_mult=[w // widths[0] for w in widths],
            num_heads=1, num_head_channels=theirs.get("attention_head_dim", 8),
            use_scale_shift_norm=scale_shift, resblock_updown=updown,
            dropout=theirs.get("dropout", 0.0), norm_groups=groups,
            norm_eps=theirs.get("norm_eps", 1e-5), flip_sin_to_cos=theirs.get("flip_sin_to_cos", True),
            freq_shift=theirs.get("freq_shift", 0), downsample_padding=theirs.get("downsample_padding", 1))
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: does not describe a UNet2DModel of diffusers "
                         f"({type(error).__name__}: {error})") from None


def _block_types(attention: list[bool], updown: bool) -> tuple[list[str], list[str]]:
    """down_block_types and up_block_types of a U-Net whose levels have attention or not."""
    down, up = zip(*(BLOCKS[a, updown] for a in attention))
    return list(down), list(up[::-1])


def _schedule_in(folder: Path, arch: str | None) -> dict[str, Any]:
    """Options of our Schedule: the folder's own, else those of `arch`."""
    for file in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if file.exists():
            return _schedule(_read(file), file)
    if arch in ARCHITECTURES:
        return ARCHITECTURES[arch]["schedule"]
    if arch is not None:
        return read_json(arch).get("schedule", LINEAR)
    raise InputError(f"{folder}: no scheduler_config.json that says with which schedule it was trained; "
                     "add --arch ddpm256 (linear) or --arch FILE.json")


def _schedule(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    for key, value in FIXED_SCHEDULE.items():
        if theirs.get(key, value) != value:
            raise InputError(f"{file}: {key} is {theirs[key]!r}; only {value!r} can be read")
    name = theirs.get("beta_schedule", "linear")
    if name not in list(BETA_SCHEDULES):
        raise InputError(f"{file}: beta_schedule is {name!r}; "
                         f"only {' or '.join(map(repr, BETA_SCHEDULES))} can be read")
    return dict(name=BETA_SCHEDULES[name], timesteps=theirs.get("num_train_timesteps", 1000),
                beta_start=theirs.get("beta_start", 1e-4), beta_end=theirs.get("beta_end", 0.02))


# ---- U-Nets, for export ------------------------------------------------------------------------------------

def unet_config(unet: UNet) -> dict[str, Any]:
    """Options of the UNet2DModel that is this network, less a learned variance.

    Raises ValueError for the few shapes that diffusers cannot express.
    """
    ours, mult = unet.config, unet.config["channel_mult"]
    widths = [unet.model_channels * m for m in mult]
    attention = [2 ** level in ours["attention_resolutions"] for level in range(len(mult))]
    attended = {width for width, a in zip(widths, attention) if a} | {widths[-1]}  # the middle has some, too
    of_a_head = {width // unet.heads(width) for width in attended}
    alone = all(unet.heads(width) == 1 for width in attended)
    if mult[0] != 1 or not (alone or len(of_a_head) == 1):
        raise ValueError("diffusers wants channel_mult to begin with 1, and attention heads of one width "
                         "everywhere")
    down, up = _block_types(attention, ours["resblock_updown"])
    resample = "resnet" if ours["resblock_updown"] else "conv"
    return dict(_class_name="UNet2DModel", sample_size=unet.image_size, in_channels=unet.in_channels,
                out_channels=unet.in_channels, block_out_channels=widths, down_block_types=down,
                up_block_types=up, layers_per_block=ours["num_res_blocks"],
                attention_head_dim=None if alone else of_a_head.pop(), dropout=ours["dropout"],
                norm_num_groups=unet.norm_groups, attn_norm_num_groups=unet.norm_groups,
                norm_eps=ours["norm_eps"],
                resnet_time_scale_shift="scale_shift" if ours["use_scale_shift_norm"] else "default",
                flip_sin_to_cos=ours["flip_sin_to_cos"], freq_shift=ours["freq_shift"],
                downsample_padding=ours["downsample_padding"], downsample_type=resample,
                upsample_type=resample)


def unet_weights(unet: UNet) -> dict[str, Tensor]:
    """The weights under diffusers' names; of those of a learned variance, none."""
    weights = {}
    for key, value in unet.state_dict().items():
        theirs = names(key, "diffusers", unet.config["num_res_blocks"], len(unet.config["channel_mult"]))
        if len(theirs) == 3:  # (heads, [q k v], width)
            heads = unet.heads(len(value) // 3)
            parts = [part.flatten(0, 1) for part in value.unflatten(0, (heads, 3, -1)).unbind(1)]
        else:
            parts = [value[:unet.in_channels] if key.startswith("out.2.") else value]
        matrix = value.ndim == 3  # a convolution of tokens here
        weights |= {name: part.flatten(1) if matrix else part for name, part in zip(theirs, parts)}
    return weights


# ---- first stages, for export ------------------------------------------------------------------------------

def first_stage_config(model: VQ | KL, scaling_factor: float) -> dict[str, Any]:
    """Options of diffusers' VQModel or AutoencoderKL for this network (`_class_name` says which of them).

    Raises ValueError for the few shapes that diffusers cannot express.
    """
    arch, levels, is_vq = model.arch, range(len(model.arch.ch_mult)), isinstance(model, VQ)
    if arch.ch_mult[0] != 1 or not (is_vq or model.embed_dim == arch.z_channels):
        raise ValueError("diffusers wants ch_mult to begin with 1, and of a KL embed_dim to equal z_channels")
    attention = ["Attn" if arch.attention(i) else "" for i in levels]
    codebook = dict(num_vq_embeddings=model.config["n_embed"], vq_embed_dim=model.embed_dim) if is_vq else {}
    return dict(_class_name="VQModel" if is_vq else "AutoencoderKL", in_channels=arch.in_channels,
                out_channels=arch.out_ch, block_out_channels=[arch.channels(i) for i in levels],
                layers_per_block=arch.num_res_blocks, latent_channels=arch.z_channels,
                down_block_types=[f"{a}DownEncoderBlock2D" for a in attention],
                up_block_types=[f"{a}UpDecoderBlock2D" for a in reversed(attention)],
                sample_size=arch.resolution, norm_num_groups=arch.norm_groups, scaling_factor=scaling_factor,
                **codebook)


def first_stage_names(model: VQ | KL) -> dict[str, str]:
    """diffusers' name of each parameter of a first stage.

    Same numbers; only q, k, v and proj_out are matrices (C, C) there and 1x1 convolutions (C, C, 1, 1) here.
    """
    last = len(model.arch.ch_mult) - 1
    rules = [(r"\.down\.(\d+)", r".down_blocks.\1"),
             (r"\.up\.(\d+)", lambda m: f".up_blocks.{last - int(m[1])}"),
             (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"),
             (r"\.mid\.attn_1", ".mid_block.attentions.0"), (r"\.block\.", ".resnets."),
             (r"\.attn\.", ".attentions."), (r"\.(down|up)sample\.", r".\1samplers.0."),
             (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."),
             (r"\.norm\.", ".group_norm."), (r"\.([qkv])\.", r".to_\1."), (r"\.proj_out\.", ".to_out.0.")]
    names = {}
    for key in model.state_dict():
        names[key] = key
        for pattern, replacement in rules:
            names[key] = re.sub(pattern, replacement, names[key])
    return names
