"""TAN: adapt a pre-trained diffusion model to a new domain from ten pictures (Algorithm 1).

  python train_tan.py --target sunglasses                    built-in faces and target; minutes on a laptop
  python train_tan.py --target sunglasses --method tan       all parts of the paper; small sources do without
  python train_tan.py --target photos/                       your own pictures; adapts photo-like faces, 64x64
  python train_tan.py --source toyfaces-latent               sunglasses, on a latent diffusion model
  python train_tan.py --source ffhq_p2.pt --target photos/ --precision bf16    a published checkpoint
  torchrun --nproc_per_node=8 train_tan.py --source ...      on 8 GPUs; --batch-size stays the global one
  python train_tan.py --target sunglasses --resume           go on where it stopped, on a CPU bit for bit

Options left out get what suits the source (settings.py): the paper's numbers above 64 pixels, others for
smaller sources such as the built-in ones, where adaptors alone are measured to be better.  The program prints
those that are not the paper's.

A run leaves in runs/TARGET/: targets.png, samples.png (same noise: source above, adapted below),
progress.png (the same noises at several iterations, with their median distance to the nearest training
picture or its mirror image, rms over pixels: 0 are copies), report.html (all of it on one page), stages/ (the
weights of each row), loss.png, metrics.jsonl, options.json, checkpoint.pt, weights.safetensors, of a method
with guidance classifier.safetensors, and of --arch FILE a copy, arch.json.

  python sample.py runs/TARGET -n 64            more pictures from it; from a stage with --at 96
  python evaluate.py runs/TARGET --at all       its stages compared; --hold-out 2 shows where copying begins
"""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adaptor
import domains
import settings
from adversarial_noise import worst_case_noise
from baselines.pairwise import PairwiseLosses
from checkpoints import run_folder
from checkpoints.load import load_diffusion_model, pinned, start_classifier
from checkpoints.network import Network, save_network
from checkpoints.run_folder import CLASSIFIER
from checkpoints.run_report import Report
from checkpoints.run_stats import Stats
from classifier import Classifier, fade, guided_loss, limited, make_classifier, similarity_guidance
from ddpm import Schedule, predict_eps
from plumbing import distributed, progress
from plumbing.board import Board
from plumbing.memory import MicroBatches, fitting
from plumbing.options import flag, flat, parse, picked, replace, run
from plumbing.seeds import generator
from plumbing.training import EMA, Loop, cosine_decay, speed_up, warmup
from settings import METHODS, Options
from unet import UNet

MICRO = "--micro-batch-size"


def trainable(source: Network, options: Options) -> list[torch.nn.Parameter]:
    """What learns: psi, attached here beside the frozen theta, or all of theta."""
    source.model.eval().use_checkpoint = options.checkpoint_blocks
    if not METHODS[options.method].adaptors:
        return list(source.model.requires_grad_(True).parameters())
    adaptor.attach(source.model, options.adaptor_width, form=options.adaptor)
    return adaptor.parameters(source.model)


@dataclasses.dataclass
class ClassifierInputs:
    """What the classifier is made of."""
    targets: Tensor             # (K, 3, H, W)
    sources: Tensor | None      # (N, 3, H, W) of a folder or drawn; None: sampled from the source model
    begins: Network             # before it has seen a target picture


def classifier_inputs(source: Network, targets: Tensor, options: Options, out: Path,
                      device: torch.device) -> ClassifierInputs | None:
    """None without guidance, and for a resumed run in `out` that has its classifier: nothing is read again.

    Raises InputError where the options are wrong: early, before anything is written.
    """
    guide = options.guidance
    there = options.resume and (out / CLASSIFIER).exists()
    if not METHODS[options.method].guidance or not distributed.any_rank(not there, device):
        return None
    if guide.classifier_targets:
        targets = domains.target_images(guide.classifier_targets, source.image_size)
    name, sources = guide.source_images or domains.drawn_by(options.source), None
    if name:
        sources = domains.source_images(name, guide.source_count, source.image_size, options.seed)
    torch.manual_seed(options.seed)  # the new head
    begins = start_classifier(guide.classifier, guide.classifier_arch, options.source, source)
    return ClassifierInputs(targets, sources, begins)


