"""Pre-train a source: a DDPM on a built-in domain or on your own folder of images, or the classifiers of a built-in domain.

  python pretrain.py toyfaces                          the model behind --source toyfaces (about an hour on 2 CPU cores)
  python pretrain.py photos/ --size 64 --channels 64   a DDPM of your own pictures
  python pretrain.py toyfaces --network classifier     learns the attributes of noised source pictures: the built-in
                                                       analogue of the ImageNet classifier that guidance starts from
  python pretrain.py toyfaces --network judge          learns attributes and domain of clean pictures of the source and all
                                                       its targets: evaluate.py counts with it, nothing is trained with it
  python pretrain.py photos/ --size 256 --network kl   a first stage of latent diffusion (or vq), and on its latents:
  python pretrain.py photos/ --size 256 --first-stage runs/pretrain-photos-kl/model.safetensors

Leaves in runs/pretrain-NAME/: model.safetensors (EMA weights, architecture in its metadata), samples.png as training goes,
metrics.jsonl, loss.png and checkpoint.pt, from which --resume continues exactly.
"""

import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import domains
from autoencoder import LOSS_WEIGHTS, first_stage_loss
from checkpoints.load import load_network
from checkpoints.network import FIRST_STAGES, Network, build, save_network
from checkpoints.published import LINEAR
from ddpm import predict_eps
from plumbing import distributed
from plumbing.figures import save_curve
from plumbing.files import Metrics, load_checkpoint, read_metrics, save_checkpoint
from plumbing.options import REQUIRED, InputError, at_least, flag, option, parse, positive, run
from plumbing.pictures import ImageFolder, save_grid, to_tensor
from plumbing.seeds import generator
from plumbing.training import EMA, StopSignal, cosine_decay, warmup


@dataclasses.dataclass
class Options:
    source: str = option(REQUIRED, "built-in domain or folder of images", positional=True)
    network: str = option("unet", "what to train", choices=["unet", "classifier", "judge", "kl", "vq"])
    output_dir: str = option("", "where the run goes (default: runs/pretrain-SOURCE, with -latent, -kl, -vq, -classifier or -judge)")
    resume: bool = option(False, "continue the run in --output-dir from its checkpoint, with the same flags")
    overwrite: bool = option(False, "replace the run in --output-dir")

    size: int = option(32, "pixels per side", group="data")
    images: int = option(20_000, "how many pictures of a built-in domain to draw", group="data")
    flip: bool = option(False, "mirror half of the pictures", group="data")

    channels: int = option(32, "channels of the first level", group="network")
    channel_mult: tuple[int, ...] = option((1, 2, 3), "channels of each level, in multiples of the first", group="network")
    res_blocks: int = option(1, "residual blocks a level", group="network")
    attention: tuple[int, ...] = option((4,), "downsampling factors at which there is attention", group="network")
    head_channels: int = option(32, "width of an attention head", group="network")
    norm_groups: int = option(8, "groups of each group norm (32 in published networks)", group="network")

    first_stage: str | None = option(None, "train the U-Net on the latents of this file", metavar="FILE", group="latent diffusion")
    latent_channels: int = option(4, "of a first stage", group="latent diffusion")
    codes: int = option(512, "entries in the codebook of a vq", group="latent diffusion")
    kl_weight: float = option(1e-6, "of the loss of a kl", group="latent diffusion")

    iterations: int = option(10_000, "training steps", group="training")
    batch_size: int = option(40, "pictures a step, over all processes", group="training")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW, decayed to 0 by half a cosine", group="training")
    warmup: int = option(200, "iterations of linear warm-up", group="training")
    ema: float = option(0.999, "decay of the average of the weights that is saved", group="training")
    precision: str = option("fp32", "fp32, or bf16 autocast", choices=["fp32", "bf16"], group="training")
    device: str = option("auto", "auto, cpu, cuda or mps", group="training")
    threads: int | None = option(None, "CPU threads (default: all)", group="training")
    seed: int = option(0, "seed of everything random", group="training")
    save_every: int = option(500, "iterations between checkpoints and sample grids", group="training")


MAY_CHANGE = {"output_dir", "resume", "overwrite", "iterations", "learning_rate", "device", "threads", "save_every"}  # on --resume


