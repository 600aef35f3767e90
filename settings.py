"""The options of train_tan.py: what a method uses, the paper's numbers, what suits other sources instead."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

import domains
from adaptor import FORMS
from checkpoints.load import BUILT_IN, title_of
from checkpoints.network import Network
from classifier import AUGMENTATIONS
from plumbing import distributed
from plumbing.board import need_tensorboard
from plumbing.options import (
    InputError,
    Unset,
    at_least,
    below,
    check_seed,
    finite,
    flag,
    flat,
    positive,
    replace,
)
from plumbing.picture_folder import name_of
from plumbing.shell import command


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method uses of the paper."""

    text: str
    loss: str                           # the equation it descends
    adaptors: bool = True               # psi learns beside a frozen theta (section 4.3); else all of theta
    guidance: bool = False              # the classifier corrects the noise target (Eqs. 5, 6)
    adversarial_noise: bool = False     # the noise that is denoised worst (Eqs. 7, 8, 10)
    pairwise_losses: bool = False       # DDPM-PA (Zhu et al. 2022)


METHODS = {
    "tan": Method("all of the paper", "Eq. 9", guidance=True, adversarial_noise=True),
    "guided": Method("TAN without adversarial noise", "Eq. 6", guidance=True),
    "adaptor": Method("adaptors alone", "Eq. 1"),
    "finetune": Method("all weights", "Eq. 1", adaptors=False),
    "pa": Method("all weights with the losses of DDPM-PA", "Eq. 1 and pairwise", adaptors=False,
                 pairwise_losses=True),
}


@dataclasses.dataclass
class GuidanceOptions:
    """Similarity-guided training (Eqs. 5, 6)."""

    gamma: float = 5.0
    """Strength of the guidance."""
    guidance_fade: Unset[float] = None
    """Share of the run over which gamma falls to 0; 0: it stays, as printed.
    Default: 0; 0.5 for a small source."""
    guidance_limit: Unset[float] = None
    """Longest guidance of a picture, as a share of eps - eps_theta, what is left to learn (default: none)."""
    guidance_power: Literal[1, 2] = 2
    """Power of sigma_hat before the gradient: 2 as printed, 1 as derived from Eqs. 2-3."""
    guidance_below: Unset[int] = None
    """Guide only at timesteps below this (default: at every timestep)."""
    classifier: Unset[str] = None
    """What the classifier starts from: a file, 'encoder' (of the source U-Net) or 'scratch'.
    Default: the built-in one where it fits, else the encoder."""
    classifier_arch: Unset[str] = None
    """Network of a published classifier file: imagenet256-classifier, or a JSON file."""
    classifier_batch_size: int = 40
    """Pictures a step of the classifier's fine-tuning, half source and half target."""
    classifier_iterations: Unset[int] = None
    """Steps of the classifier's fine-tuning (default: 300; 100 for a small source)."""
    classifier_learning_rate: float = 1e-4
    """Learning rate of the classifier's fine-tuning."""
    classifier_check: bool = True
    """Train one with a fifth of the pictures held out first, to see whether guidance means anything."""
    source_images: Unset[str] = None
    """Pictures of the source for the classifier: a folder, or a drawn domain.
    Default: drawn for a source that learned drawings, else sampled from the source model."""
    source_count: int = 256
    """How many source pictures the classifier sees."""
    classifier_targets: Unset[str] = None
    """A folder of more pictures of the target, for the classifier alone (default: those adapted to)."""
    augment: Unset[tuple[Literal[AUGMENTATIONS], ...]] = None
    """Changes of the classifier's pictures that keep the domain.
    Default: flip and shift; for built-in targets what suits."""


@dataclasses.dataclass
class AdversarialNoiseOptions:
    """Adversarial noise selection (Eqs. 7, 8, 10)."""

    omega: Unset[float] = None
    """Rate of the gradient ascent (default: 0.02; 0.1 for a small source)."""
    pgd_steps: Unset[int] = None
    """J, the steps of the ascent (default: 10; 2 for a small source)."""
    norm: Unset[Literal["paper", "own"]] = None
    """What Norm gives a noise; paper: mean 0, standard deviation 1; own: those it was drawn with.
    Default: paper; own for a small source."""
    pgd_network: Literal["current", "source"] = "current"
    """Whose worst noise is sought: current (theta and psi), or source (theta alone, as Eq. 10 prints)."""


