"""Pre-train a source: a DDPM on a built-in domain or your own pictures, or a built-in domain's classifiers.

  python pretrain.py toyfaces                          a model like that of --source toyfaces; how each file
                                                       of assets/ was made: docs/built-in-weights.md
  python pretrain.py photos/ --size 64 --channels 64   a DDPM of your own pictures
  python pretrain.py toyfaces --network classifier     learns the attributes of noised source pictures: the
                                                       built-in analogue of the ImageNet classifier that
                                                       guidance starts from
  python pretrain.py toyfaces --network judge          learns attributes and domain of clean pictures of the
                                                       source and all its targets: evaluate.py counts with
                                                       it, nothing is trained with it
  python pretrain.py photos/ --size 256 --network kl   a first stage of latent diffusion (or vq)
  python pretrain.py photos/ --size 256 --first-stage runs/pretrain-photos-kl/model.safetensors
                                                       a DDPM on the latents of this first stage
  python pretrain.py toyfaces --network stylegan2      a GAN, the source of the paper's GAN baselines

Leaves in runs/pretrain-NAME/: model.safetensors (averaged weights, architecture in its metadata),
samples.png as training goes, metrics.jsonl, loss.png and checkpoint.pt, from which --resume goes on exactly.
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import domains
from autoencoder import LOSS_WEIGHTS, first_stage_loss
from baselines.gan_training import Plain, Players, check_groups, play
from checkpoints import gan
from checkpoints.network import FIRST_STAGES, Network, save_network
from checkpoints.perceptual import load_lpips
from checkpoints.untrained import Adversarial, Latent, Shape, new_network
from classifier import guided_loss
from ddpm import predict_eps
from domains.judge import attribute_loss
from plumbing import distributed, progress
from plumbing.figures import save_curve
from plumbing.files import load_checkpoint, read_metrics, remove_unfinished
from plumbing.options import (
    InputError,
    Positional,
    Unset,
    at_least,
    below,
    check_seed,
    flag,
    flat,
    parse,
    positive,
    run,
)
from plumbing.picture_folder import ImageFolder, keep_apart
from plumbing.pictures import save_grid, to_tensor
from plumbing.seeds import generator
from plumbing.training import EMA, Loop, cosine_decay, warmup

Batch = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From indices (B,) to images (B, 3, H, W), and labels (B, attributes) where there are some."""


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
    """Continue the run in --output-dir from its checkpoint, with the same flags."""
    overwrite: bool = False
    """Replace the run in --output-dir."""
    data: Data = dataclasses.field(default_factory=Data)
    shape: Shape = dataclasses.field(default_factory=Shape)
    latent: Latent = dataclasses.field(default_factory=Latent)
    adversarial: Adversarial = dataclasses.field(default_factory=Adversarial)
    training: Training = dataclasses.field(default_factory=Training)


MAY_CHANGE = {"output_dir", "resume", "overwrite", "iterations", "learning_rate", "device", "threads",
              "save_every"}
CLASSIFIERS = {"classifier", "judge"}  # networks that learn attributes, which mirroring would change


def check(options: Options, typed: frozenset[str]) -> None:
    """InputError for numbers that make no sense and for flags that the network does not use."""
    judged = len(domains.family(options.source)) if options.network == "judge" else 1
    at_least(options, size=8, images=judged, channels=1, channel_mult=1, res_blocks=1, head_channels=1,
             norm_groups=1, latent_channels=1, codes=1, kl_weight=0, perceptual_weight=0, iterations=1,
             batch_size=distributed.world(), warmup=0, ema=0, threads=1, save_every=1, style_dim=1,
             mapping_layers=1, r1=0, r1_every=1, path_length=0)
    below(options, ema=1)
    positive(options, "learning_rate")
    check_seed(options)
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
             **dict.fromkeys(("latent_channels", "perceptual", "perceptual_weight", "lpips_backbone"),
                             ("kl", "vq")),
             "codes": ("vq",), "kl_weight": ("kl",)}
    for name, networks in users.items():
        if name in typed and options.network not in networks:
            raise InputError(f"{flag(name)}: --network {options.network} does not use it; leave it out")
    for name in ("perceptual_weight", "lpips_backbone"):
        if name in typed and options.latent.perceptual == "none":
            raise InputError(f"{flag(name)}: is for --perceptual; give that, too")
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


def attributes_of(source: str, network: str) -> dict[str, list[str]]:
    """What there is to tell of a built-in source: attributes and their values; of the rest nothing."""
    found = {name: list(values) for name, values in domains.ATTRIBUTES.get(source, {}).items()}
    return found | (dict(domain=domains.family(source)) if network == "judge" else {})


def untrained(options: Options) -> Network | gan.GAN:
    """The network to train; InputError if the flags describe none."""
    torch.manual_seed(options.training.seed)
    command = shlex.join(["python", "pretrain.py", *(word for word in sys.argv[1:] if word != "--resume")])
    return new_network(options.network, options.data.size, options.shape, options.latent, options.adversarial,
                       attributes_of(options.source, options.network), command)


