"""DDPM-PA (Zhu et al. 2022), the paper's diffusion baseline: keep how alike the pictures of a batch are.

The pictures that the adapted network predicts (x_0) of a noised batch are to differ among themselves as the
source network's do, once as they are and once in their fine detail; a third term pulls the detail towards the
training pictures. "Batch" is what goes through the network at once: with micro-batches or several processes,
each compares its own.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import Schedule, predict_eps


class PairwiseLosses:
    """What DDPM-PA adds to Eq. 1, picture by picture.  Made before training: it copies the source network.

    clip       the predicted x_0 is limited to [-clip, clip], as in sampling: at the noisiest
               timesteps an error in eps becomes one in x_0 of more than a hundred times that size
    weights    of the three terms, as in `pairwise_loss`
    """

    def __init__(self, model: nn.Module, schedule: Schedule, clip: float,
                 weights: tuple[float, float, float]):
        self.source = copy.deepcopy(model).requires_grad_(False)
        self.schedule, self.clip, self.weights = schedule, clip, weights

    def __call__(self, xt: Tensor, t: Tensor, eps_theta: Tensor, x0: Tensor) -> Tensor:
        """x_t, timesteps, the adapted network's eps and the training pictures, (B, ...) each -> (B,).

        Each picture's gradient is scaled with alpha_bar_t, which Zhu et al. do not: an error of eps
        becomes sqrt((1 - alpha_bar_t) / alpha_bar_t) times as large in x_0, with the linear schedule a factor
        of 157 at the noisiest timestep, and without the scale those few pictures drown Eq. 1.
        """
        with torch.no_grad():
            eps_source = predict_eps(self.source, xt, t, self.schedule)
        adapted, source = (self.schedule.predict_x0(xt, t, eps).clamp(-self.clip, self.clip)
                           for eps in (eps_theta, eps_source))
        adapted = scale_gradient(adapted, self.schedule.at(t, adapted))
        with torch.autocast(xt.device.type, enabled=False):  # bf16 does not tell nearly equal networks apart
            return pairwise_loss(adapted, source, x0, *self.weights)


def high_frequency(x: Tensor) -> Tensor:
    """LH + HL + HH of the Haar wavelet: (B, C, H, W), even sides -> (B, C, H/2, W/2)."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    lh, hl, hh = c + d - a - b, b + d - a - c, a + d - b - c
    return (lh + hl + hh) / 2


def log_similarities(x: Tensor) -> Tensor:
    """Log-softmax over the other pictures of each one's cosine similarity to them: (B, ...) -> (B, B - 1)."""
    x, n = F.normalize(x.flatten(1), dim=1), len(x)
    # Without its first entry and folded at n + 1, the matrix has its diagonal in the last column.
    others = (x @ x.T).flatten()[1:].view(n - 1, n + 1)[:, :-1]
    return others.reshape(n, n - 1).log_softmax(1)


def divergence(adapted: Tensor, source: Tensor) -> Tensor:
    """KL(adapted || source) of each one's similarities to the others: (B, ...) twice -> (B,)."""
    log_p, log_q = log_similarities(adapted), log_similarities(source)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`.

    A weight on each picture's loss would not do: x_i enters the others' losses, too.
    """
    return factor * x + (1 - factor) * x.detach()


def pairwise_loss(adapted: Tensor, source: Tensor, x0: Tensor, image_weight: float,
                  detail_weight: float, mse_weight: float) -> Tensor:
    """(B, C, H, W) predicted x_0 of the adapted and of the source network, and the training pictures -> (B,).

    image_weight     of KL(adapted || source), the direction Zhu et al. print, of the pictures' similarities
    detail_weight    of the same for their `high_frequency`
    mse_weight       of the mean squared error of `high_frequency` against the training pictures
    With one picture the first two terms are 0.
    """
    detail = high_frequency(adapted)
    mse = (detail - high_frequency(x0)).square().flatten(1).mean(1)
    of_pictures, of_detail = divergence(adapted, source), divergence(detail, high_frequency(source))
    return image_weight * of_pictures + detail_weight * of_detail + mse_weight * mse
