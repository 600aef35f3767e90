"""Residual adaptors, the psi of Eq. 9: one psi^l beside every residual block of a frozen U-Net.

    x^l = theta^l(x^{l-1}) + psi^l(x^{l-1})               section 4.3; the hook is in unet.ResBlock

    psi:  average-pool -> norm -> 3x3 conv to d channels -> + time -> self-attention -> MLP -> upsample
          -> norm -> 3x3 conv (zero at the start)

    attach(unet)                  psi beside each residual block, theta frozen; the output is still the
                                  source model's, bit for bit
    parameters(unet)              what is left to train
    state_dict / load_state_dict  psi alone
    source_model(unet)            eps_theta alone, on the same weights
"""

import copy
import math

import torch.nn.functional as F
from torch import Tensor, nn

from unet import ResBlock, UNet, zero_init

import os
GRID = int(os.environ.get("GRID", 16))


class Adaptor(nn.Module):
    """psi^l: (B, C, H, W), time embedding (B, E) -> (B, C', H', W'), the output size of its residual block.

    width    d, the channels of the bottleneck
    scale    H'/H of the block: 1, 2 or 1/2
    grid     tokens a side at most: attention costs the square of their number
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, width: int, scale: float,
                 norm_groups: int, grid: int):
        super().__init__()
        self.scale, self.grid = scale, grid
        self.norm_in = nn.GroupNorm(norm_groups, channels)
        self.down = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(emb_channels, width)
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_out = nn.GroupNorm(1, width)
        self.up = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        size = [int(side * self.scale) for side in x.shape[2:]]                 # H', W'
        pooling = math.ceil(max(x.shape[2:]) / self.grid)
        h = F.avg_pool2d(x, pooling, ceil_mode=True) if pooling > 1 else x      # (B, C, H, W) -> (B, C, g, g)
        h = self.down(F.silu(self.norm_in(h)))                                  # -> (B, d, g, g)
        grid = h.shape[2:]
        h = h.flatten(2).transpose(1, 2) + self.time(F.silu(emb))[:, None]      # -> (B, g*g, d)
        q, k, v = self.qkv(self.norm_attention(h))[:, None].chunk(3, dim=3)     # (B, 1, g*g, d) each
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        h = h + self.mlp(self.norm_mlp(h))
        h = h.transpose(1, 2).unflatten(2, grid)                                # -> (B, d, g, g)
        h = F.interpolate(h, size, mode="bilinear") if [*grid] != size else h   # -> (B, d, H', W')
        return self.up(F.silu(self.norm_out(h)))                                # -> (B, C', H', W')


def default_width(unet: UNet) -> int:
    """The d at which psi has 1.4 % of theta's parameters, between the paper's 1.3 % (DDPM) and 1.6 % (LDM).

    At least 4.
    """
    # The two 3x3 convolutions and the time layer; the rest of psi^l is small beside them.
    per_channel = sum(9 * (b.channels + b.out_channels) + b.emb_channels for b in blocks(unet).values())
    return max(4, round(0.014 * sum(p.numel() for p in unet.parameters()) / per_channel))


def blocks(unet: UNet) -> dict[str, ResBlock]:
    """The residual blocks by name, in the order of the forward pass."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, ResBlock)}


def attach(unet: UNet, width: int | None = None) -> None:
    """Freeze theta and put a fresh psi beside each residual block; ValueError if there is one already."""
    if any(block.adaptor is not None for block in blocks(unet).values()):
        raise ValueError("this U-Net already has adaptors")
    width, device = width or default_width(unet), next(unet.parameters()).device
    grid = GRID
    unet.requires_grad_(False)
    for block in blocks(unet).values():
        psi = Adaptor(block.channels, block.emb_channels, block.out_channels, width, block.scale,
                      unet.norm_groups, grid)
        block.adaptor = psi.to(device)


def parameters(unet: UNet) -> list[nn.Parameter]:
    """psi, in a fixed order."""
    return [p for block in blocks(unet).values() for p in block.adaptor.parameters()]


def parameter_rate(unet: UNet) -> float:
    """Number of psi's parameters over that of theta's (Table 1, second column)."""
    psi = sum(p.numel() for p in parameters(unet))
    return psi / (sum(p.numel() for p in unet.parameters()) - psi)


def state_dict(unet: UNet) -> dict[str, Tensor]:
    """psi alone, under the names it has in the U-Net."""
    return {key: value for key, value in unet.state_dict().items() if ".adaptor." in key}


def load_state_dict(unet: UNet, psi: dict[str, Tensor]) -> None:
    """Fill psi.  Raises KeyError naming the first key that is missing, unexpected or misshapen."""
    own = state_dict(unet)
    for key in sorted(own.keys() | psi.keys()):
        if key not in own or key not in psi:
            raise KeyError(f"adaptor weights: {'unexpected' if key not in own else 'missing'} key {key}")
        if own[key].shape != psi[key].shape:
            raise KeyError(f"adaptor weights: {key} has shape {tuple(psi[key].shape)}, "
                           f"expected {tuple(own[key].shape)}")
    for key, value in psi.items():
        own[key].copy_(value)


def source_model(unet: UNet) -> UNet:
    """eps_theta without psi: another U-Net that shares all weights of theta with this one."""
    theta = copy.deepcopy(unet, memo={id(p): p for p in unet.parameters()})
    for block in blocks(theta).values():
        block.adaptor = None
    return theta