def sampled_sources(source: Network, options: Options) -> Tensor:
    """Source pictures (N, 3, H, W) for the classifier where there are no others: what the model draws."""
    count, steps = options.guidance.source_count, min(25, source.schedule.timesteps)
    distributed.say(f"sampling {count} source pictures for the classifier "
                    "(--source-images FOLDER would save this)")
    # psi, which is attached already, is still zero: the network draws what the source model draws.
    seeds = range(10**6, 10**6 + count)

    bar = functools.partial(progress.bar, text="source pictures")
    drawn = fitting(lambda at_once: source.sample(seeds[distributed.share(count)], steps, batch_size=at_once,
                                                  progress=bar), options.micro_batch_size or 64, MICRO)
    return distributed.gather(drawn, count, next(source.model.parameters()).device)


def obtain_classifier(source: Network, inputs: ClassifierInputs | None, options: Options, out: Path,
                      device: torch.device) -> Classifier:
    """p_phi (Eq. 5) of the run in `out`: fine-tuned on the targets, or (without inputs) as it is there."""
    guide = options.guidance
    usual = domains.AUGMENT.get(options.target, ("flip", "shift"))

    def start() -> Classifier:
        torch.manual_seed(options.seed)  # dropout
        model = copy.deepcopy(inputs.begins.model).to(device)
        model.use_checkpoint = options.checkpoint_blocks
        # Pass by pass: a block of autocast around all steps would keep its copy of the first weights.
        model.forward = distributed.autocast(device, options.precision)(model.forward)
        return model

    def make(pictures: Tensor, at_once: int | None) -> tuple[Classifier, list[float] | None]:
        return make_classifier(
            start, source.schedule, pictures, inputs.targets.to(device),
            kinds=usual if guide.augment is None else guide.augment,
            iterations=guide.classifier_iterations, batch_size=guide.classifier_batch_size,
            learning_rate=guide.classifier_learning_rate, stream=functools.partial(generator, options.seed),
            encode=source.encode if source.first_stage else None, check=guide.classifier_check,
            micro_batch_size=at_once, progress=progress.bar,
            share=distributed.share, sum_gradients=distributed.sum_gradients)

    if inputs:
        pictures = sampled_sources(source, options) if inputs.sources is None else inputs.sources
        inputs.sources = None  # not held for the whole run
        work = functools.partial(make, pictures.to(device))
        at_once = options.micro_batch_size or guide.classifier_batch_size
        # Of several processes one cannot begin anew: the others wait for its gradients.
        model, accuracy = fitting(work, at_once, MICRO) if distributed.world() == 1 else work(at_once)
        description = dict(inputs.begins.description, held_out_accuracy=accuracy)
        if distributed.rank() == 0:
            save_network(out / CLASSIFIER, Network(model, source.schedule, description))
    distributed.barrier()
    network = run_folder.load_classifier(out)
    if accuracy := network.description["held_out_accuracy"]:
        distributed.say("classifier, accuracy on held-out pictures for t in the 1st, 2nd, 3rd, 4th quarter "
                        "(0.5 is chance): " + ", ".join(f"{share:.2f}" for share in accuracy))
    model = network.to(device).model.requires_grad_(False)
    model.use_checkpoint = options.checkpoint_blocks
    return model


def describe(source: Network, psi: list[torch.nn.Parameter], targets: Tensor, asked: Options,
             options: Options, device: torch.device) -> None:
    """Print what is adapted, to what, and which numbers are not the paper's."""
    model, size = source.model, source.image_size
    learning = sum(p.numel() for p in psi)
    of_source = sum(p.numel() for name, p in model.named_parameters() if ".adaptor." not in name)
    held_out = f" ({options.hold_out} held out)" if options.hold_out else ""
    latent = f", as latents {'x'.join(map(str, source.shape))}" if source.first_stage else ""
    distributed.say(
        f"source {options.source}: {size}x{size}{latent}, {of_source / 1e6:.2f} M parameters; "
        f"training {learning / 1e6:.3f} M ({learning / of_source:.1%}) with {options.method} on "
        f"{len(targets)} pictures of {options.target}{held_out}; {device}, {options.precision}, "
        f"{distributed.world()} process(es)")
    before, after = flat(asked), flat(options)
    instead = settings.instead_of_paper(options, source)
    filled = [name for name in ("method", *instead) if before[name] is None]
    if filled and source.small and not options.paper:
        distributed.say("settings for a small source: "
                        + ", ".join(f"{flag(name)} {after[name]}" for name in filled))


