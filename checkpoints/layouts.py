"""The layouts in which published networks are filed: the names of their weights beside ours, and what names and shapes give away.

    layout            names of the weights                                             who publishes in it
    guided-diffusion  ours (unet.py), in a flat dict                                   P2-weighting, ILVR, ddpm-segmentation, OpenAI
    ddpm              temb.dense.0, down.0.block.0.conv1, ... in a flat dict           Ho et al. 2020, PyTorch port
    diffusers         time_embedding.linear_1, down_blocks.0.resnets.0.conv1, ...      google/ddpm-ema-*, a folder with config.json
    latent-diffusion  model.diffusion_model. + ours, first_stage_model. + autoencoder.py's, model_ema. + names without dots
                                                                                       Rombach et al. 2022, a Lightning .ckpt
"""

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import KL, VQ
from plumbing.options import InputError

# Our modules (the place of a kind of layer, or a leaf inside it) -> theirs.  `up` counts the levels of the way back from 0.
DDPM = {
    "time_embed.0": "temb.dense.0", "time_embed.2": "temb.dense.1", "input_blocks.0.0": "conv_in", "out.0": "norm_out", "out.2": "conv_out",
    "input block": "down.{level}.block.{i}.", "input attention": "down.{level}.attn.{i}.", "input op": "down.{level}.downsample.",
    "middle 0": "mid.block_1.", "middle 1": "mid.attn_1.", "middle 2": "mid.block_2.",
    "output block": "up.{level}.block.{i}.", "output attention": "up.{level}.attn.{i}.", "output conv": "up.{level}.upsample.",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "temb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "nin_shortcut", "norm": "norm", "qkv": "q k v", "proj_out": "proj_out", "op": "conv", "conv": "conv",
}
DIFFUSERS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out",
    "input block": "down_blocks.{level}.resnets.{i}.", "input attention": "down_blocks.{level}.attentions.{i}.",
    "input op": "down_blocks.{level}.downsamplers.0.",
    "middle 0": "mid_block.resnets.0.", "middle 1": "mid_block.attentions.0.", "middle 2": "mid_block.resnets.1.",
    "output block": "up_blocks.{up}.resnets.{i}.", "output attention": "up_blocks.{up}.attentions.{i}.",
    "output conv": "up_blocks.{up}.upsamplers.0.",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut", "norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0", "op": "conv", "conv": "conv",
}
TABLES = {"ddpm": DDPM, "diffusers": DIFFUSERS,
          "diffusers, old attention names": dict(DIFFUSERS, qkv="query key value", proj_out="proj_attn")}
PREFIXES = {"guided-diffusion": "", "latent-diffusion": "model.diffusion_model."}


def names(key: str, layout: str, num_res_blocks: int, levels: int) -> list[str]:
    """The names in a file of this layout for a parameter of ours: one, or three (q, k and v) for an attention's qkv."""
    if key.startswith("first_stage."):
        return ["first_stage_model." + key.removeprefix("first_stage.")]
    if layout in PREFIXES:
        return [PREFIXES[layout] + key]
    table, (module, end) = TABLES[layout], key.rsplit(".", 1)  # end: weight or bias
    if module in table:
        return [f"{table[module]}.{end}"]
    part, stage, leaf = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)(?:\.\d)?\.([a-z].*)", module).groups()
    kind = leaf if leaf in ("op", "conv") else "attention" if leaf in ("norm", "qkv", "proj_out") else "block"
    back = part == "output"  # the way back has one more residual block a level, and no stage like input_blocks.0 before it
    level, i = divmod(int(stage) - (not back), num_res_blocks + 1)
    place = table[f"middle {stage}" if part == "middle" else f"{part} {kind}"]
    place = place.format(level=levels - 1 - level if back else level, up=level, i=i)
    return [f"{place}{name}.{end}" for name in table[leaf].split()]


def has_ema(keys: Collection[str]) -> bool:
    """Whether there is a running average beside the weights."""
    return any(key.startswith("model_ema.diffusion_model") for key in keys)


