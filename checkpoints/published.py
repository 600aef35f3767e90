"""Published networks: which are known, and what a file of weights that somebody brings is.

What a file does not show, such as head width, picture size and schedule, comes from ARCHITECTURES or from a
JSON file.  Folders of diffusers show all of it (diffusers_folder.py).
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.layouts import has_ema, infer
from ddpm import Schedule
from plumbing import distributed
from plumbing.options import InputError

LINEAR = dict(name="linear", timesteps=1000, beta_start=1e-4, beta_end=0.02)
HO = dict(num_heads=1, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0)
ADM = dict(image_size=256, in_channels=3, channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64,
           use_scale_shift_norm=True, resblock_updown=True)

# First stages; resolution matters only where attn_resolutions is not empty.
STAGE = dict(resolution=256, ch=128, num_res_blocks=2, attn_resolutions=[])
VQ_F4 = dict(embed_dim=3, n_embed=8192, ddconfig=dict(STAGE, double_z=False, z_channels=3, ch_mult=[1, 2, 4]))
KL_F8 = dict(embed_dim=4, ddconfig=dict(STAGE, double_z=True, z_channels=4, ch_mult=[1, 2, 4, 4]))

# Published networks by name: what their files do not say themselves, and where to get them.
ARCHITECTURES = {
    "ffhq256": dict(  # 93.56 M parameters
        files="ffhq_p2.pt (P2-weighting), ffhq_10m.pt (ILVR)",
        listed="github.com/jychoi118/P2-weighting and /ilvr_adm",
        layout="guided-diffusion", network="UNet", schedule=LINEAR,
        config=dict(ADM, model_channels=128, out_channels=6, num_res_blocks=1, attention_resolutions=[16])),
    "adm256": dict(  # 552.8 M
        files="ffhq.pt (ddpm-segmentation), lsun_bedroom.pt, lsun_cat.pt, lsun_horse.pt, "
              "256x256_diffusion_uncond.pt (OpenAI)",
        listed="github.com/yandex-research/ddpm-segmentation, github.com/openai/guided-diffusion",
        layout="guided-diffusion", network="UNet", schedule=LINEAR,
        config=dict(ADM, model_channels=256, out_channels=6, num_res_blocks=2,
                    attention_resolutions=[8, 16, 32])),
    "ddpm256": dict(  # 113.67 M
        files="ema_lsun_church*.ckpt (PyTorch port); the folders google/ddpm-ema-church-256 and "
              "-celebahq-256 are the same network",
        listed="github.com/pesser/pytorch_diffusion, huggingface.co/google",
        layout="ddpm", network="UNet", schedule=LINEAR,
        config=dict(HO, image_size=256, in_channels=3, model_channels=128, out_channels=3, num_res_blocks=2,
                    attention_resolutions=[16], channel_mult=[1, 1, 2, 2, 4, 4])),
    "ldm-ffhq256": dict(  # 274.06 M and the first stage's 55.32 M
        files="model.ckpt of ffhq.zip", listed="github.com/CompVis/latent-diffusion",
        layout="latent-diffusion", network="UNet",
        schedule=dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0195),
        config=dict(image_size=64, in_channels=3, model_channels=224, out_channels=3, num_res_blocks=2,
                    attention_resolutions=[2, 4, 8], channel_mult=[1, 2, 3, 4], num_head_channels=32),
        first_stage=dict(network="VQ", config=VQ_F4)),
    "ldm-church256": dict(  # 294.97 M and the first stage's 83.65 M
        files="model.ckpt of lsun_churches.zip", listed="github.com/CompVis/latent-diffusion",
        layout="latent-diffusion", network="UNet",
        schedule=dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0155),
        config=dict(image_size=32, in_channels=4, model_channels=192, out_channels=4, num_res_blocks=2,
                    attention_resolutions=[1, 2, 4, 8], channel_mult=[1, 2, 2, 4, 4], num_heads=8,
                    use_scale_shift_norm=True, resblock_updown=True),
        first_stage=dict(network="KL", config=KL_F8)),
    "imagenet256-classifier": dict(  # 54.1 M, trained on noised ImageNet
        files="256x256_classifier.pt", listed="github.com/openai/guided-diffusion",
        layout="guided-diffusion", network="Classifier", schedule=LINEAR,
        config=dict(ADM, model_channels=128, out_channels=1000, num_res_blocks=2,
                    attention_resolutions=[8, 16, 32], pool="attention")),
}


def describe(tensors: dict[str, Tensor], layout: str, path: Path, arch: str | None) -> dict[str, Any]:
    """What a published file holds: network, config, schedule, of a latent model first_stage and scale_factor,
    and `layout` in words.

    layout  as layout_of gives it, but for diffusers
    arch    a name of ARCHITECTURES, a JSON file with what the file does not show, or None: the known network
            that has its shapes
    Raises InputError that says what was found and what was expected.
    """
    try:
        found, unclear = infer(tensors, layout), ""
    except KeyError as error:
        found, unclear = {}, f"missing {error.args[0]}"
    except ValueError as error:
        found, unclear = {}, str(error)
    words = [layout]
    if arch is None:
        arch = _recognised(found, unclear, layout, path)
        words += [arch, "recognised by its shapes"]
        _say_what_is_assumed(ARCHITECTURES[arch], arch, "betas" in tensors, path)
    else:
        words += [Path(arch).name]
    if arch in ARCHITECTURES:
        known = ARCHITECTURES[arch]
        if known["layout"] != layout:
            raise InputError(f"{path}: holds {layout} names, --arch {arch} has those of {known['layout']}")
        description = {key: value for key, value in known.items() if key not in ("files", "listed")}
    else:
        why = f"{path} does not show it" + (f" ({unclear})" if unclear else "")
        description = _completed(arch, found, layout, "betas" in tensors, why)
    if wrong := _differences(found, description):
        raise InputError(f"{path}: is not the network of --arch {arch}: it has {', '.join(wrong)}")
    if layout == "latent-diffusion":
        description |= _of_latents(tensors, description, path)
    if has_ema(tensors):
        words += ["averaged weights (EMA)"]
    return dict(description, layout=", ".join(words))


def _recognised(found: dict[str, Any], unclear: str, layout: str, path: Path) -> str:
    """The name of the known network that has these shapes; InputError if there is none."""
    for name, known in ARCHITECTURES.items():
        if found and known["layout"] == layout and not _differences(found, known):
            return name
    shown = unclear or ", ".join(f"{key} {value}" for key, value in found.items())
    raise InputError(f"{path}: the file does not say which network it is for; add --arch "
                     f"{{{', '.join(ARCHITECTURES)}}} or --arch FILE.json; found: {layout} names, {shown}")


def _say_what_is_assumed(known: dict[str, Any], arch: str, has_betas: bool, path: Path) -> None:
    """Says what a file does not show and is taken from the network that has the same shapes."""
    config, schedule = known["config"], known["schedule"]
    width, side = config.get("num_head_channels"), config["image_size"]
    heads = f"attention heads of {width} channels" if width else f"{config['num_heads']} attention head(s)"
    noise = "" if has_betas else f", {schedule['name']} schedule of {schedule['timesteps']} steps"
    distributed.say_once(f"{path}: assumed, as for {arch}: {heads}, {side}x{side}{noise}; else --arch "
                         "FILE.json")


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What a file shows to be other than in the expected description, in words."""
    off = dict(use_scale_shift_norm=False, resblock_updown=False)  # as a description may leave out
    options = {**off, **expected["config"], "network": expected["network"]}

    def plain(key: str, value: Any) -> Any:
        value = list(value) if isinstance(value, tuple) else value
        return sorted(value) if key == "attention_resolutions" else value

    return [f"{key} {value} (expected {options[key]})" for key, value in found.items()
            if key in options and plain(key, value) != plain(key, options[key])]