def pairwise_losses(source: Network, options: Options) -> PairwiseLosses | None:
    """What DDPM-PA adds to the loss; None for the other methods."""
    if not METHODS[options.method].pairwise_losses:
        return None
    weights = options.pairwise_losses.pairwise_weights
    return PairwiseLosses(source.model, source.schedule, source.clip, weights)


def learning_rate(options: Options, iteration: int) -> float:
    """Adam's in an iteration, from 0."""
    decay = cosine_decay(iteration, options.iterations) if options.learning_rate_decay == "cosine" else 1.0
    return options.learning_rate * warmup(iteration, options.warmup) * decay


def losses_of(model: UNet, ascended: UNet, classifier: Classifier | None, pairwise: PairwiseLosses | None,
              schedule: Schedule, options: Options, gamma: float, x0: Tensor, t: Tensor,
              eps: Tensor) -> tuple[Tensor, Tensor | float, Tensor, list[Tensor]]:
    """Lines 5 to 8 for pictures x0 (B, ...) at t (B,) with noises eps: the loss (B,) of each and, for Stats,
    the guidance, the residual eps - eps_theta (B, ...) and the losses (B,) at each step of the ascent.

    ascended    the network whose worst noise is sought: `model`, or theta alone
    """
    guide, pgd, ascent = options.guidance, options.adversarial_noise, []
    if METHODS[options.method].adversarial_noise:                          # lines 5-7, Eq. 8
        eps, ascent = worst_case_noise(ascended, schedule, x0, t, eps, pgd.pgd_steps, pgd.omega,
                                       own=pgd.norm == "own")
    xt = schedule.add_noise(x0, t, eps)
    eps_theta = predict_eps(model, xt, t, schedule)
    residual = eps - eps_theta.detach()
    guidance = similarity_guidance(classifier, schedule, xt, t, gamma, guide.guidance_power,
                                   guide.guidance_below)                   # Eq. 6
    guidance = limited(guidance, residual, guide.guidance_limit)
    losses = guided_loss(eps, eps_theta, guidance)                         # line 8, Eq. 9
    if pairwise:
        losses = losses + pairwise(xt, t, eps_theta, x0)
    # Stats compares the ascent's losses with the residual, which takes one and the same network.
    return losses, guidance, residual, ascent if ascended is model else []


def remedy(options: Options) -> str:
    """What to do about a run that diverges."""
    gamma = " or --gamma" if METHODS[options.method].guidance else ""
    precision = ", or --precision fp32" if options.precision == "bf16" else ""
    return f"start again with --overwrite and a lower --learning-rate{gamma}{precision}"


def watch(loop: Loop, line: dict[str, Any], fades: bool) -> None:
    """Warn where the guidance outweighs what the pictures themselves have left to teach."""
    bearable = 2.0 if fades else 0.5  # on latents a constant pull of half the residual ruins the model
    fading = "" if fades else "--guidance-fade 0.5, "
    for quarter, ratio in enumerate(line.get("guidance_ratio", []), start=1):
        if ratio is not None and ratio > 1.001 * bearable:  # a limit of 0.5 leaves 0.5 and rounding
            loop.warn(f"in timestep quarter {quarter} the guidance is over {bearable} times what is left to "
                      f"learn; {fading}--guidance-limit 0.5 or a lower --gamma is safer")


