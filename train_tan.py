"""TAN: adapt a pre-trained diffusion model to a new domain from ten pictures (Algorithm 1).

  python train_tan.py --target sunglasses                    built-in faces, built-in target; minutes on a laptop
  python train_tan.py --target photos/                       your own pictures instead
  python train_tan.py --source toyfaces-latent               the same on a latent diffusion model
  python train_tan.py --source ffhq_p2.pt --target photos/ --precision bf16    a published checkpoint
  torchrun --nproc_per_node=8 train_tan.py --source ...      the same on 8 GPUs; --batch-size stays the global one
  python train_tan.py --target sunglasses --resume           go on after an interruption; on a CPU to the very same weights

The defaults below are the paper's, for 256x256 networks; latent ones take its learning rate 1e-5.  A source of 64 pixels or less, as the built-in one, replaces some by
what suits it and says so when it starts; flags that are typed always hold.

A run leaves in runs/TARGET/: targets.png, samples.png (same noise: source above, adapted below), progress.png (the same
noises at several iterations), loss.png, metrics.jsonl, options.json, weights.safetensors, classifier.safetensors.
More pictures from it: python sample.py runs/TARGET -n 64
"""

import contextlib
import copy
import dataclasses
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import adaptor
import data
import distributed
import domains
import run_folder
from adversarial_noise import worst_case_noise
from checkpoints import BUILT_IN, Network, fingerprint, load_source, save_network, start_classifier
from classifier import AUGMENTATIONS, TARGET, log_prob_gradient
from ddpm import Schedule, predict_eps
from guidance import make_classifier
from options import InputError, at_least, option, parse, positive, run
from pairwise import pairwise_loss, scale_gradient
from training import EMA, Metrics, Stats, StopSignal, generator, load_checkpoint, save_checkpoint, warmup

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
    arch: str | None = option(None, "network of a published file whose shapes do not show it (python checkpoints.py lists them), or a JSON file", metavar="NAME")
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


def guided_loss(eps: Tensor, eps_predicted: Tensor, guidance: Tensor | float) -> Tensor:
    """|| eps - eps_theta(x_t, t) - guidance ||^2 of Eqs. 6 and 9, as a mean over each image: (B, ...) -> (B,).

    guidance = sigma_hat_t^2 gamma grad log p(y = T | x_t); with 0 it is Eq. 1.
    """
    return (eps - eps_predicted - guidance).square().flatten(1).mean(1)


def similarity_guidance(classifier: Callable | None, schedule: Schedule, xt: Tensor, t: Tensor, gamma: float, power: int = 2,
                        below: int | None = None) -> Tensor | float:
    """sigma_hat_t^2 gamma grad log p(y = T | x_t) of Eq. 6, shaped like xt; 0 without a classifier, and from timestep `below` on.

    power    of sigma_hat: 2 as printed, 1 as Eqs. 2-3 give with the posterior variance
    """
    if classifier is None:
        return 0.0
    guidance = schedule.sigma_hat(t, xt) ** power * gamma * log_prob_gradient(classifier, xt, t, TARGET)
    return guidance if below is None else guidance * (t < below).view(-1, *[1] * (xt.dim() - 1))


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


def prepare(options: Options, network: Network) -> list[torch.nn.Parameter]:
    """Set the source U-Net up for the method; returns what is to be trained."""
    model = network.model.eval()
    model.use_checkpoint = options.checkpoint_blocks
    if options.method in run_folder.ALL_WEIGHTS:
        return list(model.requires_grad_(True).parameters())
    adaptor.attach(model, options.adaptor_width)
    return adaptor.parameters(model)


