"""Adversarial noise selection (Eqs. 7, 8, 10): the Gaussian noise that the current network denoises worst.

    eps^{j+1} = Norm( eps^j + omega grad_{eps^j} || eps^j - eps_theta(x_t^j, t) ||^2 ),
    x_t^j     = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps^j

x_0 and t stay fixed through all J steps, and the gradient goes through the network.  The guidance of Eq. 7 is
left out as in the paper, which finds it hard to differentiate and almost unchanged along the way.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ddpm import Schedule, predict_eps


def norm(eps: Tensor, dims: tuple[int, ...] = (1, 2, 3), like: Tensor | None = None) -> Tensor:
    """Norm of Eq. 8: mean 0 and standard deviation 1 over `dims`, or those of the noise `like`.

    The paper does not say over which; the default is each image on its own, over (C, H, W).  Vectors of two
    numbers cannot be normalised among themselves: in two dimensions it is the batch, dims=(0,).
    """
    mean, std = _moments(eps, dims)
    wanted_mean, wanted_std = (0.0, 1.0) if like is None else _moments(like, dims)
    return (eps - mean) / std * wanted_std + wanted_mean


def _moments(eps: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return eps.mean(dims, keepdim=True), eps.std(dims, correction=0, keepdim=True)


@contextmanager
def frozen(model: Callable) -> Iterator[None]:
    """No dropout, and no parameter gradient computed or stored, inside the block; all as before after it."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
        for m in training:
            m.training = True


def denoising_loss(model: Callable, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """|| eps - eps_theta(x_t, t) ||^2, what Eqs. 8 and 10 ascend, summed over each image.

    x0, eps (B, ...), t (B,) -> (B,)
    """
    xt = schedule.add_noise(x0, t, eps)
    return (eps - predict_eps(model, xt, t, schedule)).square().flatten(1).sum(1)


def worst_case_noise(model: Callable, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, J: int = 10,
                     omega: float = 0.02, dims: tuple[int, ...] = (1, 2, 3),
                     own: bool = False) -> tuple[Tensor, list[Tensor]]:
    """eps^* of Eq. 10 for `model`, from eps^0 = eps by J steps of projected gradient ascent (PGD) at
    rate omega.

    x0, eps (B, ...), t (B,) -> eps^J (B, ...), without a graph, and the losses (B,) at eps^0, ..., eps^{J-1}.
    The loss is summed over each image and never averaged over the batch: omega means the same at every batch
    size, and with the default dims an image's noise does not depend on the images beside it.

    own    Norm restores the mean and standard deviation that each noise was drawn with, instead of 0 and 1.
           With a mean of exactly 0 the network could read from that of x_t how bright x_0 is, which fails
           in sampling
    """
    losses: list[Tensor] = []
    like = eps if own else None
    with frozen(model), torch.enable_grad():
        for _ in range(J):
            eps = eps.detach().requires_grad_()
            loss = denoising_loss(model, schedule, x0, t, eps)                       # (B,)
            grad, = torch.autograd.grad(loss.sum(), eps)
            eps = norm(eps + omega * grad, dims, like)                               # Eq. 8
            losses.append(loss.detach())
    return eps.detach(), losses
