"""Residual adaptors, the psi of Eq. 9: one psi^l beside every layer, here residual block, of a frozen U-Net.

    x^l = theta^l(x^{l-1}) + psi^l(x^{l-1})               section 4.3; the hook is in unet.ResBlock
                                                          (both also see the time embedding)

    psi:  average-pool -> norm -> 3x3 conv to d channels -> + time -> attention -> MLP -> upsample
          -> norm -> 3x3 conv (zero at the start)

That is the form "bottleneck".  Two others change theta's own layers, in residual and attention blocks:

    scale-shift   ScaleShift, in each norm          scale and shift per channel (Noguchi & Harada 2019)
    low-rank      LowRank, in each convolution      W + (alpha / r) B A (LoRA: Hu et al. 2021)

    attach(unet)                  psi in its places, theta frozen; the output is still the source model's,
                                  bit for bit
    parameters(unet)              what is left to train
    state_dict / load_state_dict  psi alone
    source_model(unet)            eps_theta alone, on the same weights
    fold(unet)                    psi into theta, where its form allows that
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import AttentionBlock, GroupNorm, ResBlock, UNet, zero_init

# The forms of psi, and the layers of residual and attention blocks that it goes to.
FORMS = {"bottleneck": ResBlock, "scale-shift": nn.GroupNorm, "low-rank": (nn.Conv1d, nn.Conv2d)}
ALPHA = RANK = 4  # of LoRA: so that its factor alpha / r is 1 at the default rank r


def by_axis(x: Tensor, of_height: Callable[[Tensor], Tensor], of_width: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, C, H, W) -> (B, C, H', W') by a linear map of each axis, (1, n, n) -> (1, n, n'), as products.

    For GPUs, which take several times as long for the gradients of torch's own pooling and interpolation.
    """
    for change in (of_width, of_height):
        identity = torch.eye(x.shape[3], device=x.device, dtype=x.dtype)
        x = (x @ change(identity[None])[0]).transpose(2, 3)
    return x


def pool(x: Tensor, side: int) -> Tensor:
    """Averages of x (B, C, H, W), so that no side is longer than `side`."""
    factor = math.ceil(max(x.shape[2:]) / side)
    if factor == 1:
        return x
    if not x.is_cuda:
        return F.avg_pool2d(x, factor, ceil_mode=True)
    average = partial(F.avg_pool1d, kernel_size=factor, ceil_mode=True)
    return by_axis(x, average, average)


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear: (B, C, h, w) -> (B, C, *size)."""
    if x.shape[2:] == size:
        return x
    if not x.is_cuda:
        return F.interpolate(x, size, mode="bilinear")
    return by_axis(x, *(partial(F.interpolate, size=side, mode="linear") for side in size))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C)."""
    return x.flatten(2).transpose(1, 2)


def for_norm(x: Tensor) -> Tensor:
    """x (B, C, ...) for a norm that learns.  On a CPU torch before 2.14 crashes when such a norm gets
    channels-last input that needs no gradient; the first norm does, as what is before it is frozen.
    """
    return x if x.requires_grad or not torch.is_grad_enabled() else x.contiguous()


