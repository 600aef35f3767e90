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
from pathlib import Path

import torch
from tqdm import tqdm

import adaptor
import domains
from adversarial_noise import worst_case_noise
from baselines.pairwise import pairwise_loss, scale_gradient
from checkpoints import run_folder
from checkpoints.load import load_source, start_classifier
from checkpoints.network import Network, fingerprint, save_network
from classifier import guided_loss, similarity_guidance
from ddpm import predict_eps
from guidance import make_classifier
from plumbing import distributed
from plumbing.files import Metrics, load_checkpoint, save_checkpoint
from plumbing.options import InputError, parse, run
from plumbing.seeds import generator
from plumbing.training import EMA, Stats, StopSignal, warmup
from settings import Options, check, suited


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
    targets = domains.target_images(options.target, size)
    shown = domains.target_images(options.classifier_targets, size) if options.classifier_targets else targets
    if options.source_images:
        domains.source_images(options.source_images, 1, size, 0)  # a wrong folder is found out now
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
