"""The U-Net of guided-diffusion (ADM: Dhariwal & Nichol 2021), with its parameter names.

So published weights load strictly.  Options turn it into those of Ho et al. 2020 and of latent diffusion
(Rombach et al. 2022); checkpoints/layouts.py maps their names.

    x_t, t  ->  time_embed -> input_blocks -> middle_block -> output_blocks -> out  ->  eps

`Encoder` is the first half; `UNet` here and `Classifier` in classifier.py are built on it.  A residual
block has one hook, `adaptor`, empty until adaptor.attach() fills it (section 4.3).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: int = 0) -> Tensor:
    """Sinusoids of the timestep: int (B,) -> float32 (B, dim), dim even.

    guided-diffusion: cosines first, frequencies 10000^(-i / half).  Ho et al. 2020: sines first
    (flip_sin_to_cos False), 10000^(-i / (half - 1)) (freq_shift 1).
    """
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10_000) * i / (half - freq_shift))
    angles = t[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()], dim=1)


def zero_init(layer: nn.Module) -> nn.Module:
    """A new branch starts as the identity: its last layer gives zero."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class GroupNorm(nn.GroupNorm):
    """torch's, in bf16 where x (B, C, ...) is: autocast would take fp32, twice the memory."""

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        weight, bias = (self.weight, self.bias) if weight is None else (weight, bias)
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # there is none for "meta"
            return F.group_norm(x, self.num_groups, weight.to(x.dtype), bias.to(x.dtype), self.eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention on channels-first tokens: (B, heads, width, L) each -> (B, heads * width, L)."""
    # Fused attention takes no tokens whose width is not contiguous.
    q, k, v = (tokens.transpose(2, 3).contiguous() for tokens in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v)                         # (B, heads, L, width)
    return h.transpose(2, 3).flatten(1, 2)                              # (B, heads * width, L)


class Upsample(nn.Module):
    """Nearest-neighbour times two, then optionally a 3x3 convolution."""

    def __init__(self, channels: int, with_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # as in GroupNorm
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x)  # (B, C, H, W) -> (B, C, 2H, 2W)


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution or by averaging; padding 0: one pixel, right and bottom."""

    def __init__(self, channels: int, with_conv: bool, padding: int = 1):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, padding) if with_conv else nn.AvgPool2d(2)
        self.pad = (0, 1, 0, 1) if with_conv and padding == 0 else (0, 0, 0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, self.pad))  # (B, C, H, W) -> (B, C, H/2, W/2)


class ResBlock(nn.Module):
    """x^l = theta^l(x^{l-1}) + psi^l(x^{l-1}) (section 4.3): a residual block and, if attached, its adaptor.

    `resample` is None, "up" or "down"; the time embedding enters additively or, with `scale_shift`, as
    scale and shift after the second norm.
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, *, dropout: float,
                 scale_shift: bool, norm_groups: int, norm_eps: float = 1e-5, resample: str | None = None):
        super().__init__()
        self.channels, self.emb_channels, self.out_channels = channels, emb_channels, out_channels
        self.scale_shift = scale_shift
        self.scale = {None: 1, "up": 2, "down": 0.5}[resample]  # H'/H
        self.resample = nn.Identity()
        if resample:
            self.resample = {"up": Upsample, "down": Downsample}[resample](channels, with_conv=False)
        self.in_layers = nn.Sequential(GroupNorm(norm_groups, channels, norm_eps), nn.SiLU(),
                                       nn.Conv2d(channels, out_channels, 3, padding=1))
        emb_out_channels = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out_channels))
        self.out_layers = nn.Sequential(GroupNorm(norm_groups, out_channels, norm_eps), nn.SiLU(),
                                        nn.Dropout(dropout),
                                        zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        self.register_module("adaptor", None)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_act, conv = self.in_layers[:-1], self.in_layers[-1]
        h = conv(self.resample(norm_act(x)))                            # (B, C, H, W) -> (B, C', H', W')
        emb_out = self.emb_layers(emb)[:, :, None, None]                # (B, E) -> (B, C' or 2C', 1, 1)
        if self.scale_shift:
            scale, shift = emb_out.chunk(2, dim=1)                      # (B, C', 1, 1) each
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        h = self.skip_connection(self.resample(x)) + h                  # theta^l(x)
        if self.adaptor is not None:
            h = h + self.adaptor(x, emb)                                # + psi^l(x), section 4.3
        return h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels; channels in guided-diffusion's legacy order (heads, [q k v], width)."""

    def __init__(self, channels: int, num_heads: int, norm_groups: int, norm_eps: float = 1e-5):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(norm_groups, channels, norm_eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)                                                    # (B, C, H, W) -> (B, C, L)
        qkv = self.qkv(self.norm(tokens)).unflatten(1, (self.num_heads, 3, -1))  # (B, heads, 3, width, L)
        q, k, v = qkv.unbind(2)                                                  # (B, heads, width, L) each
        return (tokens + self.proj_out(attend(q, k, v))).view_as(x)              # (B, C, L) -> (B, C, H, W)


