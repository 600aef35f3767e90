"""The layouts in which published networks are filed, and what names and shapes give away.

    layout            names of the weights                                      who publishes in it
    guided-diffusion  ours (unet.py), in a flat dict                            OpenAI, P2-weighting, ILVR,
                                                                                ddpm-segmentation
    ddpm              temb.dense.0, down.0.block.0.conv1, ... in a flat dict    Ho et al. 2020, PyTorch port
    diffusers         time_embedding.linear_1, down_blocks.0.resnets.0.conv1,   google/ddpm-ema-*, a folder
                      ... beside a config.json
    latent-diffusion  model.diffusion_model. + ours, first_stage_model. +       Rombach et al. 2022, a
                      autoencoder.py's, model_ema. + names without dots         Lightning .ckpt
    stylegan2         those of baselines/stylegan2.py, in entries g_ema and d   CDC, a training state
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.network import Network, check_fit
from plumbing.options import InputError

# Our modules (the place of a kind of layer, or a leaf inside it) -> theirs.  `up` counts the levels of the
# way back from 0.
DDPM = {
    "time_embed.0": "temb.dense.0", "time_embed.2": "temb.dense.1", "input_blocks.0.0": "conv_in",
    "out.0": "norm_out", "out.2": "conv_out",
    "input block": "down.{level}.block.{i}.", "input attention": "down.{level}.attn.{i}.",
    "input op": "down.{level}.downsample.",
    "middle 0": "mid.block_1.", "middle 1": "mid.attn_1.", "middle 2": "mid.block_2.",
    "output block": "up.{level}.block.{i}.", "output attention": "up.{level}.attn.{i}.",
    "output conv": "up.{level}.upsample.",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "temb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "nin_shortcut",
    "norm": "norm", "qkv": "q k v", "proj_out": "proj_out", "op": "conv", "conv": "conv",
}
DIFFUSERS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "input block": "down_blocks.{level}.resnets.{i}.",
    "input attention": "down_blocks.{level}.attentions.{i}.",
    "input op": "down_blocks.{level}.downsamplers.0.",
    "middle 0": "mid_block.resnets.0.", "middle 1": "mid_block.attentions.0.",
    "middle 2": "mid_block.resnets.1.",
    "output block": "up_blocks.{up}.resnets.{i}.", "output attention": "up_blocks.{up}.attentions.{i}.",
    "output conv": "up_blocks.{up}.upsamplers.0.",
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    "norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0", "op": "conv", "conv": "conv",
}
TABLES = {"ddpm": DDPM, "diffusers": DIFFUSERS,
          "diffusers, old attention names": dict(DIFFUSERS, qkv="query key value", proj_out="proj_attn")}
PREFIXES = {"guided-diffusion": "", "latent-diffusion": "model.diffusion_model."}

# What a Lightning file of latent diffusion holds besides weights: counters, and its schedule, of which betas
# alone is read.
NOT_WEIGHTS = re.compile(
    r"betas|scale_factor|logvar|lvlb_weights|model_ema\.(decay|num_updates)|first_stage_model\.loss\..*|"
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|"
    r"posterior_(variance|log_variance_clipped|mean_coef[12])")


# ---- which layout ------------------------------------------------------------------------------------------

LAYOUTS = {"model.diffusion_model.": "latent-diffusion", "input_blocks.": "guided-diffusion",
           "down.0.": "ddpm", "down_blocks.": "diffusers", "style.1.": "stylegan2"}
# What names give away of networks that cannot be read: a part of a name, and what has it.
OTHER_NETWORKS = {
    "label_emb.weight": "a class-conditional model; only unconditional ones can be adapted",
    "cond_stage_model.": "a model that is conditioned on text or classes; only unconditional ones can be "
                         "adapted",
    ".attn2.to_k.": "a text-to-image model; only unconditional ones can be adapted",
    "class_embedding.": "a class-conditional model; only unconditional ones can be adapted",
    ".adaptor.": "an export of this project that carries its code, or psi alone; give the run it was made "
                 "from",
    "all_modules.": "a score-based model (NCSN++); it cannot be read",
    "model.map_layer0.": "a network of EDM; it cannot be read",
    "downs.0.": "a network of denoising-diffusion-pytorch; it cannot be read",
    "x_embedder.": "a diffusion transformer (DiT); only U-Nets can be read",
    "mapping.fc": "a StyleGAN of another layout; of GANs the common PyTorch port of StyleGAN2 can be read",
    "features.0.": "a network of torchvision, which is no diffusion model",
    "encoder.conv_in.": "a first stage (VQ or KL) alone; give the diffusion model that runs on its latents",
}


def layout_of(keys: Collection[str], path: Path) -> str:
    """Which layout these names are in.  Raises InputError for an unknown one, and for a conditional model."""
    for part, what in OTHER_NETWORKS.items():
        starts = part, f"model.diffusion_model.{part}"
        if any(key.startswith(starts) or part[0] == "." and part in key for key in keys):
            raise InputError(f"{path}: {what}")
    for start, layout in LAYOUTS.items():
        if any(key.startswith(start) for key in keys):
            old = any(".query." in key for key in keys)
            return f"{layout}, old attention names" if old else layout
    first = ", ".join(list(keys)[:3]) or "nothing"
    raise InputError(f"{path}: no layout that is known here; it holds {first}..., expected are the names of "
                     "guided-diffusion (input_blocks.0.0), latent-diffusion (model.diffusion_model.), "
                     "Ho et al.'s PyTorch port (down.0.block.0) or diffusers (down_blocks.0)")


def has_ema(keys: Collection[str]) -> bool:
    """Whether there is a running average beside the weights."""
    return any(key.startswith("model_ema.diffusion_model") for key in keys)


# ---- which network -----------------------------------------------------------------------------------------

def infer(tensors: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """The options that names and shapes give away, and `network`: UNet or Classifier.  Not for diffusers.

    Raises KeyError for a name that is missing, ValueError if they are ambiguous.
    """
    levels, num_res_blocks = _ddpm_levels(tensors) if layout == "ddpm" else _levels(tensors, PREFIXES[layout])
    stage = num_res_blocks + 1                                    # stages of input_blocks a level
    first = [f"input_blocks.{level * stage + 1}." for level in range(levels)]

    def name(key: str) -> str:
        return names(key, layout, num_res_blocks, levels)[0]

    def shape(key: str) -> torch.Size:
        return tensors[name(key)].shape

    width = shape("time_embed.0.weight")[1]
    channels = [shape(start + "0.in_layers.2.weight")[0] for start in first]
    if any(c % width for c in channels):
        raise ValueError(f"channels {channels} are no multiples of {width}")
    classifier = layout != "ddpm" and name("out.2.c_proj.weight") in tensors
    return dict(
        in_channels=shape("input_blocks.0.0.weight")[1], model_channels=width, num_res_blocks=num_res_blocks,
        channel_mult=[c // width for c in channels],
        out_channels=shape("out.2.c_proj.weight" if classifier else "out.2.weight")[0],
        attention_resolutions=[2 ** level for level, start in enumerate(first)
                               if name(start + "1.qkv.weight") in tensors],
        use_scale_shift_norm=shape(first[0] + "0.emb_layers.1.weight")[0] == 2 * channels[0],
        resblock_updown=levels > 1 and name(f"input_blocks.{stage}.0.op.weight") not in tensors,
        network="Classifier" if classifier else "UNet")


def _ddpm_levels(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Levels, and residual blocks a level, of Ho et al.'s port."""
    levels = [key for key in tensors if re.match(r"down\.\d+\.block\.0\.conv1\.weight", key)]
    blocks = [key for key in tensors if re.match(r"down\.0\.block\.\d+\.conv1\.weight", key)]
    return len(levels), len(blocks)


