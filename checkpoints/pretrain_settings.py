"""The options of pretrain.py: the network, what it learns from, how it learns."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import domains
from baselines.gan_training import check_groups
from plumbing import distributed
from plumbing.files import load_checkpoint
from plumbing.options import (
    InputError,
    Positional,
    Unset,
    at_least,
    below,
    check_seed,
    flag,
    flat,
    positive,
)
from plumbing.picture_folder import name_of
from plumbing.training import cosine_decay, warmup


@dataclasses.dataclass
class Data:
    """What it learns from."""

    size: int = 32
    """Pixels per side."""
    images: int = 20_000
    """How many pictures of a built-in domain to draw."""
    flip: bool = False
    """Mirror half of the pictures."""


@dataclasses.dataclass
class Shape:
    """The network."""

    channels: int = 32
    """Channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 3)
    """Channels of each level, in multiples of the first."""
    res_blocks: int = 1
    """Residual blocks a level."""
    attention: tuple[int, ...] = (4,)
    """Downsampling factors at which there is attention."""
    head_channels: int = 32
    """Width of an attention head."""
    norm_groups: int = 8
    """Groups of each group norm (32 in published networks)."""


@dataclasses.dataclass
class Latent:
    """Latent diffusion."""

    first_stage: Unset[str] = None
    """Train the U-Net on the latents of this file."""
    latent_channels: int = 4
    """Of a first stage."""
    codes: int = 512
    """Entries in the codebook of a vq."""
    kl_weight: float = 1e-6
    """Of the loss of a kl."""
    perceptual: Literal["none", "squeeze", "alex", "vgg"] = "none"
    """Add LPIPS over this network to the loss of a first stage."""
    perceptual_weight: float = 1.0
    """Of LPIPS, beside the mean absolute error."""
    lpips_backbone: Unset[str] = None
    """File of torchvision's weights for --perceptual (default: that of torch hub's cache)."""
    download: bool = False
    """Fetch these weights from their publisher if they are missing."""


@dataclasses.dataclass
class Adversarial:
    """A StyleGAN2; its channels double level by level, up to the largest of --channel-mult."""

    style_dim: int = 64
    """Numbers in z and w."""
    mapping_layers: int = 4
    """From z to w."""
    r1: float = 1.0
    """Weight of the R1 penalty on the discriminator (larger pictures need more: 10 at 256 pixels)."""
    r1_every: int = 16
    """Iterations between its computations."""
    path_length: float = 0.0
    """Weight of the path length penalty on the generator; 0: none."""


