"""StyleGAN2 (Karras et al. 2020b), on which the paper's GAN baselines are built, in plain torch operations.

Names and shapes of the parameters are those of its common PyTorch port, in which CDC publishes its sources.
Every weight is kept at unit variance and scaled when it is used, so that one learning rate suits all
layers ("equalised").  Images are (B, 3, size, size) in [-1, 1], latents z are (B, style_dim), normal.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = (1.0, 3.0, 3.0, 1.0)  # of every blur, in each direction


def width(resolution: int, channel_base: int, channel_max: int) -> int:
    """Channels at this resolution: channel_base / resolution, at most channel_max (32768 and 512 as
    published)."""
    return min(channel_max, channel_base // resolution)


def resolutions(size: int) -> list[int]:
    """4, 8, ... size."""
    if size < 8 or size & (size - 1):
        raise ValueError(f"size {size}: a StyleGAN2 has a power of two, 8 or more")
    return [2 ** i for i in range(2, size.bit_length())]


# ---- layers ------------------------------------------------------------------------------------------------

class PixelNorm(nn.Module):
    """x / rms(x) over the channels of z."""

    def forward(self, z: Tensor) -> Tensor:
        return z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def activated(x: Tensor, bias: Tensor) -> Tensor:
    """Leaky ReLU of x + bias (C,), scaled so that the variance stays."""
    return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.dim() - 2)), 0.2) * math.sqrt(2)


class Activation(nn.Module):
    """`activated` with a bias that learns."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return activated(x, self.bias)


class EqualLinear(nn.Module):
    """A linear layer.

    lr_mul   its learning rate in multiples of the others'
    active   followed by `activated`
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr_mul: float = 1.0,
                 active: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.full([outputs], bias))
        self.scale, self.lr_mul, self.active = lr_mul / math.sqrt(inputs), lr_mul, active

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.scale, self.bias * self.lr_mul
        return activated(F.linear(x, weight), bias) if self.active else F.linear(x, weight, bias)


class EqualConv2d(nn.Module):
    """A convolution without bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.scale, self.stride, self.padding = 1 / math.sqrt(inputs * kernel ** 2), stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class Blur(nn.Module):
    """A low-pass filter before halving or after doubling the size, which keeps either from aliasing.

    pad     (before, after) rows and columns of zeros
    gain    4 after zeros were put between the pixels, which the filter spreads
    """

    def __init__(self, pad: tuple[int, int], gain: float = 1.0):
        super().__init__()
        kernel = torch.outer(torch.tensor(KERNEL), torch.tensor(KERNEL))
        self.register_buffer("kernel", gain * kernel / kernel.sum())
        self.pad = (*pad, *pad)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.flip(0, 1).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, self.pad), kernel, groups=x.shape[1])


class Upsample(Blur):
    """Twice the size: zeros between the pixels, then the blur."""

    def __init__(self):
        super().__init__(pad=(1, 1), gain=4.0)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        spread = torch.zeros(b, c, 2 * h + 1, 2 * w + 1, dtype=x.dtype, device=x.device)  # (B, C, 2H+1, 2W+1)
        spread[:, :, 1::2, 1::2] = x
        return super().forward(spread)                                                     # (B, C, 2H, 2W)


class ModulatedConv2d(nn.Module):
    """A convolution whose input channels the style scales; the outputs are divided by what that makes of
    their standard deviation ("demodulated"): section 2.2 of Karras et al. 2020b.

    Their weights are scaled picture by picture; scaling the activations instead is the same, and needs no
    weights of each picture's own.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, style_dim: int, demodulate: bool = True,
                 upsample: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outputs, inputs, kernel, kernel))
        self.modulation = EqualLinear(style_dim, inputs, bias=1.0)
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel ** 2), kernel // 2
        self.demodulate, self.upsample = demodulate, upsample
        if upsample:
            self.blur = Blur(pad=(1, 1), gain=4.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, I, H, W), w (B, style_dim) -> (B, O, H, W), or twice the size."""
        style, weight = self.modulation(w), self.scale * self.weight[0]               # (B, I), (O, I, k, k)
        x = x * style[:, :, None, None]
        if self.upsample:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)               # (B, O, 2H+1, 2W+1)
            x = self.blur(x)                                                          # (B, O, 2H, 2W)
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            variance = style.square() @ weight.square().sum((2, 3)).T                 # (B, O)
            x = x * (variance + 1e-8).rsqrt()[:, :, None, None]
        return x


# ---- generator ---------------------------------------------------------------------------------------------

