"""The losses of DDPM-PA (Zhu et al. 2022), the paper's diffusion baseline: keep how alike the pictures of a batch are.

What the network being adapted makes of a noised batch (its predicted x_0) shall be spread as the source network's is, once in the
pictures and once in their fine detail; a third term pulls the detail towards the training pictures.  "Batch" is what goes through the
network at once: with micro-batches or several processes, each compares its own pictures.  train_tan.py scales each picture's gradient with
alpha_bar_t, which the paper does not: an error of eps becomes sqrt((1 - alpha_bar_t) / alpha_bar_t) times as large in x_0, a factor of 157 at
the noisiest timestep, and without the scale those few pictures drown Eq. 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def high_frequency(x: Tensor) -> Tensor:
    """LH + HL + HH of the Haar wavelet: (B, C, H, W), even sides -> (B, C, H/2, W/2)."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    lh, hl, hh = c + d - a - b, b + d - a - c, a + d - b - c
    return (lh + hl + hh) / 2


def log_similarities(x: Tensor) -> Tensor:
    """Log-softmax over the other pictures of each one's cosine similarity to them: (B, ...) -> (B, B - 1)."""
    x = F.normalize(x.flatten(1), dim=1)
    others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    return (x @ x.T)[others].view(len(x), -1).log_softmax(1)


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x itself, whose gradient is multiplied by `factor`.  A weight on each picture's loss would not do: x_i enters the others' losses, too."""
    return factor * x + (1 - factor) * x.detach()


def pairwise_loss(adapted: Tensor, source: Tensor, x0: Tensor, image: float, detail: float, detail_mse: float) -> Tensor:
    """(B, C, H, W) predicted x_0 of the adapted and of the source network, and the training pictures -> (B,), to be added to Eq. 1.

    `image` and `detail` weigh KL(adapted || source) of the similarities, as the paper prints it, of pictures and of their detail,
    `detail_mse` the detail's mean squared error.  With one picture there is nothing to compare and the first two are 0.
    """
    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        p, q = log_similarities(ours), log_similarities(theirs)
        return (p.exp() * (p - q)).sum(1)

    fine = high_frequency(adapted)
    mse = (fine - high_frequency(x0)).square().flatten(1).mean(1)
    return image * divergence(adapted, source) + detail * divergence(fine, high_frequency(source)) + detail_mse * mse
