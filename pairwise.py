"""The losses of DDPM-PA (Zhu et al. 2022), the paper's diffusion baseline: keep how alike the pictures of a batch are.

What the network being adapted makes of a noised batch (its predicted x_0) shall be spread as the source network's is, once in the
pictures and once in their fine detail; a third term pulls the detail towards the training pictures.  "Batch" is what goes through the
network at once: with micro-batches or several processes, each compares its own pictures.  train_tan.py weighs the sum with alpha_bar_t,
which the paper does not: x_0 is known from eps to within sqrt((1 - alpha_bar_t) / alpha_bar_t) of eps's own error, a factor of 157 at the
noisiest timestep, and without the weight those few pictures drown Eq. 1 and the model collapses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = dict(image=0.5, detail=0.5, detail_mse=0.05)  # beside Eq. 1; chosen on babies, where the later release's 4, 4, 1 did worse


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


def pairwise_loss(adapted: Tensor, source: Tensor, x0: Tensor) -> Tensor:
    """(B, C, H, W) predicted x_0 of the adapted and of the source network, and the training pictures -> (B,), to be added to Eq. 1.

    KL(adapted || source) of the similarities, as the paper prints it, of pictures and of detail, and the detail's mean squared error.
    With one picture there is nothing to compare and the first two are 0.
    """
    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        p, q = log_similarities(ours), log_similarities(theirs)
        return (p.exp() * (p - q)).sum(1)

    detail = high_frequency(adapted)
    mse = (detail - high_frequency(x0)).square().flatten(1).mean(1)
    return (WEIGHTS["image"] * divergence(adapted, source) + WEIGHTS["detail"] * divergence(detail, high_frequency(source))
            + WEIGHTS["detail_mse"] * mse)