def sources(own: dict[str, Tensor], layout: str, config: dict, keys: Collection[str]) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """For each of our parameters the names under which a file with these keys holds it, and every name's expected shape.

    own is the state of the network that is to be filled; where a file has an average (EMA) of the weights, that is what is taken.
    """
    taken, shapes, ema = {}, {}, has_ema(keys)
    for key, value in own.items():
        taken[key] = names(key, layout, config["num_res_blocks"], len(config["channel_mult"]))
        shape = [value.shape[0] // len(taken[key]), *value.shape[1:]]
        if layout in TABLES and re.search(r"\.(qkv|proj_out)\.weight", key):  # ours are (C', C, 1)
            shape = shape[:2] + ([1, 1] if layout == "ddpm" else [])
        shapes.update(dict.fromkeys(taken[key], shape))
        if ema and not key.startswith("first_stage."):
            taken[key] = ["model_ema." + f"diffusion_model.{key}".replace(".", "")]
            shapes[taken[key][0]] = shape
    return taken, shapes


def join(parts: list[Tensor], shape: torch.Size, num_heads: int) -> Tensor:
    """One parameter of ours: the file's own, reshaped, or q, k and v laid out as (heads, [q k v], width)."""
    if len(parts) == 3:
        parts = [torch.stack([part.unflatten(0, (num_heads, -1)) for part in parts], dim=1)]
    return parts[0].reshape(shape)


# What a Lightning file of latent diffusion holds besides weights: its schedule, from which betas alone is read, and counters.
NOT_WEIGHTS = re.compile(r"betas|scale_factor|logvar|lvlb_weights|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|"
                         r"posterior_(variance|log_variance_clipped|mean_coef[12])|model_ema\.(decay|num_updates)|first_stage_model\.loss\..*")


def layout_of(keys: Collection[str], path: Path) -> str:
    """Which layout these names are in.  Raises InputError for an unknown one."""
    for start, layout in {"model.diffusion_model.": "latent-diffusion", "input_blocks.": "guided-diffusion", "down.0.": "ddpm",
                          "down_blocks.": "diffusers"}.items():
        if any(key.startswith(start) for key in keys):
            return layout + (", old attention names" if any(".query." in key for key in keys) else "")
    first = ", ".join(list(keys)[:3]) or "nothing"
    raise InputError(f"{path}: no layout that is known here; it holds {first}..., expected are the names of guided-diffusion (input_blocks.0.0), "
                     "latent-diffusion (model.diffusion_model.), Ho et al.'s PyTorch port (down.0.block.0) or diffusers (down_blocks.0)")


def infer(tensors: dict[str, Tensor], layout: str) -> dict:
    """The options that names and shapes give away.  Raises KeyError for a name that is missing, ValueError if they are ambiguous."""
    count = lambda pattern: len({m[0] for m in map(re.compile(pattern).match, tensors) if m})
    if layout == "ddpm":
        levels, n = count(r"down\.\d+\.block\.0\.conv1"), count(r"down\.0\.block\.\d+\.conv1")
    else:
        period, stages = _period(tensors, PREFIXES[layout])
        if stages % period:
            raise ValueError(f"{stages} input_blocks are no multiple of {period}")
        levels, n = stages // period, period - 1
    name = lambda key: names(key, layout, n, levels)[0]
    shape = lambda key: tensors[name(key)].shape
    first = [f"input_blocks.{level * (n + 1) + 1}." for level in range(levels)]  # the first stage of each level
    width = shape("time_embed.0.weight")[1]
    channels = [shape(stage + "0.in_layers.2.weight")[0] for stage in first]
    if any(c % width for c in channels):
        raise ValueError(f"channels {channels} are no multiples of {width}")
    classifier = layout != "ddpm" and name("out.2.c_proj.weight") in tensors
    config = dict(
        in_channels=shape("input_blocks.0.0.weight")[1], model_channels=width, num_res_blocks=n, channel_mult=[c // width for c in channels],
        out_channels=shape("out.2.c_proj.weight" if classifier else "out.2.weight")[0],
        attention_resolutions=[2 ** level for level, stage in enumerate(first) if name(stage + "1.qkv.weight") in tensors],
        use_scale_shift_norm=shape(first[0] + "0.emb_layers.1.weight")[0] == 2 * channels[0],
        resblock_updown=levels > 1 and name(f"input_blocks.{n + 1}.0.op.weight") not in tensors)
    return dict(config, network="Classifier" if classifier else "UNet")


def _period(tensors: dict[str, Tensor], prefix: str) -> tuple[int, int]:
    """Stages from one change of size to the next (num_res_blocks + 1), and all stages, of input_blocks.

    A residual block that changes the size has the same parameters as one that does not.
    """
    has = lambda key: prefix + key in tensors
    stages = 1 + max(int(m[1]) for m in map(re.compile(re.escape(prefix) + r"input_blocks\.(\d+)\.").match, tensors) if m)
    if has("output_blocks.0.0.in_layers.2.weight"):  # on the way back it is one layer more
        ends = [i for i in range(stages) if any(has(f"output_blocks.{i}.{j}.{leaf}.weight") for j in (1, 2) for leaf in ("conv", "in_layers.2"))]
        return (ends[0] + 1 if ends else stages), stages
    if strided := [i for i in range(stages) if has(f"input_blocks.{i}.0.op.weight")]:
        return strided[0], stages
    kind = [None] + [(tensors[f"{prefix}input_blocks.{i}.0.in_layers.2.weight"].shape[0], has(f"input_blocks.{i}.1.qkv.weight"))
                     for i in range(1, stages)]  # channels, attention
    fits = [p for p in range(2, stages + 1) if stages % p == 0
            and all(kind[i] == (kind[i - 1][0], False) for i in range(p, stages, p))
            and all(len(set(kind[i + 1:i + p])) == 1 for i in range(0, stages, p))]
    if len(fits) != 1:
        raise ValueError("the number of residual blocks a level does not show")
    return fits[0], stages


def diffusers_config(model: VQ | KL, scaling_factor: float) -> dict:
    """Options of diffusers' VQModel or AutoencoderKL for this network (the first is named by "_class_name").

    Raises ValueError for the few shapes that diffusers cannot express.
    """
    arch, levels, is_vq = model.arch, range(len(model.arch.ch_mult)), isinstance(model, VQ)
    if arch.ch_mult[0] != 1 or not (is_vq or model.embed_dim == arch.z_channels):
        raise ValueError("diffusers wants ch_mult to begin with 1, and of a KL embed_dim to equal z_channels")
    attention = ["Attn" if arch.attention(i) else "" for i in levels]
    codebook = dict(num_vq_embeddings=model.config["n_embed"], vq_embed_dim=model.embed_dim) if is_vq else {}
    return dict(_class_name="VQModel" if is_vq else "AutoencoderKL", in_channels=arch.in_channels, out_channels=arch.out_ch,
                block_out_channels=[arch.channels(i) for i in levels], layers_per_block=arch.num_res_blocks,
                down_block_types=[f"{a}DownEncoderBlock2D" for a in attention],
                up_block_types=[f"{a}UpDecoderBlock2D" for a in reversed(attention)], latent_channels=arch.z_channels,
                sample_size=arch.resolution, norm_num_groups=arch.norm_groups, scaling_factor=scaling_factor, **codebook)


def diffusers_names(model: VQ | KL) -> dict[str, str]:
    """diffusers' name of each of our parameters, for export and import.

    Same numbers; only q, k, v and proj_out are matrices (C, C) there and 1x1 convolutions (C, C, 1, 1) here: reshape.
    """
    last = len(model.arch.ch_mult) - 1
    rules = [(r"\.down\.(\d+)", r".down_blocks.\1"), (r"\.up\.(\d+)", lambda m: f".up_blocks.{last - int(m[1])}"),
             (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"), (r"\.mid\.attn_1", ".mid_block.attentions.0"),
             (r"\.block\.", ".resnets."), (r"\.attn\.", ".attentions."), (r"\.(down|up)sample\.", r".\1samplers.0."),
             (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."), (r"\.norm\.", ".group_norm."),
             (r"\.([qkv])\.", r".to_\1."), (r"\.proj_out\.", ".to_out.0.")]
    names = {}
    for key in model.state_dict():
        names[key] = key
        for pattern, replacement in rules:
            names[key] = re.sub(pattern, replacement, names[key])
    return names