@dataclasses.dataclass
class Training:
    """How it learns."""

    iterations: int = 10_000
    """Training steps."""
    batch_size: int = 40
    """Pictures a step, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW (of a stylegan2: Adam), decayed to 0 by half a cosine."""
    warmup: int = 200
    """Iterations of linear warm-up."""
    ema: float = 0.999
    """Decay of the average of the weights that is saved."""
    p2: float = 0.0
    """Of a unet: exponent of the weight (1 - alpha_bar_t)^p2 of a picture's loss (P2, Choi et al. 2022).
    With 1 the noisy timesteps, which decide on what is where, count most; with 0 all count alike."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: Unset[int] = None
    """CPU threads (default: all)."""
    seed: int = 0
    """Seed of everything random."""
    save_every: int = 500
    """Iterations between checkpoints and sample grids."""


@dataclasses.dataclass
class Options:
    """A run of pretrain.py."""

    source: Positional[str]
    """Built-in domain or folder of images."""
    network: Literal["unet", "classifier", "judge", "kl", "vq", "stylegan2"] = "unet"
    """What to train."""
    output_dir: Unset[str] = None
    """Where the run goes (default: runs/pretrain-SOURCE, with -latent or -NETWORK)."""
    resume: bool = False
    """Continue the run in --output-dir from its checkpoint, with the same flags but for --iterations,
    --learning-rate, --p2, --save-every, --device and --threads."""
    overwrite: bool = False
    """Replace the run in --output-dir."""
    data: Data = dataclasses.field(default_factory=Data)
    shape: Shape = dataclasses.field(default_factory=Shape)
    latent: Latent = dataclasses.field(default_factory=Latent)
    adversarial: Adversarial = dataclasses.field(default_factory=Adversarial)
    training: Training = dataclasses.field(default_factory=Training)


MAY_CHANGE = {"output_dir", "resume", "overwrite", "iterations", "learning_rate", "p2", "save_every",
              "device", "threads", "download"}
CLASSIFIERS = {"classifier", "judge"}  # networks that learn attributes, which mirroring would change


def folder_of(options: Options) -> Path:
    """--output-dir, or by default runs/pretrain-SOURCE, with -latent or -NETWORK."""
    if options.output_dir:
        return Path(options.output_dir)
    kind = "" if options.network == "unet" else f"-{options.network}"
    if options.latent.first_stage:
        kind = "-latent"
    return Path("runs") / f"pretrain-{name_of(options.source)}{kind}"


def check(options: Options, typed: frozenset[str]) -> None:
    """InputError for numbers that make no sense and for flags that the network does not use."""
    if options.network in CLASSIFIERS and options.source not in domains.SOURCES:
        raise InputError(f"--network {options.network} learns attributes, which only drawn domains have: "
                         f"{', '.join(domains.SOURCES)}")
    judged = len(domains.family(options.source)) if options.network == "judge" else 1
    at_least(options, size=8, images=judged, channels=1, channel_mult=1, res_blocks=1, head_channels=1,
             norm_groups=1, latent_channels=1, codes=1, kl_weight=0, perceptual_weight=0, iterations=1,
             batch_size=distributed.world(), warmup=0, ema=0, threads=1, save_every=1, style_dim=1,
             mapping_layers=1, r1=0, r1_every=1, path_length=0, p2=0)
    below(options, ema=1)
    positive(options, "learning_rate")
    check_seed(options)
    if not options.shape.channel_mult:
        raise InputError("--channel-mult: give at least one")
    factors = [2 ** level for level in range(len(options.shape.channel_mult))]
    if "attention" in typed and set(options.shape.attention) - set(factors):
        raise InputError(f"--attention {' '.join(map(str, options.shape.attention))}: this network halves "
                         f"the size to factors of {', '.join(map(str, factors))} (--channel-mult); choose "
                         "among them")
    if options.data.flip and options.network in CLASSIFIERS:
        raise InputError("--flip: a mirrored picture has other attributes, which --network "
                         f"{options.network} learns; leave it out")
    layered = ("unet", "kl", "vq", *CLASSIFIERS)
    users = {**dict.fromkeys(flat(options.adversarial), ("stylegan2",)),
             **dict.fromkeys(("res_blocks", "norm_groups", "precision"), layered),
             **dict.fromkeys(("attention", "head_channels"), ("unet", *CLASSIFIERS)),
             **dict.fromkeys(("latent_channels", "perceptual", "perceptual_weight", "lpips_backbone",
                              "download"), ("kl", "vq")),
             "codes": ("vq",), "kl_weight": ("kl",), "p2": ("unet",)}
    for name, networks in users.items():
        if name in typed and options.network not in networks:
            raise InputError(f"{flag(name)}: --network {options.network} does not use it; leave it out")
    for name in ("perceptual_weight", "lpips_backbone", "download"):
        if name in typed and options.latent.perceptual == "none":
            raise InputError(f"{flag(name)}: is for --perceptual; give that, too")
    if options.network in layered and options.shape.channels % options.shape.norm_groups:
        raise InputError(f"--channels {options.shape.channels}: must be a multiple of --norm-groups, "
                         f"{options.shape.norm_groups}")
    if "images" in typed and options.source not in domains.SOURCES:
        raise InputError("--images: is how many to draw of a built-in domain; of a folder all are taken")
    if options.network == "stylegan2":
        check_groups(options.training.batch_size)


def resumed(out: Path, options: Options) -> dict[str, Any]:
    """The state to go on from; InputError for a flag that is not as it was when the run in `out` began."""
    state = load_checkpoint(out / "checkpoint.pt", options.training.iterations)
    known = state.get("options", {})
    for name, wanted in flat(options).items():
        if name in known and name not in MAY_CHANGE and wanted != known[name]:
            given = "source" if name == "source" else flag(name)
            raise InputError(f"{given} {wanted}: the run in {out} has {known[name]}; --resume takes the same "
                             "flags")
    return state


def check_content(out: Path, options: Options, state: dict[str, Any], content: dict[str, Any]) -> None:
    """InputError if this content is not what it was when the run in `out` began.

    content   `pictures`, how many there are, and `first_stage`, a hash of its weights or None
    """
    of = dict(pictures=options.source, first_stage=f"--first-stage {options.latent.first_stage}")
    for name, value in content.items():
        if state.get(name, value) != value:
            raise InputError(f"{of[name]}: is not what it was when the run in {out} began; start anew with "
                             "--overwrite or another --output-dir")


def learning_rate(training: Training, iteration: int) -> float:
    """AdamW's in an iteration, from 0."""
    decay = cosine_decay(iteration, training.iterations)
    return training.learning_rate * warmup(iteration, training.warmup) * decay
