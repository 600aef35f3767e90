"""The options of train_tan.py: the paper's numbers, and what suits small sources and latents instead."""

import dataclasses
import math
from pathlib import Path

import domains
from checkpoints import run_folder
from checkpoints.load import BUILT_IN
from checkpoints.network import Network
from classifier import AUGMENTATIONS
from plumbing import distributed
from plumbing.options import InputError, at_least, option, positive

METHODS = {
    "tan": "all of the paper: adaptors, similarity guidance, adversarial noise (Eq. 9)",
    "guided": "TAN without adversarial noise (Eq. 6)",
    "adaptor": "adaptors alone (Eq. 1)",
    "finetune": "all weights (Eq. 1)",
    "pa": "all weights with the pairwise losses of DDPM-PA (Zhu et al. 2022)",
}


@dataclasses.dataclass
class Options:
    target: str = option("sunglasses", f"what to adapt to: {', '.join(domains.TARGETS)}, or a folder of about ten pictures")
    source: str | None = option(None, f"what to adapt: {', '.join(BUILT_IN)}, a file of weights or a folder of diffusers (default: the source of a "
                                "built-in target, else toyfaces)")
    arch: str | None = option(None, "network of a published file whose shapes do not show it (python -m checkpoints lists them), or a JSON file", metavar="NAME")
    method: str = option("tan", "; ".join(f"{name}: {text}" for name, text in METHODS.items()), choices=list(METHODS))
    output_dir: str = option("", "where the run goes (default: runs/TARGET; -SOURCE is added for a built-in target from another source, -METHOD for the other methods)")
    resume: bool = option(False, "continue the run in --output-dir (or of this target and method); its own options hold")
    overwrite: bool = option(False, "replace the run in --output-dir")

    iterations: int = option(300, "updates of psi", group="training")
    batch_size: int = option(40, "pictures an iteration, over all processes", group="training")
    micro_batch_size: int | None = option(None, "pictures at once on a device, to save memory (default: all)", group="training")
    learning_rate: float = option(5e-5, "of Adam", group="training")
    warmup: int = option(0, "iterations of linear warm-up", group="training")
    ema: float = option(0.99, "decay of the running average of the weights that is used in the end (less at the start)", group="training")
    flip: bool = option(True, "mirror half of the pictures", group="training")
    adaptor_width: int | None = option(None, "channels d of the adaptors (default: near the paper's parameter rate)", group="training")
    precision: str = option("fp32", "fp32, or bf16 autocast", choices=["fp32", "bf16"], group="training")
    checkpoint_blocks: bool = option(False, "recompute activations instead of storing them: less memory, more time", group="training")
    seed: int = option(0, "seed of everything random", group="training")
    device: str = option("auto", "auto, cpu, cuda or mps", group="training")

    gamma: float = option(5.0, "strength of the guidance", group="similarity-guided training (Eq. 6)")
    guidance_power: int = option(2, "power of sigma_hat before the gradient: 2 as printed, 1 as derived from Eqs. 2-3",
                                 choices=[1, 2], group="similarity-guided training (Eq. 6)")
    guidance_below: int | None = option(None, "guide only at timesteps below this (default: at all)", group="similarity-guided training (Eq. 6)")
    classifier: str | None = option(None, "what the classifier starts from: a file, 'encoder' (of the source U-Net) or 'scratch' "
                                    "(default: the built-in one where it fits, else the encoder)", group="similarity-guided training (Eq. 6)")
    classifier_arch: str | None = option(None, "network of a published classifier file: imagenet256-classifier, or a JSON file",
                                         metavar="NAME", group="similarity-guided training (Eq. 6)")
    classifier_batch_size: int = option(40, "pictures a step of its fine-tuning, half source and half target",
                                        group="similarity-guided training (Eq. 6)")
    classifier_iterations: int = option(300, "steps of its fine-tuning", group="similarity-guided training (Eq. 6)")
    classifier_learning_rate: float = option(1e-4, "its learning rate", group="similarity-guided training (Eq. 6)")
    classifier_check: bool = option(True, "train one with a fifth of the pictures held out first, to see whether guidance means anything",
                                    group="similarity-guided training (Eq. 6)")
    source_images: str | None = option(None, "pictures of the source for the classifier: a folder or a built-in source (default: drawn "
                                       "for a built-in source, else sampled from the source model)", group="similarity-guided training (Eq. 6)")
    source_count: int = option(256, "how many of them", group="similarity-guided training (Eq. 6)")
    classifier_targets: str | None = option(None, "more pictures of the target, for the classifier alone: a folder (default: those that are adapted to)",
                                            group="similarity-guided training (Eq. 6)")
    augment: tuple[str, ...] | None = option(None, "changes of the classifier's pictures that keep the domain: flip, shift, colour (default: "
                                             "flip and shift, for built-in targets what suits)", choices=AUGMENTATIONS,
                                             group="similarity-guided training (Eq. 6)")

    omega: float = option(0.02, "rate of the gradient ascent", group="adversarial noise (Eq. 8)")
    pgd_steps: int = option(10, "its steps J", group="adversarial noise (Eq. 8)")
    pgd_network: str = option("current", "network whose worst noise is sought: current (theta and psi), or source (theta alone, as "
                              "Eq. 10 prints)", choices=["current", "source"], group="adversarial noise (Eq. 8)")

    pairwise_weights: tuple[float, ...] = option((4.0, 4.0, 1.0), "of the similarities of pictures, of those of their detail, and of the detail itself; the "
                                                 "default is that of the authors' later release", group="pairwise losses (--method pa)")

    samples: int = option(32, "pictures in samples.png (0: no pictures)", group="pictures")
    sample_steps: int = option(50, "DDIM steps for them", group="pictures")
    previews: int = option(5, "rows of progress.png after the first", group="pictures")
    save_every: int = option(25, "iterations between checkpoints", group="pictures")


