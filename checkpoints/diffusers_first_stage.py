"""A VQModel or AutoencoderKL of diffusers: its options and weights from ours, and ours from theirs."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoder import KL, VQ
from checkpoints.diffusers_unet import multiples, refuse_others, square
from checkpoints.network import check_fit
from plumbing import distributed
from plumbing.options import InputError

# Options that a first stage of ours does not have, with the one value that means the same network.
FIXED = dict(act_fn="silu", norm_type="group", mid_block_add_attention=True, use_quant_conv=True,
             use_post_quant_conv=True, shift_factor=None, latents_mean=None, latents_std=None)
# Names of before diffusers 0.17: today's.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def first_stage_options(theirs: dict[str, Any], file: Path) -> tuple[dict[str, Any], float]:
    """Network and config of our first stage from the options of a VQModel or AutoencoderKL, which are in
    `file`, and the scale_factor of its latents.  InputError for what autoencoder.py cannot be.
    """
    kind = theirs.get("_class_name")
    if kind not in ("VQModel", "AutoencoderKL"):
        raise InputError(f"{file}: a {kind}; only VQModel and AutoencoderKL can be read")
    refuse_others(theirs, FIXED, file)
    try:
        widths, down, up = theirs["block_out_channels"], theirs["down_block_types"], theirs["up_block_types"]
        attention = [name == "AttnDownEncoderBlock2D" for name in down]
        if (list(down), list(up)) != _block_types(attention):
            raise InputError(f"{file}: down_block_types {down} and up_block_types {up}; only "
                             "(Attn)DownEncoderBlock2D and their mirror image can be read")
        # It is halved at every level, and only tells where there is attention.
        resolution = max(square(theirs.get("sample_size", 32), file), 2 ** len(widths))
        is_vq, latent = kind == "VQModel", theirs.get("latent_channels", 3 if kind == "VQModel" else 4)
        ddconfig = dict(resolution=resolution, ch=widths[0], ch_mult=multiples(widths, file),
                        num_res_blocks=theirs.get("layers_per_block", 1), z_channels=latent,
                        double_z=not is_vq,
                        attn_resolutions=[resolution >> i for i, a in enumerate(attention) if a],
                        in_channels=theirs.get("in_channels", 3), out_ch=theirs.get("out_channels", 3),
                        norm_groups=theirs.get("norm_num_groups", 32))
        codebook = dict(n_embed=theirs.get("num_vq_embeddings", 256)) if is_vq else {}
        config = dict(ddconfig=ddconfig, embed_dim=theirs.get("vq_embed_dim") or latent, **codebook)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: does not describe a {kind} of diffusers ({type(error).__name__}: "
                         f"{error})") from None
    return dict(network="VQ" if is_vq else "KL", config=config), _scale_factor(theirs, is_vq, file)


def _scale_factor(theirs: dict[str, Any], is_vq: bool, file: Path) -> float:
    """What latents are multiplied by; where it is not stated, said."""
    if "scaling_factor" in theirs:
        return theirs["scaling_factor"]
    # The VQ first stages without one are from before there was the option: LDMPipeline did not scale.
    # Today's would divide by 0.18215 and draw noise (diffusers issue 6725).
    assumed = 1.0 if is_vq else 0.18215
    distributed.say_once(f"{file}: states no scaling_factor; taken as {assumed:g}")
    return assumed


def _block_types(attention: list[bool]) -> tuple[list[str], list[str]]:
    """down_block_types and up_block_types of a first stage whose levels have attention or not."""
    names = ["Attn" if a else "" for a in attention]
    return [f"{a}DownEncoderBlock2D" for a in names], [f"{a}UpDecoderBlock2D" for a in reversed(names)]


def first_stage_config(model: VQ | KL, scaling_factor: float) -> dict[str, Any]:
    """Options of diffusers' VQModel or AutoencoderKL for this network (`_class_name` says which of them).

    Raises ValueError for the few shapes that diffusers cannot express.
    """
    arch, levels, is_vq = model.arch, range(len(model.arch.ch_mult)), isinstance(model, VQ)
    if arch.ch_mult[0] != 1 or not (is_vq or model.embed_dim == arch.z_channels):
        raise ValueError("diffusers wants ch_mult to begin with 1, and of a KL embed_dim to equal z_channels")
    down, up = _block_types([arch.attention(i) for i in levels])
    codebook = dict(num_vq_embeddings=model.config["n_embed"], vq_embed_dim=model.embed_dim) if is_vq else {}
    return dict(_class_name="VQModel" if is_vq else "AutoencoderKL", in_channels=arch.in_channels,
                out_channels=arch.out_ch, block_out_channels=[arch.channels(i) for i in levels],
                layers_per_block=arch.num_res_blocks, latent_channels=arch.z_channels,
                down_block_types=down, up_block_types=up,
                sample_size=arch.resolution, norm_num_groups=arch.norm_groups, scaling_factor=scaling_factor,
                **codebook)


def first_stage_weights(model: VQ | KL) -> dict[str, Tensor]:
    """The weights under diffusers' names."""
    theirs = _names(model)
    return {theirs[key]: value.flatten(1) if _is_matrix(theirs[key]) else value
            for key, value in model.state_dict().items()}


def translated(model: VQ | KL, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """diffusers' weights under our names; InputError unless they are exactly those of the network."""
    for old, new in OLD_NAMES.items():
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    check_fit({key: value.shape for key, value in first_stage_weights(model).items()}, tensors, path)
    names = _names(model)
    return {key: tensors[names[key]].reshape(value.shape) for key, value in model.state_dict().items()}


def _is_matrix(name: str) -> bool:
    """Whether these weights are a matrix (C, C) there and a convolution (C, C, 1, 1) here."""
    return re.search(r"\.(to_[qkv]|to_out\.0)\.weight$", name) is not None


def _names(model: VQ | KL) -> dict[str, str]:
    """diffusers' name of each parameter of a first stage."""
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
