"""What an iteration of TAN costs: its time beside that of its convolutions alone, memory and FLOPs.

  python -m experiments.benchmark                                    the built-in faces; minutes on a laptop
  python -m experiments.benchmark --arch ffhq256 ldm-ffhq256         published networks, with random weights
  python -m experiments.benchmark --source ffhq_p2.pt --precision bf16

An iteration is that of train_tan.py with --method tan: J steps of the ascent, the guidance of a classifier on
the network's own encoder, the training step, Adam.  The table has a row for each network and J:

  PGD step          seconds of one, of theta alone and with psi, and their ratio
  iteration         seconds
  peak memory       of the device while it runs; on a CPU of the process, at any time so far
  FLOPs             of an iteration, counted by torch: a multiplication and an addition are two; counted
                    once for as many pictures as go through the network together
  floor             seconds of theta's convolutions alone, in the faster of two memory layouts: forward and
                    gradient with respect to the input, 1 + J times
  plain recipe      seconds of an iteration with J = 10 in which all parameters are trainable, so that
                    loss.backward() in the ascent computes their gradients, too, and all activations are
                    recomputed (checkpointing)

The times are the shortest of --repeats, taken in turns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

import adaptor
import settings
from adaptor import FORMS
from adversarial_noise import denoising_loss, norm, worst_case_noise
from checkpoints.load import load_diffusion_model
from checkpoints.network import Network, build
from checkpoints.published import ARCHITECTURES
from checkpoints.run_stats import Stats
from classifier import Classifier, from_unet, guided_loss, similarity_guidance
from ddpm import Schedule, predict_eps
from experiments.measuring import convolutions, device_name, floor, flops, peak_memory, seconds
from plumbing import distributed
from plumbing.markdown import markdown
from plumbing.memory import fitting
from plumbing.options import InputError, Unset, at_least, parse, run
from plumbing.progress import bar, say
from plumbing.seeds import generator
from plumbing.training import EMA, speed_up
from unet import UNet

PUBLISHED = tuple(name for name, known in ARCHITECTURES.items() if known["network"] == "UNet")
PLAIN_STEPS = 10  # the paper's J
REACH = 0.2       # J omega
eager = functools.partial(torch.compiler.set_stance, "force_eager")  # as if nothing were compiled


@dataclasses.dataclass
class Options:
    source: Unset[str] = None
    """Built-in source, file of weights or folder of diffusers (default: toyfaces, if there is no --arch)."""
    arch: Annotated[tuple[Literal[PUBLISHED], ...], tyro.conf.arg(help_behavior_hint="")] = ()
    """Published networks, with random weights (default: none; then --source)."""
    adaptor: Literal[tuple(FORMS)] = "bottleneck"
    """What psi is, as in train_tan.py."""
    pgd_steps: tuple[int, ...] = (10, 2)
    """J, a row each."""
    batch_size: Unset[int] = None
    """Pictures an iteration (default: as train_tan.py; 40, or 16 for a small source)."""
    micro_batch_size: Unset[int] = None
    """Pictures at once on the device (default: all; half as many where memory runs out, and so on)."""
    checkpoint_blocks: bool = False
    """Recompute activations instead of storing them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 autocast."""
    compile: bool = False
    """Compile the network, as train_tan.py --compile; the plain recipe is not compiled."""
    repeats: int = 3
    """Measurements, of which the shortest counts."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""


@dataclasses.dataclass
class Work:
    """A network with psi attached, and all that an iteration of TAN needs; theta is the same without psi."""

    model: UNet
    theta: UNet
    classifier: Classifier
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    ema: EMA
    batch: tuple[Tensor, Tensor, Tensor]    # x0 (B, C, H, W), t (B,), eps (B, C, H, W)
    micro: int                              # pictures at once
    precision: str

    @property
    def device(self) -> torch.device:
        return self.batch[0].device

    def micro_batches(self) -> Iterator[tuple[Tensor, ...]]:
        """x0, t and eps of so many pictures as go through the network at once."""
        return zip(*(values.split(self.micro) for values in self.batch))

    def classify(self, xt: Tensor, t: Tensor) -> Tensor:
        """Logits, of a view of x_t: torch's counter of FLOPs fails where a gradient is with respect to the
        very tensor that a module was given.
        """
        return self.classifier(xt.view_as(xt), t)


