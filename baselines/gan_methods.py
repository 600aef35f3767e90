"""What each GAN baseline adds to the loop of gan_training.py, with its paper's equation: the five that the
paper compares with, and FreezeD, which it cites.

    TGAN      Wang et al. 2018      nothing: `Plain`
    TGAN+ADA  Karras et al. 2020a   augmentations before the discriminator
    FreezeD   Mo et al. 2020        a discriminator whose first layers do not learn
    EWC       Li et al. 2020        a penalty on changes of weights that matter to the source
    CDC       Ojha et al. 2021      pictures that are as alike as the source's; patches for most of them
    DCL       Zhao et al. 2022      contrastive losses between source and adapted networks

What each function means and when it is called: gan_training.Plain and Players.  Where a paper leaves
something open, docs/reading-notes.md says what is done here.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.augment import augment
from baselines.gan_training import Plain, generator_loss
from baselines.pairwise import divergence
from baselines.stylegan2 import Discriminator, EqualConv2d, Generator
from plumbing.options import Unset
from plumbing.progress import bar
from plumbing.seeds import generator as stream


@dataclasses.dataclass
class Numbers:
    """Numbers of the methods."""

    ada_target: float = 0.6
    """ada: what r_t, the mean sign of the logits of training pictures, is to be."""
    ada_images: int = 20_000
    """ada: pictures over which the probability may rise from 0 to 1 (500,000 in its paper's long runs)."""
    freeze_blocks: Unset[int] = None
    """freezed: blocks of the discriminator that do not learn, beside the layer that sees the picture
    (default: 1; above 64 pixels 3, which leaves three at 256)."""
    ewc_weight: Unset[float] = None
    """ewc: lambda (default: 300; above 64 pixels 5e8)."""
    fisher_samples: int = 256
    """ewc: pictures of the source from which the Fisher information is measured."""
    cdc_weight: Unset[float] = None
    """cdc: of the distance consistency (default: 10; above 64 pixels 1000)."""
    anchor_spread: float = 0.05
    """cdc: standard deviation of the noise around an anchor."""
    patch_block: int = 1
    """cdc: block of the discriminator whose output is judged patch by patch; 0 sees single pixels."""
    dcl_weights: tuple[float, ...] = (2.0, 0.5)
    """dcl: lambda_1 of the generator's contrastive loss, lambda_2 of the discriminator's."""


class ADA(Plain):
    """Augmentations with a probability p that follows how far the discriminator has overfitted:

        r_t = E[sign D(x)], x the training pictures; p rises while r_t > target, and falls below it
    """

    def __init__(self, target: float, images: int):
        super().__init__()
        self.target, self.images = target, images
        self.state = dict(p=torch.zeros(()))

    def augment(self, images: Tensor, g: torch.Generator) -> Tensor:
        return augment(images, self.state["p"].item(), g)

    def observe(self, real: Tensor) -> dict[str, float]:
        r = real.sign().mean().item()
        step = len(real) / self.images * (1 if r > self.target else -1)
        self.state["p"].add_(step).clamp_(0, 1)
        return dict(ada_r=r, ada_p=self.state["p"].item())


class FreezeD(Plain):
    """The discriminator's first layers, which see edges and textures, stay the source's: the one that takes
    colours to features, and so many blocks after it.
    """

    def __init__(self, blocks: int):
        super().__init__()
        self.blocks = blocks

    def learning(self, discriminator: Discriminator) -> list[nn.Parameter]:
        frozen = {id(p) for p in discriminator.convs[:1 + self.blocks].parameters()}
        return [p for p in discriminator.parameters() if id(p) not in frozen]


class EWC(Plain):
    """lambda sum_i F_i (theta_i - theta_S,i)^2, with the Fisher information F_i of the source's weights."""

    def __init__(self, generator: Generator, discriminator: Discriminator, weight: float, samples: int,
                 seed: int):
        super().__init__()
        self.weight = weight
        self.source = [p.detach().clone() for p in generator.parameters()]
        self.fisher = fisher_information(generator, discriminator, samples, seed,
                                         functools.partial(bar, text="Fisher information"))

    def generator_term(self, generator: Generator, features: list[Tensor], z: Tensor,
                       noise: list[Tensor]) -> Tensor:
        terms = [(f * (p - before).square()).sum()
                 for f, p, before in zip(self.fisher, generator.parameters(), self.source, strict=True)]
        return self.weight * torch.stack(terms).sum()


def fisher_information(generator: Generator, discriminator: Discriminator, samples: int, seed: int,
                       progress: Callable[[Iterable], Iterable] = iter) -> list[Tensor]:
    """E[(d log L / d theta_i)^2] over pictures that the source draws, for each of its weights.

    log L is what stands for the log-likelihood of a picture: log sigmoid of the discriminator's logit.
    """
    parameters, g = list(generator.requires_grad_(True).parameters()), stream(seed, 1)
    discriminator.requires_grad_(False)
    fisher = [torch.zeros_like(p) for p in parameters]
    for _ in progress(range(samples)):
        z = torch.randn(1, generator.style_dim, generator=g).to(parameters[0].device)
        noise = [n.to(z.device) for n in generator.draw_noise(1, g)]
        logits = discriminator(generator.synthesize(generator.style(z), noise)[0])
        gradients = torch.autograd.grad(generator_loss(logits), parameters)
        for f, gradient in zip(fisher, gradients, strict=True):
            f.addcmul_(gradient, gradient, value=1 / samples)
    return fisher


class CDC(Plain):
    """Pictures are to be as alike as the source's of the same latents, in every layer l of the generator:

        y_i = softmax over j != i of cos(G^l(z_i), G^l(z_j))
        weight * mean over l and i of KL(y_i adapted || y_i source)

    Drawn pictures are judged whole only near a few fixed latents, the anchors, as many as there are training
    pictures; elsewhere patch by patch.
    """

    def __init__(self, source: Generator, discriminator: Discriminator, anchors: int, weight: float,
                 spread: float, patch_block: int, seed: int):
        super().__init__()
        g = stream(seed, 2)
        self.source, self.weight, self.spread, self.block = source, weight, spread, patch_block
        self.anchors = torch.randn(anchors, source.style_dim, generator=g)
        self.patch = EqualConv2d(discriminator.widths[patch_block], 1, 1)
        with torch.no_grad():
            self.patch.weight.copy_(torch.randn(self.patch.weight.shape, generator=g))
        self.patch.to(next(discriminator.parameters()).device)
        self.parameters = list(self.patch.parameters())

    def latents(self, n: int, style_dim: int, g: torch.Generator) -> Tensor:
        """The first, as many as are judged `whole`, around anchors."""
        z = super().latents(n, style_dim, g)
        k = whole(n)
        near = self.anchors[torch.randint(len(self.anchors), (k,), generator=g)]
        z[:k] = near + self.spread * z[:k]
        return z

    def judge(self, discriminator: Discriminator, images: Tensor, fake: bool) -> list[Tensor]:
        features, k = discriminator.features(images), whole(len(images))
        first = k if fake else 0  # what lies around anchors is not judged in patches
        return [discriminator.decide(features[-1][:k]), self.patch(features[self.block][first:])]

    def generator_term(self, generator: Generator, features: list[Tensor], z: Tensor,
                       noise: list[Tensor]) -> Tensor:
        before = source_features(self.source, z, noise)[1]
        terms = [divergence(ours, theirs).mean() for ours, theirs in zip(features, before, strict=True)]
        return self.weight * torch.stack(terms).mean()


def whole(n: int) -> int:
    """How many of n pictures, real or drawn, CDC judges whole: a quarter, at least two to compare."""
    return min(n, max(2, n // 4))


@torch.no_grad()
def source_features(source: Generator, z: Tensor, noise: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What the source's generator makes of the same latents and noise: `synthesize`."""
    return source.synthesize(source.style(z), noise)


class DCL(Plain):
    """Each picture is to be nearer to the source's from the same latent than to others, in every layer l:

        generator       -log f(G_i, S_i) / (f(G_i, S_i) + sum over j != i of f(G_i, S_j))
        discriminator   -log f(D(G_i), D(S_i)) / (f(D(G_i), D(S_i)) + sum over j of f(D(G_i), D(x_j)))

    f(a, b) = exp(cos(a, b) / 0.07); G and S are pictures of the adapted and of the source's generator, x
    training pictures.
    """

    def __init__(self, source: Generator, weights: tuple[float, ...]):
        super().__init__()
        self.source, (self.of_generator, self.of_discriminator) = source, weights

    def generator_term(self, generator: Generator, features: list[Tensor], z: Tensor,
                       noise: list[Tensor]) -> Tensor:
        before = source_features(self.source, z, noise)[1]
        terms = [contrast_in_batch(ours, theirs) for ours, theirs in zip(features, before, strict=True)]
        return self.of_generator * torch.stack(terms).mean()

    def discriminator_term(self, discriminator: Discriminator, real: Tensor, fake: Tensor, z: Tensor,
                           noise: list[Tensor]) -> Tensor:
        of_source = source_features(self.source, z, noise)[0]
        layers = zip(*(discriminator.features(images) for images in (fake, of_source, real)), strict=True)
        terms = [contrast_to_real(*of_layer) for of_layer in layers]
        return self.of_discriminator * torch.stack(terms).mean()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """cos(a_i, b_j) / 0.07: (N, ...), (M, ...) -> (N, M)."""
    return F.normalize(a.flatten(1), dim=1) @ F.normalize(b.flatten(1), dim=1).T / 0.07


def contrast_in_batch(adapted: Tensor, source: Tensor) -> Tensor:
    """The generator's loss in a layer: (B, ...) twice, of the same latents -> scalar."""
    return F.cross_entropy(cosines(adapted, source), torch.arange(len(adapted), device=adapted.device))


def contrast_to_real(fake: Tensor, of_source: Tensor, real: Tensor) -> Tensor:
    """The discriminator's loss in a layer: (B, ...), (B, ...), (M, ...) -> scalar."""
    alike = cosines(fake, of_source).diagonal()                                                  # (B,)
    logits = torch.cat([alike[:, None], cosines(fake, real)], 1)                                 # (B, 1 + M)
    return F.cross_entropy(logits, torch.zeros(len(fake), dtype=torch.long, device=fake.device))


@dataclasses.dataclass(frozen=True)
class Method:
    """What a method is, and what it alone uses."""

    text: str
    options: tuple[str, ...] = ()   # of Numbers
    passes: int = 2                 # through the generator in an iteration


METHODS = {
    "tgan": Method("generator and discriminator go on from the source's (Wang et al. 2018)"),
    "ada": Method("TGAN with augmentations before the discriminator (Karras et al. 2020a)",
                  ("ada_target", "ada_images")),
    "freezed": Method("the discriminator's first layers do not learn (Mo et al. 2020)", ("freeze_blocks",)),
    "ewc": Method("a penalty on changing weights that matter to the source (Li et al. 2020)",
                  ("ewc_weight", "fisher_samples")),
    "cdc": Method("pictures as alike as the source's; patches (Ojha et al. 2021)",
                  ("cdc_weight", "anchor_spread", "patch_block"), passes=3),
    "dcl": Method("contrastive losses (Zhao et al. 2022)", ("dcl_weights",), passes=4),
}


def make(name: str, generator: Generator, discriminator: Discriminator, targets: int, numbers: Numbers,
         seed: int) -> Plain:
    """The method of this name.  To be made before training: EWC, CDC and DCL keep the source as it is now.

    targets   number of training pictures
    """
    def source() -> Generator:
        return copy.deepcopy(generator).requires_grad_(False)

    makers: dict[str, Callable[[], Plain]] = {
        "tgan": Plain,
        "ada": lambda: ADA(numbers.ada_target, numbers.ada_images),
        "freezed": lambda: FreezeD(numbers.freeze_blocks),
        "ewc": lambda: EWC(generator, discriminator, numbers.ewc_weight, numbers.fisher_samples, seed),
        "cdc": lambda: CDC(source(), discriminator, targets, numbers.cdc_weight, numbers.anchor_spread,
                           numbers.patch_block, seed),
        "dcl": lambda: DCL(source(), numbers.dcl_weights),
    }
    return makers[name]()