class Stage(nn.Sequential):
    """A sequence in which the residual blocks also receive the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Encoder(nn.Module):
    """Time embedding, input blocks and middle block: what the U-Net and the classifier have in common.

    image_size            pixels per side the network was made for (the U-Net itself takes any multiple of
                          its downsampling)
    attention_resolutions downsampling factors (not pixel sizes) where attention follows each residual block
    num_heads             attention heads, unless num_head_channels gives the width of each head instead
    resblock_updown       resample inside a residual block; otherwise by a strided convolution
    norm_groups           32 in every published network; smaller for networks with few channels, where 32
                          groups would leave one channel a group and wipe out its mean
    use_checkpoint        recompute each block in the backward pass instead of storing its activations
    flip_sin_to_cos, freq_shift, norm_eps, downsample_padding
                          named as in diffusers; as guided-diffusion has them, or False, 1, 1e-6 and 0 for
                          the network of Ho et al. 2020
    middle_attention      between the two residual blocks of the middle: "norm", "bare" (attention without a
                          norm before it) or "none", as some networks of diffusers have it
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int,
                 num_res_blocks: int, attention_resolutions: tuple[int, ...], channel_mult: tuple[int, ...],
                 num_heads: int = 1, num_head_channels: int | None = None, use_scale_shift_norm: bool = False,
                 resblock_updown: bool = False, dropout: float = 0.0, norm_groups: int = 32,
                 use_checkpoint: bool = False, flip_sin_to_cos: bool = True, freq_shift: int = 0,
                 norm_eps: float = 1e-5, downsample_padding: int = 1, middle_attention: str = "norm"):
        options = {**locals()}  # the arguments: must stay the first line
        super().__init__()
        not_of_config = ("self", "__class__", "use_checkpoint")
        self.config = {name: value for name, value in options.items() if name not in not_of_config}
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.norm_groups = model_channels, norm_groups
        self.use_checkpoint = use_checkpoint
        self.emb_channels = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, self.emb_channels), nn.SiLU(),
                                        nn.Linear(self.emb_channels, self.emb_channels))

        channels = model_channels * channel_mult[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self.skip_channels = [channels]
        factor = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [self.res(channels, model_channels * mult)]
                channels = model_channels * mult
                if factor in attention_resolutions:
                    layers.append(self.attention(channels))
                self.input_blocks.append(Stage(*layers))
                self.skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                if resblock_updown:
                    down = self.res(channels, channels, "down")
                else:
                    down = Downsample(channels, True, downsample_padding)
                self.input_blocks.append(Stage(down))
                self.skip_channels.append(channels)
                factor *= 2
        self.middle_block = Stage(self.res(channels, channels),
                                  nn.Identity() if middle_attention == "none" else self.attention(channels),
                                  self.res(channels, channels))
        if middle_attention == "bare":
            self.middle_block[1].norm = nn.Identity()
        self.channels, self.factor = channels, factor

    def res(self, channels: int, out: int, resample: str | None = None) -> ResBlock:
        """A residual block as the options have it."""
        options = self.config
        return ResBlock(channels, self.emb_channels, out, dropout=options["dropout"],
                        scale_shift=options["use_scale_shift_norm"], norm_groups=options["norm_groups"],
                        norm_eps=options["norm_eps"], resample=resample)

    def attention(self, channels: int) -> AttentionBlock:
        """Attention as the options have it."""
        return AttentionBlock(channels, self.heads(channels), self.norm_groups, self.config["norm_eps"])

    def heads(self, channels: int) -> int:
        """Attention heads at this many channels."""
        width = self.config["num_head_channels"]
        if width in (None, -1):
            return self.config["num_heads"]
        if channels % width:
            raise ValueError(f"{channels} channels where there is attention: not a multiple of the {width} "
                             "of a head")
        return channels // width

    def run(self, stage: Stage, h: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            # The reentrant form would drop the gradient where no weight needs one; PGD wants it for the
            # input alone.
            return checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, C, H, W), (B,) -> middle features (B, C', H/factor, W/factor), time embedding (B, E), skips."""
        if x.shape[1] != self.in_channels:
            raise ValueError(f"input of {x.shape[1]} channels: this network takes {self.in_channels}")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"image of {x.shape[2]}x{x.shape[3]}: this network needs sides divisible by "
                             f"{self.factor}")
        sinusoids = timestep_embedding(t, self.model_channels, self.config["flip_sin_to_cos"],
                                       self.config["freq_shift"])               # (B,) -> (B, model_channels)
        emb = self.time_embed(sinusoids.to(x.dtype))                            # -> (B, E)
        skips, h = [], x
        for stage in self.input_blocks:
            h = self.run(stage, h, emb)
            skips.append(h)
        return self.run(self.middle_block, h, emb), emb, skips


class UNet(Encoder):
    """eps_theta(x_t, t): float (B, C, H, W), int (B,) -> (B, out_channels, H, W).

    The first C output channels are eps; with learned sigma there are 2C.  The options are `Encoder`'s.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        skip_channels, channels, factor = list(self.skip_channels), self.channels, self.factor
        blocks, updown = self.config["num_res_blocks"], self.config["resblock_updown"]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(self.config["channel_mult"]))):
            for i in range(blocks + 1):
                layers = [self.res(channels + skip_channels.pop(), self.model_channels * mult)]
                channels = self.model_channels * mult
                if factor in self.config["attention_resolutions"]:
                    layers.append(self.attention(channels))
                if level > 0 and i == blocks:
                    layers.append(self.res(channels, channels, "up") if updown else Upsample(channels, True))
                    factor //= 2
                self.output_blocks.append(Stage(*layers))
        self.out = nn.Sequential(GroupNorm(self.norm_groups, channels, self.config["norm_eps"]), nn.SiLU(),
                                 zero_init(nn.Conv2d(channels, self.out_channels, 3, padding=1)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, emb, skips = self.encode(x, t)                                    # (B, C, H, W) -> (B, C', h, w)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, skips.pop()], dim=1), emb)     # back up to (B, C', H, W)
        return self.out(h)                                                   # -> (B, out_channels, H, W)