def main() -> None:
    options, typed = parse(Options, __doc__)
    device = distributed.setup(options.device)

    # What is adapted, to what, with which numbers.
    # All that can be wrong is found out before anything is written.
    out = settings.folder_of(options)
    if options.resume:
        options = run_folder.resumed(out, options, typed)
    elif options.source is None:
        options = replace(options, source=settings.usual_source(options.target))
    options = replace(options, source=pinned(options.source), output_dir=str(out))
    arch = run_folder.arch_of(out, flat(options)) if options.resume else options.arch
    source = load_diffusion_model(options.source, arch)
    asked, options = options, settings.suited(options, source)
    settings.check(options, typed, source)
    source.precision = options.precision
    targets, held_out = domains.training_images(options.target, source.image_size, options.hold_out,
                                                options.recursive)
    inputs = classifier_inputs(source, targets, options, out, device)
    identity = run_folder.identity(source, torch.cat([targets, held_out]), settings.compared(options))
    state = run_folder.open_run(out, flat(options), identity)  # what a resumed run goes on from
    method, guide = METHODS[options.method], options.guidance

    # Require: binary classifier p_phi, pre-trained eps_theta (and psi beside it: section 4.3), learning rate
    torch.manual_seed(options.seed)
    psi = trainable(source, options)  # all of theta for a method without adaptors
    model, schedule = source.to(device).model, source.schedule
    describe(source, psi, targets, asked, options, device)
    classifier = obtain_classifier(source, inputs, options, out, device) if method.guidance else None
    # Theta alone, as Eq. 10 has it, or theta and psi
    ascended = adaptor.source_model(model) if options.adversarial_noise.pgd_network == "source" else model
    speed_up({model, ascended}, options.precision, options.adaptor, options.compile)
    optimizer, ema = torch.optim.Adam(psi, fused=device.type == "cuda"), EMA(psi, options.ema)

    board = None
    if options.tensorboard and distributed.rank() == 0:
        board = Board(out / "tensorboard", state["iteration"] + 1 if state else 0)
    report = Report(out, picked(options, settings.used_by(options.method)), source, identity, targets,
                    held_out, ema, device, settings.command_of(options), board)

    # q(x_0): the pictures and, after them, their mirror images, as the network sees them
    x0s = torch.cat([source.encode(images.to(device)).cpu() for images in (targets, targets.flip(3))])
    source.clip = x0s.abs().max().item() if source.first_stage else source.clip
    pairwise, b = pairwise_losses(source, options), options.batch_size
    micro_batches = MicroBatches(options.micro_batch_size or b, fixed=method.pairwise_losses)
    loop = Loop(out, options.method, options.iterations, options.save_every, batch_size=b, parameters=psi,
                optimizer=optimizer, ema=ema, device=device, state=state, keep=identity, after=report.preview,
                board=board, learning_rate=functools.partial(learning_rate, options))
    for iteration in loop:                                                 # Algorithm 1, lines 1 and 10
        g = generator(options.seed, 0, iteration)                          # every rank draws the global batch
        chosen = torch.randint(len(targets), (b,), generator=g)            # line 2: which pictures
        t = torch.randint(schedule.timesteps, (b,), generator=g)           # line 3
        eps = torch.randn(b, *source.shape, generator=g)                   # line 4
        mirrored = torch.rand(b, generator=g) < (0.5 if options.flip else 0)
        x0 = x0s[chosen + len(targets) * mirrored]                         # line 2
        x0, t, eps = (values[distributed.share(b)].to(device) for values in (x0, t, eps))  # this rank's
        gamma = guide.gamma * fade(iteration / options.iterations, guide.guidance_fade)

        # Once; again from here with half as many pictures at a time where memory runs out.
        for parts in micro_batches(x0, t, eps):
            stats, losses = Stats(schedule.timesteps, device), None  # a failed attempt's hold their graph
            optimizer.zero_grad()
            with micro_batches:
                for x0_, t_, eps_ in parts:                                # lines 5-8
                    with distributed.autocast(device, options.precision):
                        losses, guidance, residual, ascent = losses_of(
                            model, ascended, classifier, pairwise, schedule, options, gamma, x0_, t_, eps_)
                    (losses.sum() / b).backward()
                    stats.add(t_, losses.detach(), guidance, residual, ascent)
        distributed.sum_gradients(psi)

        line = stats.reduce()
        gradient_norm = loop.check(line["loss"], remedy(options))
        optimizer.step()                                                   # line 9, by Adam
        ema.update()
        loop.record(**line, gradient_norm=gradient_norm)
        watch(loop, line, guide.guidance_fade > 0)
    report.finish(method.loss)
    distributed.cleanup()


if __name__ == "__main__":
    run(main)