@dataclasses.dataclass
class PairwiseOptions:
    """DDPM-PA (Zhu et al. 2022), for --method pa."""

    pairwise_weights: Unset[tuple[float, ...]] = None
    """Weights of the three terms: similarities of pictures, those of their detail, error of their detail.
    Default: 4 4 1, the authors' later release; 0.5 0.5 0.05 for a small source."""


@dataclasses.dataclass
class PictureOptions:
    """What a run shows."""

    samples: int = 32
    """Pairs in samples.png (0: no samples, in progress.png neither)."""
    sample_steps: int = 50
    """DDIM steps for them (for progress.png: at most 25)."""
    previews: int = 5
    """Rows of progress.png after the first, and stages that are kept."""


@dataclasses.dataclass
class Options:
    """A run of train_tan.py.  What is None becomes what suits the source and the method: `suited`."""

    target: Annotated[str, tyro.conf.arg(
        help=f"What to adapt to: {', '.join(domains.TARGETS)}, or a folder of about ten pictures.",
    )] = "sunglasses"
    source: Annotated[Unset[str], tyro.conf.arg(
        help=f"What to adapt: {', '.join(BUILT_IN)}, a file of weights, a folder of diffusers or a "
             "name on the Hugging Face Hub, owner/name (default: the source of a built-in target, else "
             "photofaces, photo-like faces at 64x64).",
    )] = None
    arch: Unset[str] = None
    """Network of a published file whose shapes do not show it: a name, or a JSON file.
    The names are listed by python -m checkpoints."""
    recursive: bool = False
    """Take the pictures in subfolders of the target, too."""
    method: Annotated[Unset[Literal[tuple(METHODS)]], tyro.conf.arg(
        help="; ".join(f"{name}: {method.text} ({method.loss})" for name, method in METHODS.items())
             + " (default: tan; adaptor for a small source, where it is measured to be better).",
    )] = None
    paper: bool = False
    """All numbers that the paper states, whatever the source, but psi's share of the parameters, and its
    method, tan, unless another is given; what it leaves open stays as it is here."""
    output_dir: Unset[str] = None
    """Where the run goes (default: runs/TARGET, with -SOURCE for a source that is not the target's usual
    one, and -METHOD where that is given)."""
    resume: bool = False
    """Continue the run in --output-dir, or in the default folder; its own options hold."""
    overwrite: bool = False
    """Replace the run in --output-dir."""
    iterations: Unset[int] = None
    """Updates (default: 300; for a small source 160, for latents of one 320, for the targets of
    toychurches 640)."""
    batch_size: Unset[int] = None
    """Pictures an iteration, over all processes (default: 40; 16 for a small source)."""
    micro_batch_size: Unset[int] = None
    """Pictures at once on a device, to save memory (default: all)."""
    learning_rate: Unset[float] = None
    """Of Adam (default: 5e-5; 1e-5 for latents; for a small source 2e-3, of low-rank 5e-3, of
    scale-shift 4e-2, and 3e-4 without adaptors)."""
    learning_rate_decay: Unset[Literal["none", "cosine"]] = None
    """cosine: down to 0 at the end of the run (default: none; cosine for a small source)."""
    warmup: int = 0
    """Iterations of linear warm-up."""
    ema: float = 0.99
    """Decay of the running average of the weights, which is what is kept in the end; less at the start."""
    flip: bool = True
    """Mirror half of the pictures."""
    adaptor: Literal[tuple(FORMS)] = "bottleneck"
    """What psi is.  bottleneck: a small network beside each residual block; scale-shift: a change of the
    norms, per channel; low-rank: a change of the convolutions (LoRA).  The last two become part of theta in
    the end, and cost nothing in sampling."""
    adaptor_width: Unset[int] = None
    """Channels d of the bottlenecks (default: near the paper's parameter rate; 8 for a small source), or the
    rank of low-rank (default: 4)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast, in a run's networks (first stages: fp32) and in what is later drawn from it."""
    checkpoint_blocks: bool = False
    """Recompute activations instead of storing them: less memory, more time."""
    compile: bool = False
    """Compile the network: for long runs on a GPU, as it takes many minutes; on a CPU it gains nothing."""
    hold_out: int = 0
    """Keep the last so many of the pictures from training: their loss shows at which stage copying begins."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    save_every: int = 25
    """Iterations between checkpoints."""
    tensorboard: bool = False
    """Also write metrics and pictures for TensorBoard, to RUN/tensorboard/ (pip install tensorboard)."""
    guidance: GuidanceOptions = dataclasses.field(default_factory=GuidanceOptions)
    adversarial_noise: AdversarialNoiseOptions = dataclasses.field(default_factory=AdversarialNoiseOptions)
    pairwise_losses: PairwiseOptions = dataclasses.field(default_factory=PairwiseOptions)
    pictures: PictureOptions = dataclasses.field(default_factory=PictureOptions)


# Section 5.2, beside gamma above; taken for networks of more than 64 pixels.  It does not give the
# classifier's iterations; the pairwise weights are those of DDPM-PA's later release.
PAPER = dict(iterations=300, batch_size=40, learning_rate=5e-5, learning_rate_decay="none",
             classifier_iterations=300, guidance_fade=0.0, pgd_steps=10, omega=0.02, norm="paper",
             pairwise_weights=(4.0, 4.0, 1.0))
LATENT = dict(learning_rate=1e-5)
# What suits small networks (64 pixels and less) instead, chosen on babies.
SMALL = dict(iterations=160, batch_size=16, learning_rate_decay="cosine")
SMALL_LATENT = dict(iterations=320)
SMALL_ADAPTORS = {"bottleneck": dict(learning_rate=2e-3, adaptor_width=8),
                  "scale-shift": dict(learning_rate=4e-2),  # few numbers take large steps
                  "low-rank": dict(learning_rate=5e-3)}
SMALL_FINETUNE = dict(learning_rate=3e-4)  # all weights at once take smaller steps
SMALL_GUIDED = dict(classifier_iterations=100, guidance_fade=0.5)
SMALL_ADVERSARIAL = dict(pgd_steps=2, omega=0.1, norm="own")
SMALL_PA = dict(pairwise_weights=(0.5, 0.5, 0.05))
# For the targets of toychurches, where nearly every pixel changes; chosen on haunted-houses.
CHURCHES = dict(iterations=640)


def usual_source(target: str) -> str:
    """What is adapted without --source: of a built-in target its own source, else photo-like faces."""
    return domains.TARGETS.get(target, "photofaces")


def instead_of_paper(options: Options, source: Network) -> dict:
    """What suits this source, target and method where the paper's numbers do not: {option: value}."""
    method = METHODS[options.method]
    if options.paper or not source.small:
        return LATENT if source.first_stage else {}
    return {**SMALL, **(SMALL_LATENT if source.first_stage else {}),
            **(SMALL_ADAPTORS[options.adaptor] if method.adaptors else SMALL_FINETUNE),
            **(SMALL_GUIDED if method.guidance else {}),
            **(SMALL_ADVERSARIAL if method.adversarial_noise else {}),
            **(SMALL_PA if method.pairwise_losses else {}),
            **(CHURCHES if domains.TARGETS.get(options.target) == "toychurches" else {})}