def describe(options: Options, stage: Network | None) -> dict:
    """The network of the options, in the form that checkpoints.build reads; `stage` is the first stage of a latent model."""
    made_by = shlex.join(["python", "pretrain.py", *(a for a in sys.argv[1:] if a != "--resume")])
    if options.network.upper() in FIRST_STAGES:
        ddconfig = dict(z_channels=options.latent_channels, double_z=options.network == "kl", resolution=options.size, ch=options.channels,
                        ch_mult=options.channel_mult, num_res_blocks=options.res_blocks, norm_groups=options.norm_groups)
        codebook = dict(n_embed=options.codes) if options.network == "vq" else {}
        return dict(network=options.network.upper(), config=dict(ddconfig=ddconfig, embed_dim=options.latent_channels, **codebook), made_by=made_by)
    attributes = {name: list(values) for name, values in domains.ATTRIBUTES.get(options.source, {}).items()}
    if options.network == "judge":
        attributes["domain"] = family(options.source)
    size, channels = (options.size // stage.model.factor, stage.model.embed_dim) if stage else (options.size, 3)
    config = dict(image_size=size, in_channels=channels, model_channels=options.channels,
                  out_channels=channels if options.network == "unet" else sum(map(len, attributes.values())), num_res_blocks=options.res_blocks,
                  attention_resolutions=options.attention, channel_mult=options.channel_mult, num_head_channels=options.head_channels,
                  use_scale_shift_norm=True, norm_groups=options.norm_groups)
    description = dict(network="UNet" if options.network == "unet" else "Classifier", config=config, schedule=LINEAR, made_by=made_by)
    if stage:
        description["first_stage"] = {key: stage.description[key] for key in ("network", "config", "made_by")}
    if options.network in ("classifier", "judge"):
        description["attributes"] = attributes
    return description


def family(source: str) -> list[str]:
    """A built-in source and its targets."""
    return [source, *(target for target, of in domains.TARGETS.items() if of == source)]


def load_pictures(options: Options):
    """A function from indices (B,) to images and labels (B, attributes), and the number of pictures.  Folders have no labels."""
    if options.source in domains.SOURCES:
        drawn = []
        names = family(options.source) if options.network == "judge" else [options.source]
        for i, domain in enumerate(names):
            pixels, labels = domains.draw(domain, options.images // len(names), options.seed, options.size, progress=distributed.rank() == 0)
            drawn.append((pixels, np.column_stack([labels, np.full(len(labels), i)]) if options.network == "judge" else labels))
        pixels, labels = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*drawn))
        return (lambda indices: (to_tensor(pixels[indices]), labels[indices])), len(pixels)
    if options.network in ("classifier", "judge"):
        raise InputError(f"--network {options.network} learns attributes, which only built-in sources have: {', '.join(domains.SOURCES)}")
    folder = ImageFolder(options.source, options.size)
    return (lambda indices: (folder.batch(indices), torch.empty(len(indices), 0))), len(folder)


def encode_all(batch_of, n_pictures: int, network: Network, flip: bool, device: torch.device) -> Tensor:
    """Latents of all pictures on the CPU, with `flip` those of their mirror images after them; sets the scale factor that gives
    them unit variance."""
    kinds = [lambda x: x, lambda x: x.flip(3)][:2 if flip else 1]
    parts = [(change, indices) for change in kinds for indices in torch.arange(n_pictures).split(64)]
    bar = tqdm(parts, desc="latents", disable=distributed.rank() != 0, mininterval=2)
    latents = torch.cat([network.encode(change(batch_of(indices)[0]).to(device)).cpu() for change, indices in bar])
    network.scale_factor = network.description["scale_factor"] = 1 / latents.std().item()
    return latents * network.scale_factor


