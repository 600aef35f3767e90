"""Published networks: which are known, and what a file or folder that somebody brings is.

`describe` answers for a file of weights (already read: checkpoints.py does that), `describe_folder` for a folder of diffusers.
What a file does not show, such as head width, picture size and schedule, comes from ARCHITECTURES or from a JSON file.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import KL_F8, VQ_F4
from checkpoints.layouts import has_ema, infer, layout_of
from ddpm import Schedule
from plumbing.options import InputError

LINEAR = dict(name="linear", timesteps=1000, beta_start=1e-4, beta_end=0.02)
HO = dict(num_heads=1, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0)

# Published networks by name: what their files do not say themselves.
ARCHITECTURES = {
    "ffhq256": dict(  # 93.56 M parameters
        files="ffhq_p2.pt (P2-weighting), ffhq_10m.pt (ILVR)", listed="github.com/jychoi118/P2-weighting and /ilvr_adm",
        layout="guided-diffusion", network="UNet", schedule=LINEAR, config=dict(
            image_size=256, in_channels=3, model_channels=128, out_channels=6, num_res_blocks=1, attention_resolutions=[16],
            channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True)),
    "adm256": dict(  # 552.8 M
        files="ffhq.pt (ddpm-segmentation), lsun_bedroom.pt, lsun_cat.pt, lsun_horse.pt, 256x256_diffusion_uncond.pt (OpenAI)",
        listed="github.com/yandex-research/ddpm-segmentation, github.com/openai/guided-diffusion",
        layout="guided-diffusion", network="UNet", schedule=LINEAR, config=dict(
            image_size=256, in_channels=3, model_channels=256, out_channels=6, num_res_blocks=2, attention_resolutions=[8, 16, 32],
            channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True)),
    "ddpm256": dict(  # 113.67 M
        files="ema_lsun_church*.ckpt (PyTorch port); the folders google/ddpm-ema-church-256 and -celebahq-256 are the same network",
        listed="github.com/pesser/pytorch_diffusion, huggingface.co/google",
        layout="ddpm", network="UNet", schedule=LINEAR, config=dict(
            image_size=256, in_channels=3, model_channels=128, out_channels=3, num_res_blocks=2, attention_resolutions=[16],
            channel_mult=[1, 1, 2, 2, 4, 4], **HO)),
    "ldm-ffhq256": dict(  # 274.06 M and the first stage's 55.32 M
        files="model.ckpt of ffhq.zip", listed="github.com/CompVis/latent-diffusion",
        layout="latent-diffusion", network="UNet", schedule=dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0195),
        config=dict(image_size=64, in_channels=3, model_channels=224, out_channels=3, num_res_blocks=2, attention_resolutions=[2, 4, 8],
                    channel_mult=[1, 2, 3, 4], num_head_channels=32),
        first_stage=dict(network="VQ", config=VQ_F4)),
    "ldm-church256": dict(  # 294.97 M and the first stage's 83.65 M
        files="model.ckpt of lsun_churches.zip", listed="github.com/CompVis/latent-diffusion",
        layout="latent-diffusion", network="UNet", schedule=dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0155),
        config=dict(image_size=32, in_channels=4, model_channels=192, out_channels=4, num_res_blocks=2, attention_resolutions=[1, 2, 4, 8],
                    channel_mult=[1, 2, 2, 4, 4], num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
        first_stage=dict(network="KL", config=KL_F8)),
    "imagenet256-classifier": dict(  # 54.1 M, trained on noised ImageNet
        files="256x256_classifier.pt", listed="github.com/openai/guided-diffusion",
        layout="guided-diffusion", network="Classifier", schedule=LINEAR, config=dict(
            image_size=256, in_channels=3, model_channels=128, out_channels=1000, num_res_blocks=2, attention_resolutions=[8, 16, 32],
            channel_mult=[1, 1, 2, 2, 4, 4], num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True, pool="attention")),
}


def differences(found: dict, expected: dict) -> list[str]:
    """Options that a file shows to be other than expected, in words."""
    plain = lambda key, value: sorted(value) if key == "attention_resolutions" else list(value) if isinstance(value, tuple) else value
    return [f"{key} {value} (expected {expected[key]})" for key, value in found.items()
            if key in expected and plain(key, value) != plain(key, expected[key])]


def describe(tensors: dict[str, Tensor], path: Path, arch: str | None) -> tuple[dict, str]:
    """What a published file holds (network, config, schedule, of a latent model first_stage and scale_factor, `layout` in words), its layout.

    arch is a name of ARCHITECTURES, a JSON file with what the file does not show, or None: the known network that has its shapes.
    Raises InputError that says what was found and what was expected.
    """
    layout = layout_of(tensors, path)
    if layout.startswith("diffusers"):
        return describe_folder(path.parent, arch, layout), layout
    try:
        found, unclear = infer(tensors, layout), ""
    except (KeyError, ValueError) as error:
        found, unclear = {}, f"{'missing ' if isinstance(error, KeyError) else ''}{error.args[0]}"
    by_shape = ""
    if arch is None:
        fitting = [name for name, known in ARCHITECTURES.items() if found and known["layout"] == layout and not differences(found, _full(known))]
        if not fitting:
            shown = unclear or ", ".join(f"{key} {value}" for key, value in found.items())
            raise InputError(f"{path}: the file does not say which network it is for; add --arch {{{', '.join(ARCHITECTURES)}}} or --arch FILE.json; "
                             f"found: {layout} names, {shown}")
        arch, by_shape = fitting[0], ", recognised by its shapes"
    if arch in ARCHITECTURES:
        description = {key: value for key, value in ARCHITECTURES[arch].items() if key not in ("files", "listed")}
        if description["layout"] != layout:
            raise InputError(f"{path}: holds {layout} names, --arch {arch} has those of {description['layout']}")
    else:
        description = _completed(arch, found, layout, "betas" in tensors, f"{path} does not show it" + (f" ({unclear})" if unclear else ""))
    if wrong := differences(found, _full(description)):
        raise InputError(f"{path}: is not the network of --arch {arch}: it has {', '.join(wrong)}")
    if layout == "latent-diffusion":
        if not any(key.startswith("first_stage_model.") for key in tensors):
            raise InputError(f"{path}: the first stage is missing (no first_stage_model.*), without which latents are no pictures")
        description["scale_factor"] = float(tensors.get("scale_factor", description.get("scale_factor", 1.0)))
        if "betas" in tensors:
            description["schedule"] = _schedule(tensors["betas"], description["schedule"], path)
    averaged = ", averaged weights (EMA)" if has_ema(tensors) else ""
    return dict(description, layout=f"{layout}, {Path(arch).name}{by_shape}{averaged}"), layout


def _completed(arch: str, found: dict, layout: str, has_betas: bool, why: str) -> dict:
    """The description in a JSON file, completed by what the file of weights shows; InputError that lists what is still missing."""
    given = read_json(arch)
    shown = {key: value for key, value in found.items() if key != "network"}
    config = {**(HO if layout == "ddpm" else {}), **shown, **given["config"]}
    needed = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "attention_resolutions", "channel_mult")
    missing = [key for key in needed if key not in config]
    if not config.keys() & {"num_heads", "num_head_channels"}:
        missing.append("num_head_channels (or num_heads)")
    if missing:
        raise InputError(f"--arch {arch}: add {', '.join(missing)} to \"config\"; {why}")
    latent = layout == "latent-diffusion"
    if latent and "first_stage" not in given:
        raise InputError(f"--arch {arch}: add \"first_stage\": {{\"network\": \"VQ\" or \"KL\", \"config\": {{...}}}}")
    if latent and not has_betas and "schedule" not in given:
        raise InputError(f"--arch {arch}: add \"schedule\"; {why}")
    return {"network": found.get("network", "UNet"), "schedule": None if has_betas else LINEAR, **given, "config": config}


def _full(description: dict) -> dict:
    """All that `infer` can find, of a description that leaves out what is off."""
    return {"use_scale_shift_norm": False, "resblock_updown": False, **description["config"], "network": description["network"]}


def _schedule(betas: Tensor, expected: dict | None, path: Path) -> dict:
    """The schedule that has these betas; InputError if it is not the expected one, or none that is known."""
    start, end = (float(f"{beta:.5g}") for beta in (betas[0], betas[-1]))
    for name in ("scaled-linear", "linear"):
        config = dict(name=name, timesteps=len(betas), beta_start=start, beta_end=end)
        alpha_bar = Schedule(**config).alpha_bar
        if torch.allclose(alpha_bar, torch.cumprod(1 - betas.double(), 0), rtol=1e-3, atol=1e-6):
            if {**config, **(expected or {})} != config:
                raise InputError(f"{path}: was trained with the schedule {config}, expected was {expected}")
            return config
    raise InputError(f"{path}: its {len(betas)} betas, {start} to {end}, are neither scaled-linear nor linear")


def read_json(file: str) -> dict:
    """The content of a file for --arch."""
    try:
        description = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--arch {file}: neither one of {', '.join(ARCHITECTURES)} nor a JSON file ({error})") from None
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise InputError(f"--arch {file}: must hold {{\"config\": {{...}}, \"schedule\": {{...}}}}")
    return description


# ---- folders of diffusers --------------------------------------------------------------------------------------------

# Options of diffusers' UNet2DModel that unet.py does not have, with the one value that means the same network.
FIXED = dict(center_input_sample=False, time_embedding_type="positional", time_embedding_dim=None, mid_block_type="UNetMidBlock2D",
             mid_block_scale_factor=1, downsample_type="conv", upsample_type="conv", act_fn="silu", attn_norm_num_groups=None,
             resnet_time_scale_shift="default", add_attention=True, class_embed_type=None, num_class_embeds=None)
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}  # diffusers' names: ours


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder of diffusers, with or without unet/."""
    for place in (folder / "unet", folder):
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (place / name).exists():
                return place / name
    raise InputError(f"{folder}: neither the folder of a run (no options.json) nor one of diffusers (no diffusion_pytorch_model.safetensors or .bin)")