def suited(options: Options, source: Network) -> Options:
    """The options with a number for each that is None: what suits the source, or else the paper's.

    Raises InputError for a run that is resumed and has none: it began with one.
    """
    if options.method is None:
        options = replace(options, method="adaptor" if source.small and not options.paper else "tan")
    asked = flat(options)
    suits = {**PAPER, **instead_of_paper(options, source)}
    filled = {name: value for name, value in suits.items() if asked[name] is None}
    if options.resume and filled:
        raise InputError(f"{folder_of(options)}/options.json: damaged, it has no {', '.join(filled)}")
    return replace(options, **filled)


def used_by(method: str) -> frozenset[str]:
    """The names of the options that a method uses."""
    uses, options = METHODS[method], Options()
    unused = {} if uses.adaptors else {"adaptor": None, "adaptor_width": None}
    for group in ("guidance", "adversarial_noise", "pairwise_losses"):
        if not getattr(uses, group):
            unused |= flat(getattr(options, group))
    return frozenset(flat(options).keys() - unused.keys())


def command_of(options: Options) -> str:
    """The command that makes this run again, its settings spelt out; quoted for the shell."""
    names = used_by(options.method) - {"resume", "overwrite"}
    return command("python train_tan.py", options, names)


def folder_of(options: Options) -> Path:
    """--output-dir, or by default runs/TARGET, with -SOURCE and -METHOD where these are unusual."""
    if options.output_dir:
        return Path(options.output_dir)
    name = name_of(options.target)
    if options.source not in (None, usual_source(options.target)):
        name += f"-{title_of(options.source)}"
    if options.method:
        name += f"-{options.method}"
    return Path("runs") / name