def _levels(tensors: dict[str, Tensor], prefix: str) -> tuple[int, int]:
    """Levels, and residual blocks a level, of a network with our names after `prefix`."""
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    places = [int(key.split(".")[1]) for key in tensors if key.startswith("input_blocks.")]
    if not places:
        raise ValueError("there are no input_blocks")
    stages = 1 + max(places)
    period = _period(tensors, stages)
    if stages % period:
        raise ValueError(f"{stages} input_blocks are no multiple of {period}")
    return stages // period, period - 1


def _period(tensors: dict[str, Tensor], stages: int) -> int:
    """Stages of input_blocks from one change of size to the next.

    A residual block that changes the size has the same parameters as one that does not.
    """
    if "output_blocks.0.0.in_layers.2.weight" in tensors:  # on the way back it is one layer more
        layers = [f"{j}.{leaf}.weight" for j in (1, 2) for leaf in ("conv", "in_layers.2")]
        ends = [i for i in range(stages) if any(f"output_blocks.{i}.{layer}" in tensors for layer in layers)]
        return ends[0] + 1 if ends else stages
    if strided := [i for i in range(stages) if f"input_blocks.{i}.0.op.weight" in tensors]:
        return strided[0]
    channels = [0] + [len(tensors[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in range(1, stages)]
    attention = [f"input_blocks.{i}.1.qkv.weight" in tensors for i in range(stages)]
    kind = list(zip(channels, attention))
    fits = [period for period in range(2, stages + 1) if stages % period == 0
            and all(kind[i] == (channels[i - 1], False) for i in range(period, stages, period))
            and all(len(set(kind[i + 1:i + period])) == 1 for i in range(0, stages, period))]
    if len(fits) != 1:
        raise ValueError("the number of residual blocks a level does not show")
    return fits[0]


# ---- which weights -----------------------------------------------------------------------------------------

def names(key: str, layout: str, num_res_blocks: int, levels: int) -> list[str]:
    """The names in a file of this layout for a parameter of ours: one, or three (q, k and v) for a qkv."""
    if key.startswith("first_stage."):
        return ["first_stage_model." + key.removeprefix("first_stage.")]
    if layout in PREFIXES:
        return [PREFIXES[layout] + key]
    table, (module, end) = TABLES[layout], key.rsplit(".", 1)  # end: weight or bias
    if module in table:
        return [f"{table[module]}.{end}"]
    pattern = r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d))?\.([a-z].*)"
    part, stage, place_in_stage, leaf = re.fullmatch(pattern, module).groups()
    kind = leaf if leaf in ("op", "conv") else "attention" if leaf in ("norm", "qkv", "proj_out") else "block"
    back = part == "output"  # the way back has one more block a level, and no stage like input_blocks.0
    level, i = divmod(int(stage) - (not back), num_res_blocks + 1)
    if kind == "block" and part == "input" and i == num_res_blocks:  # residual blocks that change the size
        kind = "op"
    if kind == "block" and part == "output" and place_in_stage != "0":
        kind = "conv"
    place = table[f"middle {stage}" if part == "middle" else f"{part} {kind}"]
    place = place.format(level=levels - 1 - level if back else level, up=level, i=i)
    return [f"{place}{name}.{end}" for name in table[leaf].split()]


def sources(own: dict[str, Tensor], layout: str, config: dict[str, Any],
            keys: Collection[str]) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """For each of our parameters the names under which a file with these keys holds it, and their shapes.

    own is the state of the network that is to be filled; where a file has an average (EMA) of the weights,
    that is what is taken.
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


def translate(tensors: dict[str, Tensor], layout: str, network: Network, path: Path) -> dict[str, Tensor]:
    """A published file's weights under our names; InputError unless they are exactly those of the network."""
    own = network.model.state_dict() if layout in TABLES else network.state_dict()
    taken, shapes = sources(own, layout, network.description["config"], tensors)
    if layout == "latent-diffusion":
        tensors = {key: value for key, value in tensors.items() if not NOT_WEIGHTS.fullmatch(key)}
    check_fit(shapes, tensors, path)
    found = {}
    for key, value in own.items():
        parts = [tensors[name] for name in taken[key]]
        if len(parts) == 3:  # q, k and v, which lie here as (heads, [q k v], width)
            heads = network.model.heads(len(value) // 3)
            parts = [torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1)]
        found[key] = parts[0].reshape(value.shape)
    return found