def describe_folder(place: Path, arch: str | None, layout: str) -> dict:
    """`describe` for weights of diffusers in `place`, from the config.json beside them and the scheduler's."""
    def read(file: Path) -> dict:
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file}: diffusers' description of the network cannot be read ({error})") from None

    place = place.resolve()
    folder, file = place.parent if place.name == "unet" else place, place / "config.json"
    c = read(file)
    for part in ("vqvae", "vae"):
        if (folder / part).is_dir():
            raise InputError(f"{folder}: a latent pipeline of diffusers ({part}/); of those only the original .ckpt can be read")
    for key, value in FIXED.items():
        if c.get(key, value) != value:
            raise InputError(f"{file}: {key} is {c[key]!r}; only {value!r} can be read")
    try:
        widths, down, up = c["block_out_channels"], c["down_block_types"], c["up_block_types"]
        attention = [kind == "AttnDownBlock2D" for kind in down]
        expected_up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
        if set(down) - {"DownBlock2D", "AttnDownBlock2D"} or list(up) != expected_up:
            raise InputError(f"{file}: down_block_types {down} and up_block_types {up}; only (Attn)DownBlock2D and their mirror image can be read")
        if any(w % widths[0] for w in widths):
            raise InputError(f"{file}: block_out_channels {widths}; only multiples of the first can be read")
        if not isinstance(c["sample_size"], int):
            raise InputError(f"{file}: sample_size is {c['sample_size']}; only a number (square pictures) can be read")
        config = dict(
            image_size=c["sample_size"], in_channels=c["in_channels"], model_channels=widths[0], out_channels=c["out_channels"],
            num_res_blocks=c["layers_per_block"], attention_resolutions=[2 ** i for i, a in enumerate(attention) if a],
            channel_mult=[w // widths[0] for w in widths], num_heads=1, num_head_channels=c.get("attention_head_dim", 8),
            dropout=c.get("dropout", 0.0), norm_groups=c.get("norm_num_groups", 32), norm_eps=c.get("norm_eps", 1e-5),
            flip_sin_to_cos=c.get("flip_sin_to_cos", True), freq_shift=c.get("freq_shift", 0), downsample_padding=c.get("downsample_padding", 1))
    except (KeyError, TypeError) as error:
        raise InputError(f"{file}: does not describe a UNet2DModel of diffusers ({type(error).__name__}: {error})") from None
    schedules = [s for s in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json") if s.exists()]
    if schedules:
        schedule = _diffusers_schedule(read(schedules[0]), schedules[0])
    elif arch in ARCHITECTURES:
        schedule = ARCHITECTURES[arch]["schedule"]
    elif arch is not None:
        schedule = read_json(arch).get("schedule", LINEAR)
    else:
        raise InputError(f"{folder}: no scheduler_config.json that says with which schedule it was trained; add --arch ddpm256 (linear) "
                         "or --arch FILE.json")
    return dict(network="UNet", config=config, schedule=schedule, layout=layout)


def _diffusers_schedule(s: dict, file: Path) -> dict:
    for key, values in dict(beta_schedule=list(BETA_SCHEDULES), prediction_type=["epsilon"], trained_betas=[None], rescale_betas_zero_snr=[False]).items():
        if s.get(key, values[0]) not in values:
            raise InputError(f"{file}: {key} is {s[key]!r}; only {' or '.join(map(repr, values))} can be read")
    return dict(name=BETA_SCHEDULES[s.get("beta_schedule", "linear")], timesteps=s.get("num_train_timesteps", 1000),
                beta_start=s.get("beta_start", 1e-4), beta_end=s.get("beta_end", 0.02))