# The paper's settings, above, are for 256x256 networks.  What suits small ones (64 pixels and less), chosen on babies:
SMALL = dict(iterations=80, batch_size=16, learning_rate=2e-3, adaptor_width=8)


SMALL_GUIDED = dict(classifier_iterations=150)


SMALL_FINETUNE = dict(iterations=80, batch_size=16, learning_rate=3e-4)  # all weights at once: smaller steps than for fresh adaptors


SMALL_PA = dict(pairwise_weights=(0.5, 0.5, 0.05))  # where the release's do worse


CHURCHES = dict(iterations=320)  # instead, for the targets of toychurches, where nearly every pixel changes; chosen on haunted-houses, seed 100


LATENT = dict(learning_rate=1e-5)  # the paper's, for published latent models


def suited(options: Options, source: Network) -> dict:
    """What stands in for the paper's settings with this source, target and method: {option: value}."""
    if source.image_size > 64:
        return LATENT if source.first_stage else {}
    small = SMALL_FINETUNE if options.method in run_folder.ALL_WEIGHTS else SMALL
    more = {"guided": SMALL_GUIDED, "tan": SMALL_GUIDED, "pa": SMALL_PA}.get(options.method, {})
    return small | more | (CHURCHES if domains.TARGETS.get(options.target) == "toychurches" else {})


def check(options: Options, out: Path) -> None:
    """InputError for a number that makes no sense or an --output-dir that would be written among somebody's pictures."""
    at_least(options, iterations=0, batch_size=distributed.world(), micro_batch_size=1, warmup=0, seed=0, adaptor_width=1, pgd_steps=0,
                 classifier_batch_size=2, classifier_iterations=1, source_count=1, samples=0, sample_steps=1, previews=1, save_every=1)
    positive(options, "learning_rate", "classifier_learning_rate")
    if len(options.pairwise_weights) != 3 or not all(0 <= w < math.inf for w in options.pairwise_weights):
        raise InputError(f"--pairwise-weights {' '.join(map(str, options.pairwise_weights))}: must be three numbers of at least 0")
    if not 0 <= options.ema < 1:
        raise InputError(f"--ema {options.ema}: must be at least 0 and below 1")
    for share in {options.batch_size // distributed.world(), -(-options.batch_size // distributed.world())} if options.method == "pa" else ():
        micro = options.micro_batch_size or share
        if 1 in (share, micro, share % micro):
            raise InputError("--method pa compares pictures with each other: --batch-size and --micro-batch-size must leave each process at least 2 at once, "
                             "in the last micro-batch, too")
    own = domains.drawn_by(options.source)
    if own and options.target in domains.TARGETS and domains.TARGETS[options.target] != own:
        raise InputError(f"--target {options.target}: a target of {domains.TARGETS[options.target]}, not of {own}; leave --source out, or choose among "
                         f"{', '.join(target for target, of in domains.TARGETS.items() if of == own)}")
    for folder in (options.target, options.source_images, options.classifier_targets):
        if folder and Path(folder).is_dir() and Path(folder).resolve() == out.resolve():
            raise InputError(f"--output-dir {out}: is the folder of the pictures; choose another one")