def attribute_loss(logits: Tensor, labels: Tensor, attributes: dict) -> Tensor:
    """Mean over attributes of the cross-entropy: logits (B, all values side by side), labels (B, attributes) -> (B,)."""
    groups = logits.split([len(values) for values in attributes.values()], dim=1)
    return torch.stack([F.cross_entropy(g, l, reduction="none") for g, l in zip(groups, labels.T)]).mean(0)


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    kind = "-latent" if options.first_stage else "" if options.network == "unet" else f"-{options.network}"
    name = Path(options.source).name + kind
    out = Path(options.output_dir or f"runs/pretrain-{name}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = distributed.setup(options.device)
    files = [out / "checkpoint.pt", out / "model.safetensors"]
    if any(file.exists() for file in files) and not (options.resume or options.overwrite):
        raise InputError(f"{out}: holds a run already; continue it with --resume, replace it with --overwrite, or choose --output-dir")
    at_least(options, size=8, latent_channels=1, codes=1, images=len(family(options.source)) if options.network == "judge" else 1, channels=1, res_blocks=1,
             head_channels=1, norm_groups=1, iterations=1, batch_size=distributed.world(), warmup=0, seed=0, save_every=1)
    positive(options, "learning_rate")
    if options.flip and options.network in ("classifier", "judge"):
        raise InputError(f"--flip: a mirrored picture has other attributes, which --network {options.network} learns; leave it out")
    state = load_checkpoint(out / "checkpoint.pt") if options.resume else None
    for field in dataclasses.fields(options) if state else ():
        wanted, known = getattr(options, field.name), state["options"][field.name]
        if field.name not in MAY_CHANGE and wanted != known:
            raise InputError(f"{flag(field)} {wanted}: the run in {out} has {known}; --resume takes the same flags")
    torch.manual_seed(options.seed)
    first_stage = options.network.upper() in FIRST_STAGES
    stage = load_network(Path(options.first_stage)) if options.first_stage else None
    if stage and (options.network != "unet" or stage.description["network"] not in FIRST_STAGES or options.size % stage.model.factor):
        raise InputError(f"--first-stage {options.first_stage}: only for --network unet, and must be a kl or vq whose factor divides --size")
    network = build(describe(options, stage), "the network flags")
    if (options.size if first_stage else network.model.image_size) % network.model.factor:
        raise InputError(f"--size {options.size}: the sides of what the network sees must be divisible by {network.model.factor} (--channel-mult)")
    batch_of, n_pictures = load_pictures(options)
    latents = None
    if stage:
        network.first_stage.load_state_dict(stage.model.state_dict())
        latents = encode_all(batch_of, n_pictures, network.to(device), options.flip, device)
    model, schedule = network.to(device).model.train(), network.schedule
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    ema, start = EMA(parameters, options.ema), 0
    if state:
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"]), ema.load_state_dict(state["ema"])
        start = state["iteration"]
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        for file in () if state else files:
            file.unlink(missing_ok=True)
        print(f"{n_pictures} pictures of {options.source} at {options.size}x{options.size}; {sum(p.numel() for p in parameters) / 1e6:.2f} M "
              f"parameters; {device}, {options.precision}; iterations {start} to {options.iterations}; {out}/")
    distributed.barrier()
    metrics = Metrics(out / "metrics.jsonl", start)

    def save(iteration: int) -> None:
        if distributed.rank() != 0:
            return
        ema.swap()
        save_network(out / "model.safetensors", network)
        model.eval()
        if options.network == "unet":
            save_grid(out / "samples.png", network.sample(range(64)), columns=16)
        elif first_stage:  # pictures above, what comes back below
            images = batch_of(torch.arange(min(16, n_pictures)))[0]
            with torch.no_grad():
                save_grid(out / "samples.png", torch.cat([images, model.decode(model.encode(images.to(device))).cpu()]), columns=len(images))
        model.train()
        ema.swap()
        # Last: a run killed on the way here does this save again when it is resumed.
        save_checkpoint(out / "checkpoint.pt", dict(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.state_dict(),
                                                    iteration=iteration, options=dataclasses.asdict(options)))
        save_curve(out / "loss.png", [line["loss"] for line in read_metrics(out / "metrics.jsonl")], "loss", smooth=100)

    mine = distributed.share(options.batch_size)
    noisiest = schedule.timesteps if options.network != "judge" else schedule.timesteps // 20  # a judge need only bear a little noise
    bar = tqdm(range(start, options.iterations), initial=start, total=options.iterations, disable=distributed.rank() != 0, mininterval=2)
    with StopSignal() as stop:
        for iteration in bar:
            started = time.time()
            g = generator(options.seed, iteration)
            indices = torch.randint(n_pictures, (options.batch_size,), generator=g)[mine]
            t = torch.randint(noisiest, (options.batch_size,), generator=g)[mine].to(device)
            mirror = torch.rand(options.batch_size, generator=g)[mine] < 0.5
            if latents is None:
                x0, labels = batch_of(indices)
                if options.flip:
                    x0 = torch.where(mirror[:, None, None, None], x0.flip(3), x0)
            else:
                x0 = latents[indices + n_pictures * mirror] if options.flip else latents[indices]
            x0 = x0.to(device)
            shape = (model.embed_dim, *(side // model.factor for side in x0.shape[2:])) if first_stage else x0.shape[1:]
            eps = torch.randn(options.batch_size, *shape, generator=g)[mine].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                if first_stage:
                    loss, _ = first_stage_loss(model, x0, eps, dict(LOSS_WEIGHTS, kl=options.kl_weight))
                    losses = loss.expand(len(x0))
                elif options.network == "unet":
                    xt = schedule.add_noise(x0, t, eps)
                    losses = (eps - predict_eps(model, xt, t)).square().flatten(1).mean(1)                # Eq. 1
                else:
                    xt = schedule.add_noise(x0, t, eps)
                    losses = attribute_loss(model(xt, t).float(), labels.to(device), network.description["attributes"])
            loss = losses.sum() / options.batch_size
            optimizer.zero_grad()
            loss.backward()
            distributed.sum_gradients(parameters)
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            total = distributed.sum_over_ranks(loss.detach().clone()).item()
            if not math.isfinite(total + gradient_norm.item()):
                raise InputError(f"loss is {total}, gradient {gradient_norm.item()} at iteration {iteration}; the last checkpoint is intact: continue with --resume and a "
                                 "lower --learning-rate")
            rate = options.learning_rate * warmup(iteration, options.warmup) * cosine_decay(iteration, options.iterations)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            ema.update()
            metrics.write(iteration=iteration, loss=total, gradient_norm=gradient_norm.item(), learning_rate=rate,
                          seconds=round(time.time() - started, 4))
            bar.set_postfix(loss=f"{total:.4f}", refresh=False)
            stopping = distributed.any_rank(stop.received, device)
            if stopping or (iteration + 1) % options.save_every == 0 or iteration + 1 == options.iterations:
                save(iteration + 1)
            if stopping:
                bar.close()
                if distributed.rank() == 0:
                    print(f"\nstopped and saved after {iteration + 1} iterations; continue with the same command and --resume")
                distributed.cleanup()
                sys.exit(130)
    distributed.barrier()
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