def main() -> None:
    options, given = parse(Options, description=__doc__)
    device = distributed.setup(options.device)
    main_rank = distributed.rank() == 0
    say = print if main_rank else lambda *a: None
    own = domains.TARGETS.get(options.target)
    other = f"-{Path(options.source).stem}" if own and options.source not in (None, own) else ""
    out = Path(options.output_dir or f"runs/{Path(options.target).resolve().name}{other}" + ("" if options.method == "tan" else f"-{options.method}"))
    if options.resume:
        options = run_folder.resumed(out, options, given)
    elif options.source is None:
        options = dataclasses.replace(options, source=own or "toyfaces")
    source = load_source(options.source, options.arch)
    suits = suited(options, source)
    if not options.resume:
        options = dataclasses.replace(options, **{k: v for k, v in suits.items() if k not in given})
    check(options, out)
    if options.samples and options.sample_steps > source.schedule.timesteps:
        raise InputError(f"--sample-steps {options.sample_steps}: this model has {source.schedule.timesteps}")
    size, theta = source.image_size, fingerprint(source)
    targets = data.target_images(options.target, size)
    shown = data.target_images(options.classifier_targets, size) if options.classifier_targets else targets
    if options.source_images:
        data.source_images(options.source_images, 1, size, 0)  # a wrong folder is found out now
    pictures = hashlib.sha256(targets.numpy().tobytes()).hexdigest()
    state = load_checkpoint(out / "checkpoint.pt") if options.resume and (out / "checkpoint.pt").exists() else None
    if state and state["source"] != theta:
        raise InputError(f"{out}: belongs to another source than the present {options.source}")
    if state and state["pictures"] != pictures:
        raise InputError(f"{options.target}: the pictures have changed since the run in {out} began; start anew with --overwrite or another --output-dir")
    if state and state["iteration"] > options.iterations:
        raise InputError(f"--iterations {options.iterations}: the run in {out} has done {state['iteration']} already")
    if options.method in ("guided", "tan"):
        start_classifier(options.classifier, options.classifier_arch, options.source, source)  # a wrong file is found out now
    start = state["iteration"] if state else 0
    run_folder.open_run(out, options, start)

    torch.manual_seed(options.seed)
    model, schedule = source.to(device).model, source.schedule
    total = sum(p.numel() for p in model.parameters())
    parameters = prepare(options, source)
    trained = sum(p.numel() for p in parameters)
    rate = 1 if options.method in run_folder.ALL_WEIGHTS else adaptor.parameter_rate(model)
    form = f", as latents {'x'.join(map(str, source.shape))}" if source.first_stage else ""
    say(f"source {options.source}: {size}x{size}{form}, {total / 1e6:.2f} M parameters; training {trained / 1e6:.3f} M ({rate:.1%}) with "
        f"{options.method} on {len(targets)} pictures of {options.target}; {device}, {options.precision}, {distributed.world()} process(es)")
    if replaced := [name for name in suits if name not in given]:
        say(f"settings for a {'small' if size <= 64 else 'latent'} source: " + ", ".join(f"--{k.replace('_', '-')} {getattr(options, k)}" for k in replaced))

    classifier = None
    if options.method in ("guided", "tan"):
        if main_rank and not (out / "classifier.safetensors").exists():
            network, accuracy = make_classifier(options, source, shown, device, say)
            network.description["held_out_accuracy"] = accuracy
            save_network(out / "classifier.safetensors", network)
        distributed.barrier()
        classifier_network = run_folder.load_classifier(out)
        classifier = classifier_network.model.to(device).requires_grad_(False)
        accuracy = classifier_network.description["held_out_accuracy"]
        if accuracy is not None:
            say("classifier, accuracy on held-out pictures for t in the 1st, 2nd, 3rd, 4th quarter (0.5 is chance): "
                + ", ".join(f"{a:.2f}" for a in accuracy))

    unadapted = copy.deepcopy(model).requires_grad_(False) if options.method == "pa" else None
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate)
    ema = EMA(parameters, options.ema)
    if state:
        with torch.no_grad():
            torch._foreach_copy_(parameters, [p.to(device) for p in state["parameters"]])
        optimizer.load_state_dict(state["optimizer"]), ema.load_state_dict(state["ema"])
        say(f"resuming at iteration {start}")
    metrics = Metrics(out / "metrics.jsonl", start)
    report = run_folder.Report(out, options, source, theta, targets, ema, device)
    if start == 0:
        report.preview(0)

    def save(done: int) -> None:
        save_checkpoint(out / "checkpoint.pt", dict(parameters=[p.detach() for p in parameters], optimizer=optimizer.state_dict(),
                                                    ema=ema.state_dict(), iteration=done, source=theta, pictures=pictures))

    latents, mirrored = (source.encode(images.to(device)).cpu() for images in (targets, targets.flip(3)))  # pixel models: the pictures
    bound = latents.abs().max().item() if source.first_stage else 1.0
    b, micro = options.batch_size, options.micro_batch_size or options.batch_size
    mine = distributed.share(b)
    stages = {round(options.iterations * (i + 1) / options.previews) for i in range(options.previews)}
    warned = False
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
    bar = tqdm(range(start, options.iterations), initial=start, total=options.iterations, desc=options.method, disable=not main_rank)
    with StopSignal() as stop:
        for iteration in bar:                                                       # Algorithm 1, line 1
            started = time.time()
            g = generator(options.seed, 0, iteration)  # every rank draws the global batch and works on its share
            chosen = torch.randint(len(targets), (b,), generator=g)
            x0 = latents[chosen]                                                    # line 2
            t = torch.randint(schedule.timesteps, (b,), generator=g)                # line 3
            eps = torch.randn(x0.shape, generator=g)                                # line 4
            if options.flip:
                x0 = torch.where(torch.rand(b, 1, 1, 1, generator=g) < 0.5, mirrored[chosen], x0)
            x0, t, eps = x0[mine].to(device), t[mine].to(device), eps[mine].to(device)

            optimizer.zero_grad()
            stats = Stats(schedule.timesteps, device)
            for part in range(0, len(x0), micro):
                x0_, t_, eps_ = x0[part:part + micro], t[part:part + micro], eps[part:part + micro]
                ascent = []
                if options.method == "tan":                                         # lines 5-7
                    network = adaptor.detached(model) if options.pgd_network == "source" else contextlib.nullcontext()
                    with network, autocast():
                        eps_, ascent = worst_case_noise(model, schedule, x0_, t_, eps_, options.pgd_steps, options.omega)
                xt = schedule.add_noise(x0_, t_, eps_)
                with autocast():
                    guidance = similarity_guidance(classifier, schedule, xt, t_, options.gamma, options.guidance_power, options.guidance_below)
                    eps_predicted = predict_eps(model, xt, t_)
                losses = guided_loss(eps_, eps_predicted, guidance)                 # line 8, Eq. 9
                if options.method == "pa":
                    with torch.no_grad(), autocast():
                        eps_source = predict_eps(unadapted, xt, t_)
                    # Bounded, as in sampling: where noise is nearly all, an error of eps is a hundredfold one of x_0.
                    adapted, kept = (schedule.predict_x0(xt, t_, e).clamp(-bound, bound) for e in (eps_predicted, eps_source))
                    losses = losses + pairwise_loss(scale_gradient(adapted, schedule.at(t_, adapted)), kept, x0_, *options.pairwise_weights)
                (losses.sum() / b).backward()
                stats.add(t_, losses.detach(), guidance, ascent)
            distributed.sum_gradients(parameters)
            line = stats.reduce()
            gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
            if not math.isfinite(line["loss"] + gradient_norm):
                save(iteration)  # this step has not been taken: the weights are still good
                raise InputError(f"loss {line['loss']}, gradient {gradient_norm} at iteration {iteration}; the state before it is in "
                                 f"{out}/checkpoint.pt; start again with --overwrite and a lower --learning-rate or --gamma, or --precision fp32")
            optimizer.param_groups[0]["lr"] = options.learning_rate * warmup(iteration, options.warmup)
            optimizer.step()                                                        # line 9
            ema.update()

            done, seconds = iteration + 1, time.time() - started
            metrics.write(iteration=iteration, **line, gradient_norm=gradient_norm, seconds=seconds, images_per_second=b / seconds)
            bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
            swamped = [q + 1 for q, r in enumerate(line.get("guidance_rms", [])) if r is not None and r > 0.5]
            if swamped and not warned and main_rank:
                warned = True
                bar.write(f"warning: in timestep quarter {swamped[0]} the guidance has over half the strength of the noise itself; "
                          "a lower --gamma is safer")
            stopping = distributed.any_rank(stop.received, device)
            if done in stages:
                report.preview(done)
            if stopping or done % options.save_every == 0 or done == options.iterations:
                save(done)
            if stopping and done < options.iterations:
                bar.close()
                say(f"\nstopped and saved after {done} iterations; continue with --resume")
                distributed.cleanup()
                sys.exit(130)
    report.finish()
    distributed.barrier()
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