class Adaptor(nn.Module):
    """psi^l: (B, C, H, W), time embedding (B, E) -> (B, C', H', W'), the output size of its residual block.

    width    d, the channels of the bottleneck
    scale    H'/H of the block: 1, 2 or 1/2
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, width: int, scale: float,
                 norm_groups: int):
        super().__init__()
        self.scale = scale
        self.norm_in = GroupNorm(norm_groups, channels)
        self.down = nn.Conv2d(channels, width, 3, padding=1)
        self.time = nn.Linear(emb_channels, width)
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm_out = GroupNorm(1, width)
        self.up = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # The grid (h, w) has about half of x's sides, at most 16; an x of up to 8x8 keeps its size.  Tokens
        # attend to at most 8x8 averages of themselves, which bounds the cost.
        longest = min(16, max(8, max(x.shape[2:]) // 2))
        h = self.norm_in(for_norm(pool(x, longest)))
        h = self.down(F.silu(h))                                                # (B, C, H, W) -> (B, d, h, w)
        h = h + self.time(F.silu(emb))[:, :, None, None]
        grid, attended = h.shape[2:], tokens(pool(h, 8))                        # (B, at most 64, d)
        h = tokens(h)                                                           # -> (B, h*w, d)
        q = self.query(self.norm_attention(h))[:, None]                         # (B, 1, h*w, d)
        k, v = self.key_value(self.norm_attention(attended))[:, None].chunk(2, dim=3)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v)[:, 0])
        h = h + self.mlp(self.norm_mlp(h))
        h = h.transpose(1, 2).unflatten(2, grid)                                # -> (B, d, h, w)
        h = upsample(h, tuple(int(side * self.scale) for side in x.shape[2:]))  # -> (B, d, H', W')
        return self.up(F.silu(self.norm_out(h)))                                # -> (B, C', H', W')


class ScaleShift(nn.Module):
    """psi of a norm: what is added to its scale and its shift per channel (Noguchi & Harada 2019)."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(norm.num_channels))
        self.shift = nn.Parameter(torch.zeros(norm.num_channels))

    def forward(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """What the changed norm gives: (B, C, ...) -> (B, C, ...)."""
        return GroupNorm.forward(norm, for_norm(x), norm.weight + self.scale, norm.bias + self.shift)

    def fold(self, norm: nn.GroupNorm) -> None:
        """Change the norm itself."""
        norm.weight.add_(self.scale)
        norm.bias.add_(self.shift)


class LowRank(nn.Module):
    """psi of a convolution: its weight W becomes W + (alpha / r) B A, r the rank (LoRA: Hu et al. 2021)."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, rank: int):
        super().__init__()
        self.factor = ALPHA / rank
        self.A = nn.Parameter(torch.empty(rank, conv.weight[0].numel()))        # (r, C k k)
        self.B = nn.Parameter(torch.zeros(conv.out_channels, rank))             # (C', r)
        nn.init.kaiming_uniform_(self.A, a=5 ** 0.5)  # as torch begins a convolution

    def weight(self, conv: nn.Conv1d | nn.Conv2d) -> Tensor:
        """The changed weight, of the shape of W: to multiply it out costs less than a second convolution."""
        return conv.weight + self.factor * (self.B @ self.A).view_as(conv.weight)

    def forward(self, conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
        """What the changed convolution gives: (B, C, ...) -> (B, C', ...)."""
        convolve = F.conv1d if isinstance(conv, nn.Conv1d) else F.conv2d
        return convolve(x, self.weight(conv), conv.bias, conv.stride, conv.padding)

    def fold(self, conv: nn.Conv1d | nn.Conv2d) -> None:
        """Change the convolution itself."""
        conv.weight.copy_(self.weight(conv))


def default_width(unet: UNet) -> int:
    """The d with which psi has 1.4 % of theta's parameters, rounded to a multiple of 8, which GPUs multiply
    fast, or 4 where that is 0.  The published networks get 1.2 to 1.9 % (the paper: 1.3 and 1.6).
    """
    # The two 3x3 convolutions and the time layer; the rest of psi^l is small beside them.
    per_channel = sum(9 * (b.channels + b.out_channels) + b.emb_channels for b in blocks(unet).values())
    width = 0.014 * sum(p.numel() for p in unet.parameters()) / per_channel
    return 8 * round(width / 8) or 4


def blocks(unet: UNet) -> dict[str, ResBlock]:
    """The residual blocks by name, in the order of the forward pass."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, ResBlock)}


def layers(unet: UNet, form: str) -> list[nn.Module]:
    """The layers that a form of psi goes to, in the order of the forward pass."""
    hosts = [m for m in unet.modules() if isinstance(m, (ResBlock, AttentionBlock))]
    return [layer for host in hosts for layer in host.modules() if isinstance(layer, FORMS[form])]


def attach(unet: UNet, width: int | None = None, form: str = "bottleneck") -> None:
    """Freeze theta and put a fresh psi in its places; ValueError if there is one already.

    width   d of the bottleneck, r of the low-rank form; None: default_width, or 4; scale-shift has none
    """
    if state_dict(unet):
        raise ValueError("this U-Net already has adaptors")
    width = width or (default_width(unet) if form == "bottleneck" else RANK)
    device = next(unet.parameters()).device
    unet.requires_grad_(False)
    for layer in layers(unet, form):
        match form:
            case "bottleneck":
                psi = Adaptor(layer.channels, layer.emb_channels, layer.out_channels, width, layer.scale,
                              unet.norm_groups)
            case "scale-shift":
                psi = ScaleShift(layer)
            case "low-rank":
                psi = LowRank(layer, width)
        if form != "bottleneck":  # a residual block asks for its adaptor by itself
            layer.forward = MethodType(_adapted, layer)
        layer.adaptor = psi.to(device)


def _adapted(layer: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a layer that psi changes."""
    return layer.adaptor(layer, x)


def _detach(layer: nn.Module) -> None:
    """The layer as it was before `attach`."""
    if isinstance(layer, ResBlock):
        layer.adaptor = None
    else:
        del layer.adaptor, layer.forward


def _layers_with_psi(unet: UNet) -> list[nn.Module]:
    return [layer for layer in unet.modules() if getattr(layer, "adaptor", None) is not None]


def parameters(unet: UNet) -> list[nn.Parameter]:
    """psi, in a fixed order."""
    return [p for name, p in unet.named_parameters() if ".adaptor." in name]


def parameter_rate(unet: UNet) -> float:
    """Number of psi's parameters over that of theta's (Table 1, second column)."""
    added = sum(p.numel() for p in parameters(unet))
    return added / (sum(p.numel() for p in unet.parameters()) - added)


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
    shared = {id(p): p for p in unet.parameters()}  # as if copied already
    theta = copy.deepcopy(unet, memo=shared)
    for layer in _layers_with_psi(theta):
        _detach(layer)
    return theta


@torch.no_grad()
def fold(unet: UNet) -> None:
    """Write psi into theta, where it costs nothing.  A bottleneck stays: no layer of theta can hold it."""
    for layer in _layers_with_psi(unet):
        if not isinstance(layer, ResBlock):
            layer.adaptor.fold(layer)
            _detach(layer)