def check(options: Options, typed: frozenset[str], source: Network) -> None:
    """InputError for a flag that the method does not use, a number that makes no sense, a target of another
    source, and an output folder that holds the pictures.
    """
    for name in sorted(typed - used_by(options.method)):
        others = [method for method in METHODS if name in used_by(method)]
        chosen = "" if "method" in typed else ", the default here,"
        raise InputError(f"{flag(name)}: --method {options.method}{chosen} does not use it; leave it out, or "
                         f"give --method {' or '.join(others)}")
    if "classifier_arch" in typed and options.guidance.classifier in (None, "encoder", "scratch"):
        raise InputError("--classifier-arch: says what network the file of --classifier holds; give that, "
                         "too")
    if options.adaptor == "scale-shift" and options.adaptor_width is not None:
        raise InputError("--adaptor-width: --adaptor scale-shift has no width; leave it out")
    at_least(options, iterations=0, batch_size=distributed.world(), micro_batch_size=1, warmup=0,
             adaptor_width=1, save_every=1, ema=0, hold_out=0, samples=0, sample_steps=1, previews=1,
             guidance_below=0, classifier_batch_size=2, classifier_iterations=1,
             source_count=distributed.world(), omega=0, pgd_steps=0, guidance_fade=0, guidance_limit=0,
             pairwise_weights=0)
    below(options, ema=1, adaptor_width=65537, batch_size=1_000_001)
    positive(options, "learning_rate", "classifier_learning_rate")
    finite(options, "gamma")
    check_seed(options)
    if options.guidance.guidance_fade > 1:
        raise InputError(f"--guidance-fade {options.guidance.guidance_fade}: a share of the run is at most 1")
    if options.tensorboard:
        need_tensorboard()
    if options.guidance.classifier_batch_size % 2:
        raise InputError(f"--classifier-batch-size {options.guidance.classifier_batch_size}: must be even, "
                         "half source and half target")
    if len(options.pairwise_losses.pairwise_weights) != 3:
        raise InputError("--pairwise-weights: give three numbers of at least 0")
    if options.pictures.samples:
        source.check_steps(options.pictures.sample_steps, "--sample-steps")
    if METHODS[options.method].pairwise_losses:
        _refuse_lone_pictures(options)
    domains.check_pair(options.source, options.target)
    sources = options.guidance.source_images
    if sources and Path(sources).resolve() == Path(options.target).resolve():
        raise InputError(f"--source-images {sources}: are the target's pictures, from which the classifier "
                         "has to tell the source's; give pictures like those that the source has learnt")
    for pictures, recursive in ((options.target, options.recursive), (options.guidance.source_images, True),
                                (options.guidance.classifier_targets, False)):
        domains.keep_apart(folder_of(options), pictures, recursive)


def compared(options: Options) -> str | None:
    """Which pictures the loss compares with each other, in words; None for a method that compares none."""
    if not METHODS[options.method].pairwise_losses:
        return None
    micro = options.micro_batch_size or options.batch_size
    return f"{distributed.world()} process(es) and micro-batches of {micro}"


def _refuse_lone_pictures(options: Options) -> None:
    """InputError if a picture of --method pa would go through the network alone."""
    world = distributed.world()
    for share in (options.batch_size // world, -(-options.batch_size // world)):
        micro = options.micro_batch_size or share
        if 1 in (share, micro, share % micro):
            raise InputError("--method pa compares pictures with each other: --batch-size and "
                             "--micro-batch-size must leave each process at least 2 at once, in the last "
                             "micro-batch, too")
