"""How a GAN learns, from nothing (pretrain.py) or from a source (gan_transfer.py): two steps an iteration.

What a method of transfer adds, and where, is a class with the same functions as `Plain`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.stylegan2 import Discriminator, Generator, group_size
from plumbing import distributed
from plumbing.options import InputError
from plumbing.seeds import generator as stream
from plumbing.training import EMA, Loop

PATH_EVERY = 4  # iterations, of the path length penalty
PATH_DECAY = 0.01  # of the running mean of path lengths
REMEDY = "start again with --overwrite and a lower --learning-rate, or a higher --r1"


# ---- losses ------------------------------------------------------------------------------------------------

def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logistic loss of logits of any shape: -log sigmoid(real) - log(1 - sigmoid(fake)), averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating (Goodfellow et al. 2014): -log sigmoid(fake), averaged."""
    return F.softplus(-fake).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """|d logit / d picture|^2 of real pictures, averaged over them (Mescheder et al. 2018); times gamma / 2.

    logits (B, ...) of the first B of these images (N, 3, H, W), which require a gradient -> scalar that can
    be descended
    """
    gradient, = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum() / len(logits)


def path_lengths(images: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """|J^T y| / sqrt(pixels) for normal y, J = d picture / d w (Karras et al. 2020b, section 3.2).

    images, y (B, 3, H, W), the images made of w (B, style_dim) -> (B,); what is descended is their squared
    distance to a running mean
    """
    y = y / math.sqrt(images[0, 0].numel())
    gradient, = torch.autograd.grad((images * y).sum(), w, create_graph=True)
    return gradient.square().sum(1).sqrt()


# ---- the two turns -----------------------------------------------------------------------------------------

def check_groups(batch_size: int, judged: Callable[[int], int] = int) -> None:
    """InputError for a batch whose pictures the discriminator cannot compare with each other.

    judged   how many of n pictures it sees whole
    """
    world = distributed.world()
    for count in {judged(batch_size // world), judged(-(-batch_size // world))}:
        if group_size(count) == 1:
            raise InputError(f"--batch-size {batch_size}: the discriminator compares pictures in groups of "
                             f"4, 3 or 2, and would see {count} at once; choose another one")


class Plain:
    """What every method may add to the loop; here it is nothing."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        """What learns with the discriminator, beside its own, and is kept with it."""
        self.state: dict[str, Tensor] = {}
        """What a checkpoint keeps."""

    def learning(self, discriminator: Discriminator) -> list[nn.Parameter]:
        """The parameters of the discriminator that learn."""
        return list(discriminator.parameters())

    def latents(self, n: int, style_dim: int, g: torch.Generator) -> Tensor:
        """z (n, style_dim)."""
        return torch.randn(n, style_dim, generator=g)

    def augment(self, images: Tensor, g: torch.Generator) -> Tensor:
        """What the discriminator sees of pictures (B, 3, H, W)."""
        return images

    def judge(self, discriminator: Discriminator, images: Tensor, fake: bool) -> list[Tensor]:
        """Logits, in groups whose losses are added; those of whole pictures come first."""
        return [discriminator(images)]

    def discriminator_term(self, discriminator: Discriminator, real: Tensor, fake: Tensor, z: Tensor,
                           noise: list[Tensor]) -> Tensor | float:
        """Added to the discriminator's loss."""
        return 0.0

    def generator_term(self, generator: Generator, features: list[Tensor], z: Tensor,
                       noise: list[Tensor]) -> Tensor | float:
        """Added to the generator's loss; `features` as from `synthesize`."""
        return 0.0

    def observe(self, real: Tensor) -> dict[str, float]:
        """Told the discriminator's logits of real pictures; what to add to metrics.jsonl."""
        return {}


class Players:
    """Generator and discriminator, which learn in turn with one optimiser.

    batch_size    pictures an iteration, over all ranks; each has its share
    r1            weight of the R1 penalty, which is computed every `r1_every` iterations, so many times as
                  large
    path_length   weight of the path length penalty, computed every PATH_EVERY iterations likewise; 0: none
    """

    def __init__(self, generator: Generator, discriminator: Discriminator, method: Plain, batch_size: int,
                 learning_rate: float, r1: float, r1_every: int, path_length: float):
        self.generator, self.discriminator, self.method = generator, discriminator, method
        self.r1, self.r1_every, self.path_length = r1, r1_every, path_length
        self.batch_size, self.mine = batch_size, distributed.share(batch_size)
        self.part = (self.mine.stop - self.mine.start) / batch_size
        self.device = next(generator.parameters()).device
        self.drawing = list(generator.parameters())
        self.judging = method.learning(discriminator.requires_grad_(False)) + method.parameters
        self.parameters = self.drawing + self.judging
        # Adam passes by what has no gradient: the one whose turn it is not.
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=(0.0, 0.99))
        self.state = dict(method.state, path_length=torch.zeros((), device=self.device))

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the `state` that a checkpoint kept as gan."""
        for name, value in self.state.items():
            value.copy_(checkpoint["gan"][name])

    def draw(self, g: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Latents (B, style_dim) and noise of each layer, of this rank's pictures."""
        z = self.method.latents(self.batch_size, self.generator.style_dim, g)
        noise = self.generator.draw_noise(self.batch_size, g)
        return z[self.mine].to(self.device), [values[self.mine].to(self.device) for values in noise]

    def discriminator_turn(self, real: Tensor, z: Tensor, noise: list[Tensor], iteration: int,
                           g: torch.Generator) -> dict[str, float]:
        """Leaves the gradient of the discriminator's loss of real pictures (B, 3, H, W) and of those drawn
        from z (B, style_dim); returns what to watch, the loss among it.
        """
        self.optimizer.zero_grad()
        for p in self.judging:
            p.requires_grad_(True)
        with torch.no_grad():
            fake = self.generator.synthesize(self.generator.style(z), noise)[0]
        method, penalised = self.method, self.r1 > 0 and iteration % self.r1_every == 0
        seen = method.augment(real, g).detach().requires_grad_(penalised)
        of_real = method.judge(self.discriminator, seen, fake=False)
        of_fake = method.judge(self.discriminator, method.augment(fake, g), fake=True)
        loss = sum(discriminator_loss(a, b) for a, b in zip(of_real, of_fake, strict=True))
        loss = loss + method.discriminator_term(self.discriminator, real, fake, z, noise)
        if penalised:
            loss = loss + self.r1 / 2 * self.r1_every * r1_penalty(of_real[0], seen)
        (loss * self.part).backward()
        distributed.sum_gradients(self.judging)
        for p in self.judging:
            p.requires_grad_(False)
        figures = torch.stack([loss.detach(), of_real[0].detach().mean(), of_fake[0].detach().mean()])
        figures = distributed.sum_over_ranks(figures * self.part).tolist()
        line = dict(zip(("discriminator_loss", "real", "fake"), figures, strict=True))
        return line | method.observe(of_real[0].detach())

    def generator_turn(self, z: Tensor, noise: list[Tensor], iteration: int, g: torch.Generator) -> float:
        """Leaves the gradient of the generator's loss of pictures drawn from z (B, style_dim); returns the
        loss.
        """
        self.optimizer.zero_grad()
        w = self.generator.style(z)
        images, features = self.generator.synthesize(w, noise)
        judged = self.method.judge(self.discriminator, self.method.augment(images, g), fake=True)
        loss = sum(generator_loss(logits) for logits in judged)
        loss = loss + self.method.generator_term(self.generator, features, z, noise)
        if self.path_length and iteration % PATH_EVERY == 0:
            y = torch.randn(self.batch_size, *images.shape[1:], generator=g)[self.mine].to(self.device)
            lengths, mean = path_lengths(images, w, y), self.state["path_length"]
            mean.lerp_(distributed.sum_over_ranks(lengths.detach().mean() * self.part), PATH_DECAY)
            loss = loss + self.path_length * PATH_EVERY * (lengths - mean).square().mean()
        (loss * self.part).backward()
        distributed.sum_gradients(self.drawing)
        return distributed.sum_over_ranks(loss.detach() * self.part).item()


def play(loop: Loop, players: Players, ema: EMA, real_pictures: Callable[[torch.Generator], Tensor],
         seed: int) -> None:
    """The iterations of a GAN.  Every rank draws the whole batch and keeps its share.

    real_pictures   this rank's share, on the CPU, by these random numbers
    """
    for iteration in loop:
        g = stream(seed, 0, iteration)
        real = real_pictures(g).to(players.device)
        measured = players.discriminator_turn(real, *players.draw(g), iteration, g)
        loop.check(measured["discriminator_loss"], REMEDY)
        players.optimizer.step()
        loss = players.generator_turn(*players.draw(g), iteration, g)
        gradient_norm = loop.check(loss, REMEDY)
        players.optimizer.step()
        ema.update()
        loop.record(loss=loss, gradient_norm=gradient_norm, **measured)