def _completed(arch: str, found: dict[str, Any], layout: str, has_betas: bool, why: str) -> dict[str, Any]:
    """The description in a JSON file, completed by what the file of weights shows.

    Raises InputError that lists what is still missing, and `why`.
    """
    given = read_json(arch)
    shown = {key: value for key, value in found.items() if key != "network"}
    config = {**(HO if layout == "ddpm" else {}), **shown, **given["config"]}
    needed = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks",
              "attention_resolutions", "channel_mult")
    missing = [key for key in needed if key not in config]
    if not config.keys() & {"num_heads", "num_head_channels"}:
        missing.append("num_head_channels (or num_heads)")
    if missing:
        raise InputError(f"--arch {arch}: add {', '.join(missing)} to \"config\"; {why}")
    latent = layout == "latent-diffusion"
    if latent and "first_stage" not in given:
        stage = '"first_stage": {"network": "VQ" or "KL", "config": {...}}'
        raise InputError(f"--arch {arch}: add {stage}")
    if latent and not has_betas and "schedule" not in given:
        raise InputError(f"--arch {arch}: add \"schedule\"; {why}")
    schedule = None if has_betas else LINEAR
    return {"network": found.get("network", "UNet"), "schedule": schedule, **given, "config": config}


def _of_latents(tensors: dict[str, Tensor], description: dict[str, Any], path: Path) -> dict[str, Any]:
    """scale_factor and schedule, which files of latent diffusion hold."""
    if not any(key.startswith("first_stage_model.") for key in tensors):
        raise InputError(f"{path}: the first stage is missing (no first_stage_model.*), "
                         "without which latents are no pictures")
    scale = float(tensors.get("scale_factor", description.get("scale_factor", 1.0)))
    schedule = description["schedule"]
    if "betas" in tensors:
        schedule = _schedule(tensors["betas"], schedule, path)
    return dict(scale_factor=scale, schedule=schedule)