def load_pictures(options: Options) -> tuple[Batch, int, Callable[[Iterable[list[int]]], None] | None]:
    """The pictures to learn from, how many there are, and what may be told which will be asked for.

    Those of a folder have no labels.
    """
    size, network = options.data.size, options.network
    if options.source in domains.SOURCES:
        draw = domains.draw_family if network == "judge" else domains.draw
        drawn = draw(options.source, options.data.images, options.training.seed, size,
                     distributed.rank() == 0)
        pixels, labels = (torch.from_numpy(values) for values in drawn)
        return (lambda indices: (to_tensor(pixels[indices]), labels[indices])), len(pixels), None
    if network in CLASSIFIERS:
        raise InputError(f"--network {network} learns attributes, which only built-in sources have: "
                         f"{', '.join(domains.SOURCES)}")
    folder = ImageFolder(options.source, size, recursive=True, skip=True)
    return (lambda indices: (folder.batch(indices), None)), len(folder), folder.read_ahead


def encode_all(batch_of: Batch, n: int, network: Network, flip: bool, device: torch.device) -> Tensor:
    """Latents of all n pictures on the CPU, with `flip` those of their mirror images after them.

    Their shape is (n, C, H, W), or (2n, C, H, W) with `flip`.
    Sets the scale factor that gives them unit variance.
    """
    parts = [(mirrored, indices) for mirrored in ((False, True) if flip else (False,))
             for indices in torch.arange(n).split(64)]
    latents = []
    for mirrored, indices in progress.bar(parts, "latents"):
        images = batch_of(indices)[0]
        latents.append(network.encode((images.flip(3) if mirrored else images).to(device)).cpu())
    unscaled = torch.cat(latents)
    network.scale_factor = network.description["scale_factor"] = 1 / unscaled.std().item()
    return unscaled * network.scale_factor


def first_stage_objective(latent: Latent, device: torch.device) -> Callable[..., tuple[Tensor, dict]]:
    """`first_stage_loss` as --kl-weight and --perceptual want it.  InputError as load_lpips raises it."""
    distance = None
    if latent.perceptual != "none":
        distance = load_lpips(latent.perceptual, latent.lpips_backbone).to(device)
    weights = dict(LOSS_WEIGHTS, kl=latent.kl_weight, perceptual=latent.perceptual_weight)
    return functools.partial(first_stage_loss, weights=weights, perceptual=distance)


def losses_of(network: Network, x0: Tensor, labels: Tensor | None, t: Tensor, eps: Tensor,
              of_first_stage: Callable[..., tuple[Tensor, dict]]) -> Tensor:
    """What is descended, for each picture.

    x_0 (B, ...), labels (B, attributes), t (B,), eps like x_0 or the latents -> (B,)
    """
    model = network.model
    if network.description["network"] in FIRST_STAGES:
        loss, _ = of_first_stage(model, x0, eps)
        return loss.expand(len(x0))
    xt = network.schedule.add_noise(x0, t, eps)
    if "attributes" in network.description:
        return attribute_loss(model(xt, t).float(), labels, network.description["attributes"])
    return guided_loss(eps, predict_eps(model, xt, t, network.schedule), guidance=0.0)              # Eq. 1


def latent_shape(network: Network, x0: Tensor) -> tuple[int, ...]:
    """Of the noise that a picture is trained with: x_0's, or for a first stage that of its latent."""
    if network.description["network"] not in FIRST_STAGES:
        return tuple(x0.shape[1:])
    return network.model.embed_dim, *(side // network.model.factor for side in x0.shape[2:])


@torch.no_grad()
def show(out: Path, network: Network, ema: EMA, images: Tensor) -> None:
    """model.safetensors (of the running average), samples.png and loss.png.

    A first stage shows what becomes of these pictures (N, 3, H, W).
    """
    if distributed.rank() != 0:
        return
    model = network.model
    ema.swap()
    save_network(out / "model.safetensors", network)
    model.eval()
    if network.description["network"] in ("UNet", gan.NAME):
        save_grid(out / "samples.png", network.sample(range(64)), columns=16)
    elif network.description["network"] in FIRST_STAGES:  # pictures above, what comes back below
        device = next(model.parameters()).device
        decoded = model.decode(model.encode(images.to(device))).cpu()
        save_grid(out / "samples.png", torch.cat([images, decoded]), columns=len(images))
    model.train()
    ema.swap()
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    save_curve(out / "loss.png", losses, "loss", smooth=100)


def learning_rate(training: Training, iteration: int) -> float:
    """AdamW's in an iteration, from 0."""
    decay = cosine_decay(iteration, training.iterations)
    return training.learning_rate * warmup(iteration, training.warmup) * decay


def prepare(out: Path, old: list[Path]) -> None:
    """Make the folder, without what a killed process left half written and without these old files."""
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out)
        for file in old:
            file.unlink(missing_ok=True)
    distributed.barrier()


