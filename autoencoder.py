"""First stages of latent diffusion (Rombach et al. 2022), with the published parameter names.

    images (B, 3, H, W) in [-1, 1] -> encode -> latents (B, embed_dim, H/factor, W/factor) -> decode -> images

`VQ` looks up the nearest entries of a codebook (van den Oord et al. 2017), but only on the way back:
diffusion runs on what comes before.  `KL` is a variational autoencoder whose latent is the mean of the
posterior.  Latents are unscaled here; the scale factor belongs to the diffusion model.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import Upsample, attend


@dataclasses.dataclass
class Architecture:
    """The published option names (`ddconfig`) of encoder and decoder.

    ch, ch_mult       channels of level i are ch * ch_mult[i]; all levels but the last halve the size
    z_channels        channels between encoder and decoder
    double_z          the encoder gives twice as many: mean and log-variance
    resolution        pixels per side it was made for
    attn_resolutions  those at which attention follows each residual block
    norm_groups       32 in every published network; smaller for networks with few channels
    """
    z_channels: int
    resolution: int
    ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    double_z: bool
    attn_resolutions: Sequence[int] = ()
    in_channels: int = 3
    out_ch: int = 3
    dropout: float = 0.0
    norm_groups: int = 32

    def channels(self, level: int) -> int:
        """Channels of a level; 0 is the finest."""
        return self.ch * self.ch_mult[level]

    def attention(self, level: int) -> bool:
        """Whether there is attention at a level."""
        return self.resolution >> level in self.attn_resolutions

    def norm(self, channels: int) -> nn.GroupNorm:
        """A group norm as all of them are."""
        return nn.GroupNorm(self.norm_groups, channels, eps=1e-6)

    def middle(self, channels: int) -> nn.Sequential:
        """What comes after the coarsest level of the encoder, and before that of the decoder."""
        return nn.Sequential(OrderedDict(block_1=ResBlock(self, channels, channels),
                                         attn_1=AttentionBlock(self, channels),
                                         block_2=ResBlock(self, channels, channels)))


class ResBlock(nn.Module):
    """Two convolutions beside a skip connection; no time embedding."""

    def __init__(self, arch: Architecture, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = arch.norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = arch.norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.dropout = nn.Dropout(arch.dropout)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                                # (B, C, H, W) -> (B, C', H, W)
        return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with one head."""

    def __init__(self, arch: Architecture, channels: int):
        super().__init__()
        self.norm = arch.norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2)[:, None] for conv in (self.q, self.k, self.v))     # (B, 1, C, L) each
        return x + self.proj_out(attend(q, k, v).view_as(x))                             # -> (B, C, H, W)


