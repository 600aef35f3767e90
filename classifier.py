"""The noised, timestep-conditioned classifier p_phi(y | x_t) of Eq. 5, and the gradient of its log-probability.

The network is guided-diffusion's ADM encoder with attention pooling, under its parameter names: the published ImageNet
classifier loads, its 1000-way head is replaced by a 2-way one, and ten target pictures against source pictures fine-tune it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import Schedule
from unet import Encoder, attend

SOURCE, TARGET = 0, 1


class AttentionPool(nn.Module):
    """One attention layer whose only query that counts is the mean of all tokens (as in CLIP): (B, C, H, W) -> (B, out)."""

    def __init__(self, tokens: int, channels: int, num_heads: int, out_channels: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels ** 0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)                                                            # (B, C, H, W) -> (B, C, L)
        h = torch.cat([h.mean(2, keepdim=True), h], dim=2)                          # -> (B, C, 1 + L)
        h = h + self.positional_embedding.to(h.dtype)
        q, k, v = self.qkv_proj(h).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B, heads, width, 1 + L) each
        return self.c_proj(attend(q, k, v)[:, :, :1]).squeeze(2)                    # -> (B, out)


class Classifier(Encoder):
    """Logits (B, out_channels) of x_t: float (B, C, H, W), int (B,).  The options are `Encoder`'s; H = W = image_size."""

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
                 attention_resolutions: tuple[int, ...], channel_mult: tuple[int, ...], num_head_channels: int,
                 pool: str = "attention", **options):
        if pool != "attention":
            raise ValueError(f"classifier pool '{pool}': only 'attention' exists here")
        super().__init__(image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                         channel_mult, num_head_channels=num_head_channels, **options)
        tokens = (image_size // self.factor) ** 2
        self.out = nn.Sequential(nn.GroupNorm(self.norm_groups, self.channels), nn.SiLU(),
                                 AttentionPool(tokens, self.channels, self.channels // num_head_channels, out_channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.encode(x, t)[0])  # (B, C, H, W) -> (B, C', h, w) -> (B, out_channels)


def replace_head(model: Classifier, classes: int = 2) -> None:
    """A new last layer for `classes` answers; everything before it keeps its pre-training."""
    pool = model.out[2]
    pool.c_proj = nn.Conv1d(pool.c_proj.in_channels, classes, 1).to(pool.c_proj.weight.device)
    model.out_channels = classes


def log_prob_gradient(model: Classifier, xt: Tensor, t: Tensor, label: int = TARGET) -> Tensor:
    """grad_{x_t} log p_phi(y = label | x_t), shape of xt, float32.  Each image's own gradient: nothing is averaged."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = F.log_softmax(model(xt, t).float(), dim=1)[:, label]    # (B, classes) -> (B,)
        return torch.autograd.grad(log_p.sum(), xt)[0]