class NoiseInjection(nn.Module):
    """One map of noise, added to all channels with a strength that learns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + self.weight * noise


class StyledConv(nn.Module):
    """Modulated convolution, noise, activation."""

    def __init__(self, inputs: int, outputs: int, style_dim: int, upsample: bool = False):
        super().__init__()
        self.conv = ModulatedConv2d(inputs, outputs, 3, style_dim, upsample=upsample)
        self.noise, self.activate = NoiseInjection(), Activation(outputs)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        return self.activate(self.noise(self.conv(x, w), noise))


class ToRGB(nn.Module):
    """A layer's share of the picture, added to that of the layers before it."""

    def __init__(self, inputs: int, style_dim: int, upsample: bool = True):
        super().__init__()
        self.conv = ModulatedConv2d(inputs, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if upsample:
            self.upsample = Upsample()

    def forward(self, x: Tensor, w: Tensor, before: Tensor | None = None) -> Tensor:
        rgb = self.conv(x, w) + self.bias
        return rgb if before is None else rgb + self.upsample(before)


class ConstantInput(nn.Module):
    """What every picture begins with: (1, C, 4, 4), learnt."""

    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Generator(nn.Module):
    """z -> w (the mapping network) -> a picture, from 4x4 to `size` (the synthesis network)."""

    def __init__(self, size: int, style_dim: int = 512, n_mlp: int = 8, channel_base: int = 32768,
                 channel_max: int = 512):
        super().__init__()
        self.size, self.style_dim = size, style_dim
        self.config = dict(size=size, style_dim=style_dim, n_mlp=n_mlp, channel_base=channel_base,
                           channel_max=channel_max)
        sizes = resolutions(size)
        mapping = [EqualLinear(style_dim, style_dim, lr_mul=0.01, active=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *mapping)
        channels = width(4, channel_base, channel_max)
        self.input = ConstantInput(channels)
        self.conv1 = StyledConv(channels, channels, style_dim)
        self.to_rgb1 = ToRGB(channels, style_dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for i, resolution in enumerate(sizes[1:]):
            before, channels = channels, width(resolution, channel_base, channel_max)
            self.convs.append(StyledConv(before, channels, style_dim, upsample=True))
            self.convs.append(StyledConv(channels, channels, style_dim))
            self.to_rgbs.append(ToRGB(channels, style_dim))
            for j in (2 * i + 1, 2 * i + 2):
                self.noises.register_buffer(f"noise_{j}", torch.randn(1, 1, resolution, resolution))

    @property
    def fixed_noise(self) -> list[Tensor]:
        """The noise of each layer that the file of the network has, (1, 1, H, W) each."""
        return list(self.noises.buffers())

    def draw_noise(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Noise of n pictures for each layer, (n, 1, H, W) each, on the CPU."""
        return [torch.randn(n, *noise.shape[1:], generator=generator) for noise in self.fixed_noise]

    def synthesize(self, w: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """w (B, style_dim), noise of each layer -> pictures (B, 3, size, size), and what each convolution
        made, (B, C, H, W)."""
        x = self.input.input.expand(len(w), -1, -1, -1)                                    # (B, C, 4, 4)
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU
        features = [self.conv1(x, w, noise[0])]
        rgb = self.to_rgb1(features[0], w)
        for i, to_rgb in enumerate(self.to_rgbs):
            features.append(self.convs[2 * i](features[-1], w, noise[2 * i + 1]))          # twice the size
            features.append(self.convs[2 * i + 1](features[-1], w, noise[2 * i + 2]))
            rgb = to_rgb(features[-1], w, rgb)                                             # (B, 3, H, W)
        return rgb, features


# ---- discriminator -----------------------------------------------------------------------------------------

def conv_layer(inputs: int, outputs: int, kernel: int, downsample: bool = False,
               active: bool = True) -> nn.Sequential:
    """Blur if the size is halved, convolution, activation."""
    layers: list[nn.Module] = []
    if downsample:
        pad = kernel + 1  # in all, so that H becomes H / 2
        layers.append(Blur(pad=((pad + 1) // 2, pad // 2)))
    stride, padding = (2, 0) if downsample else (1, kernel // 2)
    layers.append(EqualConv2d(inputs, outputs, kernel, stride, padding))
    return nn.Sequential(*layers, *([Activation(outputs)] if active else []))


class ResBlock(nn.Module):
    """Two convolutions beside a shorter way, at half the size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = conv_layer(inputs, inputs, 3)
        self.conv2 = conv_layer(inputs, outputs, 3, downsample=True)
        self.skip = conv_layer(inputs, outputs, 1, downsample=True, active=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)                   # (B, C', H/2, W/2)


def group_size(batch: int) -> int:
    """How many pictures a discriminator compares with each other: 4, or the most that divide the batch."""
    return next(n for n in (4, 3, 2, 1) if batch % n == 0)


def with_deviation(x: Tensor) -> Tensor:
    """One more channel: how much the pictures of a group differ, on average over all features.

    (B, C, H, W) -> (B, C + 1, H, W).  A group has `group_size` pictures.
    """
    b, c, h, w = x.shape
    n = group_size(b)
    deviation = (x.view(n, -1, c, h, w).var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (B / n,)
    return torch.cat([x, deviation.repeat(n).view(b, 1, 1, 1).expand(b, 1, h, w)], 1)


class Discriminator(nn.Module):
    """A picture -> a logit: above 0 for what it takes to be real."""

    def __init__(self, size: int, channel_base: int = 32768, channel_max: int = 512):
        super().__init__()
        self.size = size
        self.config = dict(size=size, channel_base=channel_base, channel_max=channel_max)
        widths = [width(resolution, channel_base, channel_max) for resolution in reversed(resolutions(size))]
        self.widths = widths
        """Channels of each of `features`."""
        blocks = [ResBlock(before, after) for before, after in zip(widths, widths[1:])]
        self.convs = nn.Sequential(conv_layer(3, widths[0], 1), *blocks)
        last = widths[-1]
        self.final_conv = conv_layer(last + 1, last, 3)
        self.final_linear = nn.Sequential(EqualLinear(last * 16, last, active=True), EqualLinear(last, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, size, size) -> what each block makes of them, from the picture's size to 4x4."""
        found = [self.convs[0](images)]
        for block in self.convs[1:]:
            found.append(block(found[-1]))
        return found

    def decide(self, last: Tensor) -> Tensor:
        """The last of `features` (B, C, 4, 4) -> logits (B, 1)."""
        return self.final_linear(self.final_conv(with_deviation(last)).flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.decide(self.features(images)[-1])
