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

import functools
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import domains
from autoencoder import LOSS_WEIGHTS, first_stage_loss
from baselines.gan_training import Plain, Players, play
from checkpoints import gan
from checkpoints.network import FIRST_STAGES, Network, digest, save_network
from checkpoints.perceptual import load_lpips
from checkpoints.pretrain_settings import (
    Latent,
    Options,
    check,
    check_content,
    folder_of,
    learning_rate,
    resumed,
)
from checkpoints.untrained import new_network
from classifier import guided_loss
from ddpm import predict_eps
from domains.indexed import Batches, attributes_of, load_pictures
from domains.judge import attribute_loss
from plumbing import distributed, progress
from plumbing.figures import save_curve
from plumbing.files import check_replaceable, read_metrics, remove_unfinished
from plumbing.memory import fitting
from plumbing.options import InputError, flat, parse, run
from plumbing.picture_folder import refuse_pictures
from plumbing.pictures import save_grid
from plumbing.seeds import generator
from plumbing.shell import quoted
from plumbing.training import EMA, Loop

FILES = ("checkpoint.pt", "model.safetensors")  # that make a folder a run
PICTURES = ("samples.png", "loss.png")  # that it has beside them


def untrained(options: Options, state: dict[str, Any] | None) -> Network | gan.GAN:
    """The network to train; InputError if the flags describe none.

    state    from which it goes on; the network names the commands of all its training
    """
    torch.manual_seed(options.training.seed)
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    command = shlex.join(["python", "pretrain.py", *words])
    if state and (before := state.get("made_by")):
        command = before if before.endswith(command) else f"{before}, then {command}"
    return new_network(options.network, options.data.size, options.shape, options.latent, options.adversarial,
                       attributes_of(options.source, options.network == "judge"), command)


def encode_all(batches: Batches, n: int, network: Network, flip: bool, device: torch.device) -> Tensor:
    """Latents of all n pictures on the CPU, with `flip` those of their mirror images after them.

    Their shape is (n, C, H, W), or (2n, C, H, W) with `flip`.
    Sets the scale factor that gives them unit variance.
    """
    parts = [(mirrored, indices) for mirrored in ((False, True) if flip else (False,))
             for indices in torch.arange(n).split(64)]
    latents, pictures = [], batches(indices for _, indices in parts)
    for (mirrored, _), (images, _) in zip(progress.bar(parts, "latents"), pictures):
        latents.append(network.encode((images.flip(3) if mirrored else images).to(device)).cpu())
    unscaled = torch.cat(latents)
    network.scale_factor = network.description["scale_factor"] = 1 / unscaled.std().item()
    return unscaled * network.scale_factor


def first_stage_objective(latent: Latent, device: torch.device) -> Callable[..., tuple[Tensor, dict]]:
    """`first_stage_loss` as --kl-weight and --perceptual want it.  InputError as load_lpips raises it."""
    distance = None
    if latent.perceptual != "none":
        distance = load_lpips(latent.perceptual, latent.lpips_backbone, latent.download).to(device)
    weights = dict(LOSS_WEIGHTS, kl=latent.kl_weight, perceptual=latent.perceptual_weight)
    return functools.partial(first_stage_loss, weights=weights, perceptual=distance)


def losses_of(network: Network, x0: Tensor, labels: Tensor | None, t: Tensor, eps: Tensor,
              of_first_stage: Callable[..., tuple[Tensor, dict]], p2: float) -> Tensor:
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
    losses = guided_loss(eps, predict_eps(model, xt, t, network.schedule), guidance=0.0)            # Eq. 1
    # P2 weighting (Choi et al. 2022): 1 / (1 + SNR)^p2 = (1 - alpha_bar_t)^p2
    return losses * (1 - network.schedule.at(t, losses)) ** p2


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
        shown_as = functools.partial(progress.bar, text="samples")
        drawn = fitting(lambda at_once: network.sample(range(64), batch_size=at_once, progress=shown_as), 64)
        save_grid(out / "samples.png", drawn, columns=16)
    elif network.description["network"] in FIRST_STAGES:  # pictures above, what comes back below
        device = next(model.parameters()).device
        decoded = model.decode(model.encode(images.to(device))).cpu()
        save_grid(out / "samples.png", torch.cat([images, decoded]), columns=len(images))
    model.train()
    ema.swap()
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    save_curve(out / "loss.png", losses, "loss", smooth=100)


def check_place(out: Path, options: Options) -> None:
    """InputError if the folder holds what this run would replace, or pictures."""
    if (out / "options.json").exists():
        raise InputError(f"--output-dir {out}: holds the run of another program; choose another")
    check_replaceable(out, FILES, options.resume, options.overwrite)
    if not any((out / name).exists() for name in FILES):
        refuse_pictures(out)
    domains.keep_apart(out, options.source, recursive=True)


def prepare(out: Path, old: Iterable[str]) -> None:
    """Make the folder, without what a killed process left half written and without these old files."""
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        remove_unfinished(out)
        for name in old:
            (out / name).unlink(missing_ok=True)
    distributed.barrier()