def downsample(channels: int) -> nn.Sequential:
    """unet.Downsample with padding 0, under the name that published first stages have for its convolution."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(channels, channels, 3, stride=2)))


class Level(nn.Module):
    """Residual blocks at one size, with attention after each or none, then "down", "up" or nothing."""

    def __init__(self, arch: Architecture, level: int, channels: int, blocks: int, resample: str | None):
        super().__init__()
        out = arch.channels(level)
        self.block = nn.ModuleList([ResBlock(arch, channels if i == 0 else out, out) for i in range(blocks)])
        self.attn = nn.ModuleList([AttentionBlock(arch, out) if arch.attention(level) else nn.Identity()
                                   for _ in range(blocks)])
        self.downsample = downsample(out) if resample == "down" else nn.Identity()
        self.upsample = Upsample(out, True) if resample == "up" else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, z_channels or, with double_z, twice as many, H/factor, W/factor)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        levels = range(len(arch.ch_mult))
        self.conv_in = nn.Conv2d(arch.in_channels, arch.ch, 3, padding=1)
        self.down = nn.ModuleList([Level(arch, i, arch.channels(i - 1) if i else arch.ch, arch.num_res_blocks,
                                         "down" if i < levels[-1] else None) for i in levels])
        channels = arch.channels(-1)
        self.mid = arch.middle(channels)
        self.norm_out = arch.norm(channels)
        self.conv_out = nn.Conv2d(channels, arch.z_channels * (2 if arch.double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, out_ch, factor h, factor w).  Level 0, the finest, comes last."""

    def __init__(self, arch: Architecture):
        super().__init__()
        levels = range(len(arch.ch_mult))
        channels = arch.channels(-1)
        self.conv_in = nn.Conv2d(arch.z_channels, channels, 3, padding=1)
        self.mid = arch.middle(channels)
        self.up = nn.ModuleList([Level(arch, i, arch.channels(min(i + 1, levels[-1])),
                                       arch.num_res_blocks + 1, "up" if i else None) for i in levels])
        self.norm_out = arch.norm(arch.channels(0))
        self.conv_out = nn.Conv2d(arch.channels(0), arch.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """What VQ and KL have in common.  `ddconfig`: Architecture's options; embed_dim: channels of latents."""

    def __init__(self, ddconfig: dict[str, Any], embed_dim: int):
        super().__init__()
        self.config = dict(ddconfig=dict(ddconfig), embed_dim=embed_dim)
        self.arch = arch = Architecture(**ddconfig)
        self.embed_dim, self.factor = embed_dim, 2 ** (len(arch.ch_mult) - 1)
        self.image_size, self.in_channels = arch.resolution, arch.in_channels
        self.encoder, self.decoder = Encoder(arch), Decoder(arch)
        double = 2 if arch.double_z else 1
        self.quant_conv = nn.Conv2d(double * arch.z_channels, double * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, arch.z_channels, 1)

    def moments(self, x: Tensor) -> Tensor:
        """All that the encoder says: the latent and, in a KL, the log-variances after it.

        Raises ValueError if the images do not fit.
        """
        (_, c, h, w), f = x.shape, self.factor
        if c != self.arch.in_channels or h % f or w % f:
            raise ValueError(f"images of {c} channels and {h}x{w} pixels: this first stage needs "
                             f"{self.arch.in_channels} channels and sides divisible by {f}")
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor, batch_size: int = 8) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, embed_dim, H/factor, W/factor), unquantised or means.

        Like `decode` it takes batch_size images at a time, so that under no_grad memory does not grow with B.
        """
        return torch.cat([self.moments(part)[:, : self.embed_dim] for part in x.split(batch_size)])

    def decode(self, z: Tensor, batch_size: int = 8) -> Tensor:
        """Latents (B, embed_dim, h, w) -> images (B, C, factor h, factor w) in about [-1, 1].

        Raises ValueError for another number of channels.
        """
        if z.shape[1] != self.embed_dim:
            raise ValueError(f"latents of {z.shape[1]} channels: this first stage has {self.embed_dim}")
        parts = (self.post_quant_conv(self.quantise(part)) for part in z.split(batch_size))
        return torch.cat([self.decoder(part) for part in parts])

    def quantise(self, z: Tensor) -> Tensor:
        """The latent as the decoder wants it: unchanged, but for a VQ."""
        return z


class VQ(Autoencoder):
    """First stage with a codebook of n_embed vectors."""

    def __init__(self, ddconfig: dict[str, Any], embed_dim: int, n_embed: int):
        super().__init__(ddconfig, embed_dim)
        if self.arch.double_z:
            raise ValueError("a VQ first stage has no log-variances: double_z must be false")
        self.config["n_embed"] = n_embed
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.quantize.embedding.weight, -1 / n_embed, 1 / n_embed)

    def quantise(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w) -> the nearest codebook entries; the gradient goes to the codebook alone."""
        codebook = self.quantize.embedding
        places = z.detach().flatten(2).transpose(1, 2)                         # -> (B, L, embed_dim)
        # Image by image: 64x64 places against 8192 entries are 134 MB.
        nearest = [torch.cdist(image, codebook.weight).argmin(1) for image in places]           # (L,) each
        return codebook(torch.stack(nearest)).transpose(1, 2).reshape(z.shape)  # -> (B, embed_dim, h, w)

    def bottleneck(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) -> quantised latents (B, embed_dim, h, w), straight-through, and the codebook's
        losses.  `noise` is not used.
        """
        z = self.moments(x)
        entries = self.quantise(z)
        parts = dict(codebook=F.mse_loss(entries, z.detach()), commitment=F.mse_loss(z, entries.detach()))
        return z + (entries - z).detach(), parts  # straight-through: the encoder gets the decoder's gradient


class KL(Autoencoder):
    """Variational first stage."""

    def __init__(self, ddconfig: dict[str, Any], embed_dim: int):
        super().__init__(ddconfig, embed_dim)
        if not self.arch.double_z:
            raise ValueError("a KL first stage needs log-variances: double_z must be true")

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> mean and log-variance of q(z|x), (B, embed_dim, H/factor, W/factor) each."""
        mean, logvar = self.moments(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def bottleneck(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, C, H, W) -> latents (B, embed_dim, h, w), drawn from q(z|x) with `noise` or its mean for
        None, and KL(q(z|x) || N(0, I)) in nats per value of x.
        """
        mean, logvar = self.posterior(x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / x.numel()
        return mean if noise is None else mean + (0.5 * logvar).exp() * noise, dict(kl=kl)


# The codebook's pull is 1 and the encoder's 0.25, as in van den Oord et al. (2017); the published code of
# latent diffusion has the two the other way round.  kl against reconstruction is as published, where both are
# sums over the image instead of means.
LOSS_WEIGHTS = dict(reconstruction=1.0, perceptual=1.0, codebook=1.0, commitment=0.25, kl=1e-6)


def first_stage_loss(model: VQ | KL, x: Tensor, noise: Tensor | None = None,
                     weights: dict[str, float] = LOSS_WEIGHTS,
                     perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
                     ) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of pre-training a first stage, without the published discriminator: images (B, C, H, W) -> scalar,
    and its parts, unweighted.

    noise       N(0, I) shaped like the latents, with which a KL draws from its posterior; None: the mean
    perceptual  optional distance (decoded, x) -> (B,) or scalar, such as LPIPS

    Parts: reconstruction (mean absolute), perceptual if given; codebook, commitment of a VQ; kl of a KL.
    """
    z, parts = model.bottleneck(x, noise)
    decoded = model.decoder(model.post_quant_conv(z))
    parts["reconstruction"] = F.l1_loss(decoded, x)
    if perceptual is not None:
        parts["perceptual"] = perceptual(decoded, x).mean()
    loss = sum(weights[name] * part for name, part in parts.items())
    return loss, {name: part.detach() for name, part in parts.items()}