def train_gan(out: Path, options: Options, network: gan.GAN, batch_of: Batch, n: int,
              state: dict[str, Any] | None, device: torch.device) -> None:
    """The iterations of a StyleGAN2 on n pictures."""
    training, wanted = options.training, options.adversarial
    b, players = training.batch_size, Players(
        network.model.train(), network.discriminator.train(), Plain(), training.batch_size,
        training.learning_rate, wanted.r1, wanted.r1_every, wanted.path_length)
    ema = EMA(players.drawing, training.ema)

    def after(done: int, saved: bool) -> None:
        if saved or done == training.iterations:
            show(out, network, ema, torch.empty(0))

    def real_pictures(g: torch.Generator) -> Tensor:
        indices = torch.randint(n, (b,), generator=g)[players.mine]
        mirrored = torch.rand(b, 1, 1, 1, generator=g)[players.mine] < 0.5
        images = batch_of(indices)[0]
        return torch.where(mirrored & options.data.flip, images.flip(3), images)

    loop = Loop(out, options.network, training.iterations, training.save_every, b,
                players.parameters, players.optimizer, ema, functools.partial(learning_rate, training),
                device, state, dict(options=flat(options), gan=players.state), after, also=players.load)
    play(loop, players, ema, real_pictures, training.seed)
    distributed.cleanup()


def main() -> None:
    options, typed = parse(Options, __doc__)
    training = options.training

    # What is trained, on what.  All that can be wrong is found out before anything is written.
    kind = "" if options.network == "unet" else f"-{options.network}"
    if options.latent.first_stage:
        kind = "-latent"
    out = Path(options.output_dir or f"runs/pretrain-{Path(options.source).name}{kind}")
    device = distributed.setup(training.device)
    files = [out / "checkpoint.pt", out / "model.safetensors"]
    if any(file.exists() for file in files) and not (options.resume or options.overwrite):
        raise InputError(f"{out}: holds a run already; continue it with --resume, replace it with "
                         "--overwrite, or choose --output-dir")
    keep_apart(out, options.source)
    check(options, typed)
    if training.threads:
        torch.set_num_threads(training.threads)
    state = resumed(out, options) if options.resume else None
    network, of_first_stage = untrained(options), first_stage_objective(options.latent, device)
    batch_of, n, read_ahead = load_pictures(options)
    shown = batch_of(torch.arange(min(16, n)))[0]
    network.to(device)
    latents = encode_all(batch_of, n, network, options.data.flip, device) if network.first_stage else None

    prepare(out, [] if state else files)
    weights = sum(value.numel() for value in network.state_dict().values())
    distributed.say(f"{n} pictures of {options.source} at {options.data.size}x{options.data.size}; "
                    f"{weights / 1e6:.2f} M weights; {device}, "
                    f"{training.precision}; up to iteration {training.iterations}; {out}/")
    if options.network == "stylegan2":
        return train_gan(out, options, network, batch_of, n, state, device)
    model, schedule, b = network.model.train(), network.schedule, training.batch_size
    parameters = list(model.parameters())
    # The judge need bear little noise.
    noisiest = schedule.timesteps // 20 if options.network == "judge" else schedule.timesteps
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    ema = EMA(parameters, training.ema)

    def after(done: int, saved: bool) -> None:
        if saved or done == training.iterations:
            show(out, network, ema, shown)

    loop = Loop(out, options.network, training.iterations, training.save_every, b, parameters, optimizer, ema,
                functools.partial(learning_rate, training), device, state, dict(options=flat(options)), after)
    mine = distributed.share(b)

    def chosen(iteration: int) -> tuple[torch.Generator, Tensor]:
        """Pictures of an iteration, and the generator of what else is random in it."""
        g = generator(training.seed, iteration)                            # every rank draws the global batch
        return g, torch.randint(n, (b,), generator=g)[mine]

    if read_ahead and latents is None:
        read_ahead(chosen(iteration)[1].tolist() for iteration in range(loop.start, training.iterations))
    for iteration in loop:
        g, indices = chosen(iteration)
        t = torch.randint(noisiest, (b,), generator=g)[mine].to(device)
        mirrored = (torch.rand(b, generator=g)[mine] < 0.5) & options.data.flip
        if latents is None:
            x0, labels = batch_of(indices)
            if options.data.flip:
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        else:
            x0, labels = latents[indices + n * mirrored], None
        eps = torch.randn(b, *latent_shape(network, x0), generator=g)[mine]
        x0, eps = x0.to(device), eps.to(device)
        labels = None if labels is None else labels.to(device)

        with distributed.autocast(device, training.precision):
            loss = losses_of(network, x0, labels, t, eps, of_first_stage).sum() / b
        loss.backward()
        distributed.sum_gradients(parameters)
        total = distributed.sum_over_ranks(loss.detach().clone()).item()
        gradient_norm = loop.check(total, "go on with --resume and a lower --learning-rate")
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, torch.tensor(gradient_norm))
        optimizer.step()
        ema.update()
        loop.record(loss=total, gradient_norm=gradient_norm)
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
