"""A UNet2DModel of diffusers and a scheduler's noise: their options and weights from ours, and ours from
theirs.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.layouts import names
from ddpm import Schedule
from plumbing.options import InputError
from unet import UNet

# Options of UNet2DModel that unet.py does not have, with the one value that means the same network.
FIXED = dict(center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None,
             mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, act_fn="silu")
# (attention, resblock_updown): types of a level's blocks on the way down and up.
BLOCKS = {(False, False): ("DownBlock2D", "UpBlock2D"), (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
          (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
          (True, True): ("AttnDownBlock2D", "AttnUpBlock2D")}
# Options of which there are two here, the default first.
CHOICES = dict(resnet_time_scale_shift=("default", "scale_shift"), downsample_type=("conv", "resnet"),
               upsample_type=("conv", "resnet"))
# Options of a scheduler that ddpm.Schedule does not have, likewise.
FIXED_SCHEDULE = dict(trained_betas=None, rescale_betas_zero_snr=False)
# Schedulers of models that are not trained as Eq. 1 says: their classes begin so.
OTHER_DIFFUSION = ("ScoreSde", "KarrasVe", "CMStochastic", "FlowMatch", "EDM", "VQDiffusion", "Unclip")
# diffusers' names: ours.
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


# ---- read ------------------------------------------------------------------------------------------------

def unet_options(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    """Options of our UNet from those of a UNet2DModel, which are in `file`.

    Raises InputError for what unet.py cannot be, by name.
    """
    _refuse_other_models(theirs, file)
    refuse_others(theirs, FIXED, file)
    try:
        return _unet_options(theirs, file)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: does not describe a UNet2DModel of diffusers "
                         f"({type(error).__name__}: {error})") from None


def refuse_others(theirs: dict[str, Any], fixed: dict[str, Any], file: Path) -> None:
    """InputError that names the first of these options with another value than the one we have."""
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise InputError(f"{file}: {key} is {theirs[key]!r}; only {value!r} can be read")


def _refuse_other_models(theirs: dict[str, Any], file: Path) -> None:
    """InputError that names the kind of a model that is not an unconditional UNet2DModel."""
    kind = theirs.get("_class_name", "UNet2DModel")
    if kind == "TANUNet":
        raise InputError(f"{file}: an export of this project that carries its code; give the run it was "
                         "made from")
    if kind == "UNet2DConditionModel":
        raise InputError(f"{file}: a text-to-image model; only unconditional ones can be adapted")
    if kind != "UNet2DModel":
        raise InputError(f"{file}: a {kind}; of diffusers only UNet2DModel can be read")
    if theirs.get("class_embed_type") or theirs.get("num_class_embeds"):
        raise InputError(f"{file}: a class-conditional model; only unconditional ones can be adapted")


def square(size: Any, file: Path) -> int:
    """Pixels per side, from a number or a pair; InputError for pictures that are not square."""
    sides = size if isinstance(size, (list, tuple)) else [size]
    if not all(isinstance(side, int) for side in sides) or len(set(sides)) != 1:
        raise InputError(f"{file}: sample_size is {size}; only square pictures can be read")
    return sides[0]


def multiples(widths: list[int], file: Path) -> list[int]:
    """channel_mult of these block_out_channels; InputError for what is no multiple of the first."""
    if any(w % widths[0] for w in widths):
        raise InputError(f"{file}: block_out_channels {widths}; only multiples of the first can be read")
    return [w // widths[0] for w in widths]


def _unet_options(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    chosen = {key: theirs.get(key, values[0]) for key, values in CHOICES.items()}
    for key, values in CHOICES.items():
        if chosen[key] not in values:
            raise InputError(f"{file}: {key} is {chosen[key]!r}; only {values[0]!r} and {values[1]!r} can "
                             "be read")
    if chosen["downsample_type"] != chosen["upsample_type"]:
        raise InputError(f"{file}: upsample_type is {chosen['upsample_type']!r}; only the same as "
                         "downsample_type can be read")
    updown = chosen["downsample_type"] == "resnet"
    scale_shift = chosen["resnet_time_scale_shift"] == "scale_shift"
    widths, down, up = theirs["block_out_channels"], theirs["down_block_types"], theirs["up_block_types"]
    attention = [kind == "AttnDownBlock2D" for kind in down]
    if (list(down), list(up)) != _block_types(attention, updown):
        raise InputError(f"{file}: down_block_types {down} and up_block_types {up}; only (Attn)DownBlock2D, "
                         "with 'resnet' ResnetDownsampleBlock2D, and their mirror image can be read")
    groups = theirs.get("norm_num_groups", 32)
    return dict(
        image_size=square(theirs["sample_size"], file), in_channels=theirs["in_channels"],
        out_channels=theirs["out_channels"], num_res_blocks=theirs["layers_per_block"],
        model_channels=widths[0], channel_mult=multiples(widths, file),
        attention_resolutions=[2 ** i for i, a in enumerate(attention) if a],
        num_heads=1, num_head_channels=theirs.get("attention_head_dim", 8),
        use_scale_shift_norm=scale_shift, resblock_updown=updown,
        middle_attention=_middle_attention(theirs, groups, scale_shift, file),
        dropout=theirs.get("dropout", 0.0), norm_groups=groups,
        norm_eps=theirs.get("norm_eps", 1e-5), flip_sin_to_cos=theirs.get("flip_sin_to_cos", True),
        freq_shift=theirs.get("freq_shift", 0), downsample_padding=theirs.get("downsample_padding", 1))


def _middle_attention(theirs: dict[str, Any], groups: int, scale_shift: bool, file: Path) -> str:
    """middle_attention of unet.Encoder.  Where the groups of its norm are not stated, diffusers takes those
    of the others or, of scale_shift, none.
    """
    if not theirs.get("add_attention", True):
        return "none"
    middle = theirs.get("attn_norm_num_groups")
    if middle is None:
        return "bare" if scale_shift else "norm"
    if middle != groups:
        raise InputError(f"{file}: attn_norm_num_groups is {middle!r}; only {groups!r} can be read")
    return "norm"


def _block_types(attention: list[bool], updown: bool) -> tuple[list[str], list[str]]:
    """down_block_types and up_block_types of a U-Net whose levels have attention or not."""
    down, up = zip(*(BLOCKS[a, updown] for a in attention))
    return list(down), list(up[::-1])


def schedule_options(theirs: dict[str, Any], file: Path) -> dict[str, Any]:
    """Options of ddpm.Schedule from those of a scheduler, which are in `file`; InputError for another
    kind."""
    kind = str(theirs.get("_class_name", ""))
    if kind.startswith(OTHER_DIFFUSION):
        raise InputError(f"{file}: {kind}, of a model that was not trained to predict the noise of Eq. 1")
    refuse_others(theirs, FIXED_SCHEDULE, file)
    found = {}
    for key, table in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES)):
        given = theirs.get(key, next(iter(table)))
        if given not in list(table):
            raise InputError(f"{file}: {key} is {given!r}; only {' or '.join(map(repr, table))} can be read")
        found[key] = table[given]
    return dict(name=found["beta_schedule"], timesteps=theirs.get("num_train_timesteps", 1000),
                beta_start=theirs.get("beta_start", 1e-4), beta_end=theirs.get("beta_end", 0.02),
                prediction=found["prediction_type"])


def schedule_config(schedule: Schedule) -> dict[str, Any]:
    """Options of a scheduler with these noise levels."""
    beta, prediction = ({ours: name for name, ours in table.items()}
                        for table in (BETA_SCHEDULES, PREDICTION_TYPES))
    ours = schedule.config
    return dict(num_train_timesteps=ours["timesteps"], beta_start=ours["beta_start"],
                beta_end=ours["beta_end"],
                beta_schedule=beta[ours["name"]], prediction_type=prediction[schedule.prediction])


# ---- written ---------------------------------------------------------------------------------------------

def unet_config(unet: UNet) -> dict[str, Any]:
    """Options of the UNet2DModel that is this network, less a learned variance.

    Raises ValueError for the few shapes that diffusers cannot express.
    """
    ours, mult = unet.config, unet.config["channel_mult"]
    widths = [unet.model_channels * m for m in mult]
    attention = [2 ** level in ours["attention_resolutions"] for level in range(len(mult))]
    attended = {width for width, a in zip(widths, attention) if a}
    if ours["middle_attention"] != "none":
        attended.add(widths[-1])
    of_a_head = {width // unet.heads(width) for width in attended}
    alone = all(unet.heads(width) == 1 for width in attended)
    if ours["middle_attention"] == "bare" and not ours["use_scale_shift_norm"]:
        raise ValueError("diffusers has attention without a norm only beside scale_shift")
    if mult[0] != 1 or not (alone or len(of_a_head) == 1):
        raise ValueError("diffusers wants channel_mult to begin with 1, and attention heads of one width "
                         "everywhere")
    down, up = _block_types(attention, ours["resblock_updown"])
    resample = "resnet" if ours["resblock_updown"] else "conv"
    return dict(_class_name="UNet2DModel", sample_size=unet.image_size, in_channels=unet.in_channels,
                out_channels=unet.in_channels, block_out_channels=widths, down_block_types=down,
                up_block_types=up, layers_per_block=ours["num_res_blocks"],
                attention_head_dim=None if alone else of_a_head.pop(), dropout=ours["dropout"],
                norm_num_groups=unet.norm_groups, norm_eps=ours["norm_eps"],
                attn_norm_num_groups=unet.norm_groups if ours["middle_attention"] == "norm" else None,
                add_attention=ours["middle_attention"] != "none",
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