def train_gan(out: Path, options: Options, network: gan.GAN, batches: Batches, content: dict[str, Any],
              state: dict[str, Any] | None, device: torch.device) -> None:
    """The iterations of a StyleGAN2 on content["pictures"] pictures."""
    training, wanted = options.training, options.adversarial
    b = training.batch_size
    players = Players(network.model.train(), network.discriminator.train(), Plain(), b,
                      training.learning_rate, wanted.r1, wanted.r1_every, wanted.path_length)
    ema = EMA(players.drawing, training.ema)

    def after(done: int, saved: bool) -> None:
        if saved:
            show(out, network, ema, torch.empty(0))

    def real_pictures(g: torch.Generator) -> Tensor:
        indices = torch.randint(content["pictures"], (b,), generator=g)[players.mine]
        mirrored = torch.rand(b, 1, 1, 1, generator=g)[players.mine] < 0.5
        images, _ = next(batches([indices]))
        return torch.where(mirrored & options.data.flip, images.flip(3), images)

    keep = dict(content, options=flat(options), gan=players.state)
    loop = Loop(out, options.network, training.iterations, training.save_every, b,
                players.parameters, players.optimizer, ema, functools.partial(learning_rate, training),
                device, state, keep, after, also=players.load)
    play(loop, players, ema, real_pictures, training.seed)
    finish(out, network)


def main() -> None:
    options, typed = parse(Options, __doc__)
    training = options.training

    # What is trained, on what.  All that can be wrong is found out before anything is written.
    out = folder_of(options)
    device = distributed.setup(training.device)
    check_place(out, options)
    check(options, typed)
    if training.threads:
        torch.set_num_threads(training.threads)
    state = resumed(out, options) if options.resume else None
    network, of_first_stage = untrained(options, state), first_stage_objective(options.latent, device)
    data = options.data
    batches, n = load_pictures(options.source, data.size, data.images, training.seed,
                               with_targets=options.network == "judge")
    shown, _ = next(batches([torch.arange(min(16, n))]))
    network.to(device)
    content = dict(pictures=n, first_stage=network.first_stage and digest(network.first_stage.state_dict()))
    if state:
        check_content(out, options, state, content)
    content["made_by"] = network.description["made_by"]
    latents = encode_all(batches, n, network, options.data.flip, device) if network.first_stage else None

    prepare(out, () if state else PICTURES + FILES)  # these last: killed here, it is still a run
    weights = sum(value.numel() for value in network.state_dict().values())
    distributed.say(f"{n} pictures of {options.source} at {options.data.size}x{options.data.size}; "
                    f"{weights / 1e6:.2f} M weights; {device}, "
                    f"{training.precision}; up to iteration {training.iterations}; {out}/")
    if options.network == "stylegan2":
        return train_gan(out, options, network, batches, content, state, device)
    model, schedule, b = network.model.train(), network.schedule, training.batch_size
    parameters = list(model.parameters())
    # The judge need bear little noise.
    noisiest = schedule.timesteps // 20 if options.network == "judge" else schedule.timesteps
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    ema = EMA(parameters, training.ema)

    def after(done: int, saved: bool) -> None:
        if saved:
            show(out, network, ema, shown)

    loop = Loop(out, options.network, training.iterations, training.save_every, b, parameters, optimizer, ema,
                functools.partial(learning_rate, training), device, state,
                dict(content, options=flat(options)), after)
    mine = distributed.share(b)

    def chosen(iteration: int) -> tuple[torch.Generator, Tensor]:
        """Pictures of an iteration, and the generator of what else is random in it."""
        g = generator(training.seed, iteration)                            # every rank draws the global batch
        return g, torch.randint(n, (b,), generator=g)[mine]

    pictures = batches(chosen(iteration)[1] for iteration in range(loop.start, training.iterations))
    for iteration in loop:
        g, indices = chosen(iteration)
        t = torch.randint(noisiest, (b,), generator=g)[mine].to(device)
        mirrored = (torch.rand(b, generator=g)[mine] < 0.5) & options.data.flip
        if latents is None:
            x0, labels = next(pictures)
            if options.data.flip:
                x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        else:
            x0, labels = latents[indices + n * mirrored], None
        eps = torch.randn(b, *latent_shape(network, x0), generator=g)[mine]
        x0, eps = x0.to(device), eps.to(device)
        labels = None if labels is None else labels.to(device)

        with distributed.autocast(device, training.precision):
            loss = losses_of(network, x0, labels, t, eps, of_first_stage, training.p2).sum() / b
        loss.backward()
        distributed.sum_gradients(parameters)
        total = distributed.sum_over_ranks(loss.detach().clone()).item()
        gradient_norm = loop.check(total, "start again with a lower --learning-rate",
                                   with_state="go on with --resume and a lower --learning-rate")
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, torch.tensor(gradient_norm))
        optimizer.step()
        ema.update()
        loop.record(loss=total, gradient_norm=gradient_norm)
    finish(out, network)


def finish(out: Path, network: Network | gan.GAN) -> None:
    """Leave the other processes, and say what there is now."""
    adapts = {"UNet": "python train_tan.py", gan.NAME: "python -m baselines.gan_transfer"}
    program, file = adapts.get(network.description["network"]), quoted(out / "model.safetensors")
    adapted = f"; {program} --source {file} --target FOLDER adapts it" if program else ""
    distributed.say(f"done: {file}{adapted}")
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