def prepare(network: Network, options: Options, device: torch.device) -> Work:
    """The network as train_tan.py prepares it, with random pictures, psi and classifier."""
    torch.manual_seed(0)
    model, schedule = network.model.eval(), network.schedule
    usual = settings.suited(settings.Options(method="tan", adaptor=options.adaptor), network)
    adaptor.attach(model, usual.adaptor_width, usual.adaptor)
    network.to(device)
    for p in model.parameters():
        if not p.any():  # a GPU is faster on zeros, with which a new layer begins
            nn.init.normal_(p, std=0.02)
    model.use_checkpoint = options.checkpoint_blocks
    psi = adaptor.parameters(model)
    classifier = from_unet(model).to(device, memory_format=distributed.layout(device)).requires_grad_(False)
    classifier.use_checkpoint = options.checkpoint_blocks
    theta = adaptor.source_model(model)
    speed_up([model, theta], options.precision, options.adaptor, options.compile)
    b = options.batch_size or usual.batch_size
    g = generator(0)
    x0 = (torch.rand(b, *network.shape, generator=g) * 2 - 1).to(device)
    t = torch.randint(schedule.timesteps, (b,), generator=g).to(device)
    eps = torch.randn(b, *network.shape, generator=g).to(device)
    return Work(model, theta, classifier, schedule,
                torch.optim.Adam(psi, lr=1e-5, fused=device.type == "cuda"),
                EMA(psi, 0.99), (x0, t, eps), min(options.micro_batch_size or b, b),
                options.precision)


# ---- what is timed -----------------------------------------------------------------------------------------

def pgd_step(work: Work, model: UNet) -> None:
    """One step of the ascent for the whole batch."""
    for x0, t, eps in work.micro_batches():
        with distributed.autocast(work.device, work.precision):
            worst_case_noise(model, work.schedule, x0, t, eps, 1, REACH)


def iteration(work: Work, steps: int, ascend: Callable = worst_case_noise) -> None:
    """An iteration of train_tan.py with --method tan and J = `steps`, in the order of its loop."""
    work.optimizer.zero_grad()
    b, stats = len(work.batch[0]), Stats(work.schedule.timesteps, work.device)
    for x0, t, eps in work.micro_batches():
        with distributed.autocast(work.device, work.precision):
            eps_star, pgd_losses = ascend(work.model, work.schedule, x0, t, eps, steps, REACH / steps)
            xt = work.schedule.add_noise(x0, t, eps_star)
            eps_theta = predict_eps(work.model, xt, t, work.schedule)
            guidance = similarity_guidance(work.classify, work.schedule, xt, t, gamma=5.0)
            losses = guided_loss(eps_star, eps_theta, guidance)
        (losses.sum() / b).backward()
        stats.add(t, losses.detach(), guidance, eps_star - eps_theta.detach(), pgd_losses)
    stats.reduce()
    torch.nn.utils.get_total_norm([p.grad for p in work.ema.parameters]).item()
    work.optimizer.step()
    work.ema.update()


def plain_ascent(model: nn.Module, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, steps: int,
                 omega: float) -> tuple[Tensor, list[Tensor]]:
    """`worst_case_noise` by loss.backward(), which also computes the gradients of the parameters."""
    losses = []
    for _ in range(steps):
        eps = eps.detach().requires_grad_()
        loss = denoising_loss(model, schedule, x0, t, eps)
        loss.sum().backward()
        eps = norm(eps + omega * eps.grad)
        losses.append(loss.detach())
    model.zero_grad()
    return eps.detach(), losses


def plain_iteration(work: Work) -> None:
    """The iteration of the plain recipe; afterwards all is as before, but for a step of psi."""
    frozen = [p for p in work.model.parameters() if not p.requires_grad]
    networks = (work.model, work.classifier)
    before = [network.use_checkpoint for network in networks]
    for network in networks:
        network.use_checkpoint = True
    work.model.requires_grad_(True)
    try:
        with eager():
            iteration(work, PLAIN_STEPS, plain_ascent)
    finally:  # also where memory runs out
        for network, used in zip(networks, before):
            network.use_checkpoint = used
        for p in frozen:
            p.requires_grad_(False).grad = None


# ---- the table ---------------------------------------------------------------------------------------------