def _schedule(betas: Tensor, expected: dict[str, Any] | None, path: Path) -> dict[str, Any]:
    """The schedule that has these betas; InputError if it is not the expected one, or none that is known."""
    start, end = (float(f"{beta:.5g}") for beta in (betas[0], betas[-1]))
    for name in ("scaled-linear", "linear"):
        config = dict(name=name, timesteps=len(betas), beta_start=start, beta_end=end)
        alpha_bar = Schedule(**config).alpha_bar
        if torch.allclose(alpha_bar, torch.cumprod(1 - betas.double(), 0), rtol=1e-3, atol=1e-6):
            if any(config.get(name, value) != value for name, value in (expected or {}).items()):
                raise InputError(f"{path}: was trained with the schedule {config}, expected was {expected}")
            return {**(expected or {}), **config}
    raise InputError(f"{path}: its {len(betas)} betas, {start} to {end}, "
                     "are neither scaled-linear nor linear")


def read_json(file: str) -> dict[str, Any]:
    """The content of a file for --arch."""
    try:
        description = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--arch {file}: neither one of {', '.join(ARCHITECTURES)} nor a JSON file "
                         f"({error})") from None
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InputError(f"--arch {file}: must hold {{\"config\": {{...}}, \"schedule\": {{...}}}}")
    where = description["config"].get("attention_resolutions", [])
    if not isinstance(where, list) or not all(isinstance(factor, int) for factor in where):
        raise InputError(f"--arch {file}: attention_resolutions must be a list of whole numbers")
    if not isinstance(description.get("schedule", {}), dict | None):
        raise InputError(f"--arch {file}: \"schedule\" must hold {{\"name\": ..., \"timesteps\": ...}}")
    if not isinstance(description.get("scale_factor", 1.0), int | float):
        raise InputError(f"--arch {file}: \"scale_factor\" must be a number")
    return description