HEAD = ["network", "pictures", "J", "PGD step, theta", "with psi", "ratio", "iteration", "peak memory",
        "FLOPs", "floor", "iteration / floor", "plain recipe", "plain / iteration"]


def measure(name: str, work: Work, options: Options, micro: int) -> list[list[str]]:
    """A row of the table for each J, with so many pictures at once."""
    work, device = dataclasses.replace(work, micro=micro), work.device
    steps = tuple(dict.fromkeys(options.pgd_steps))
    together = dataclasses.replace(work, batch=next(work.micro_batches()))
    with distributed.autocast(device, work.precision), eager():
        found = convolutions(work.theta, *together.batch[:2])
    iterations = {J: functools.partial(iteration, work, J) for J in steps}
    jobs = {"theta": functools.partial(pgd_step, work, work.theta),
            "psi": functools.partial(pgd_step, work, work.model),
            "plain": functools.partial(plain_iteration, work), **iterations}
    timed = {key: functools.partial(seconds, job, device) for key, job in jobs.items()}
    timed["floor"] = functools.partial(floor, found, device, work.precision)

    counted, peaks, best = {}, {}, dict.fromkeys(timed, float("inf"))
    with bar(None, name, total=(1 + options.repeats) * len(timed)) as rounds:
        for job in timed.values():  # to warm up, and to compile what is to be compiled
            job()
            rounds.update()
        for J, job in iterations.items():
            peaks[J] = peak_memory(job, device)
            with eager():
                counted[J] = flops(functools.partial(iteration, together, J)) * len(work.batch[0]) / micro
        for _ in range(options.repeats):
            for key, job in timed.items():
                best[key] = min(best[key], job())
                rounds.update()
    b = len(work.batch[0])
    best["floor"] *= b / work.micro  # from one micro-batch to the batch
    pictures = f"{b} by {work.micro}" if work.micro < b else f"{b}"
    return [[name, pictures, f"{J}", *row(J, best, peaks[J], counted[J])] for J in steps]


def rows_of(name: str, network: Network, options: Options, device: torch.device) -> list[list[str]]:
    """`measure` with as many pictures at once as fit."""
    work = prepare(network, options, device)
    return fitting(functools.partial(measure, name, work, options), work.micro, "--micro-batch-size")


def row(J: int, best: dict[str | int, float], peak: int, count: float) -> list[str]:
    """The cells of a row after its J."""
    lowest = (1 + J) * best["floor"]
    return [f"{best['theta']:.3f} s", f"{best['psi']:.3f} s", f"{best['psi'] / best['theta']:.2f}",
            f"{best[J]:.3f} s", f"{peak / 2 ** 30:.2f} GiB", f"{count / 1e12:.3f} T", f"{lowest:.3f} s",
            f"{best[J] / lowest:.2f}", f"{best['plain']:.3f} s", f"{best['plain'] / best[J]:.2f}"]


def networks(options: Options) -> Iterator[tuple[str, Network]]:
    """Those of --source and --arch with their names, one at a time."""
    if options.source or not options.arch:
        name = options.source or "toyfaces"
        yield Path(name).name, load_diffusion_model(name)
    for name in dict.fromkeys(options.arch):
        torch.manual_seed(0)
        yield name, build(ARCHITECTURES[name], name)


def main() -> None:
    options, _ = parse(Options, __doc__)
    device = distributed.setup_alone(options.device, "experiments.benchmark")
    at_least(options, pgd_steps=1, batch_size=1, micro_batch_size=1, repeats=1)
    if not options.pgd_steps:
        raise InputError("--pgd-steps: give at least one")
    rows = []
    for name, network in networks(options):
        if device.type == "cpu" and sum(p.numel() for p in network.model.parameters()) > 5e7:
            say(f"note: {name} takes hours on a CPU and gigabytes a picture, with --batch-size 1 --repeats 1 "
                "the better part of an hour")
        rows += rows_of(name, network, options, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    how = ", activations recomputed" * options.checkpoint_blocks + ", compiled" * options.compile
    title = (f"{device_name(device)}; torch {torch.__version__}, {options.precision}{how}; psi: "
             f"{options.adaptor}; shortest of {options.repeats}")
    print(markdown(title, HEAD, rows))


if __name__ == "__main__":
    run(main)
