"""The noised, timestep-conditioned classifier p_phi(y | x_t) of Eq. 5, and the gradient of its log-probability.

The network is guided-diffusion's ADM encoder with attention pooling, under its parameter names: the published ImageNet
classifier loads, its 1000-way head is replaced by a 2-way one, and ten target pictures against source pictures fine-tune it.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import Schedule
from unet import Encoder, UNet, attend

SOURCE, TARGET = 0, 1
AUGMENTATIONS = ("flip", "shift", "colour")


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
                 attention_resolutions: tuple[int, ...], channel_mult: tuple[int, ...], num_heads: int = 1,
                 num_head_channels: int | None = None, pool: str = "attention", **options):
        if pool != "attention":
            raise ValueError(f"classifier pool '{pool}': only 'attention' exists here")
        super().__init__(image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions,
                         channel_mult, num_heads=num_heads, num_head_channels=num_head_channels, **options)
        tokens = (image_size // self.factor) ** 2
        self.out = nn.Sequential(nn.GroupNorm(self.norm_groups, self.channels), nn.SiLU(),
                                 AttentionPool(tokens, self.channels, self.heads(self.channels), out_channels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.encode(x, t)[0])  # (B, C, H, W) -> (B, C', h, w) -> (B, out_channels)


def replace_head(model: Classifier, classes: int = 2) -> None:
    """A new last layer for `classes` answers; everything before it keeps its pre-training."""
    pool = model.out[2]
    pool.c_proj = nn.Conv1d(pool.c_proj.in_channels, classes, 1).to(pool.c_proj.weight.device)
    model.out_channels = model.config["out_channels"] = classes


def log_prob_gradient(model: Classifier, xt: Tensor, t: Tensor, label: int = TARGET) -> Tensor:
    """grad_{x_t} log p_phi(y = label | x_t), shape of xt, float32.  Each image's own gradient: nothing is averaged."""
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = F.log_softmax(model(xt, t).float(), dim=1)[:, label]    # (B, classes) -> (B,)
        return torch.autograd.grad(log_p.sum(), xt)[0]


def from_unet(unet: UNet, pretrained: bool = True) -> Classifier:
    """A two-way classifier on the encoder of a U-Net, where no pre-trained classifier is at hand; or the same, untrained."""
    model = Classifier(**dict(unet.config, out_channels=2)).eval()
    if pretrained:
        encoder = {k: v for k, v in unet.state_dict().items() if k.split(".")[0] in ("time_embed", "input_blocks", "middle_block")}
        model.load_state_dict({**model.state_dict(), **{k: v for k, v in encoder.items() if ".adaptor." not in k}})
    return model


def augment(x: Tensor, kinds: Collection[str], g: torch.Generator) -> Tensor:
    """Random changes that keep the label: (B, 3, H, W) in [-1, 1] -> the same shape and range.

    flip: mirror half of them; shift: move by up to 1/16 and scale by up to 5 %; colour: scale and shift each channel, for
    domains that colour does not define.
    """
    uniform = lambda *shape: (torch.rand(*shape, generator=g) * 2 - 1).to(x.device)  # U(-1, 1)
    b = len(x)
    if "flip" in kinds:
        x = torch.where(uniform(b, 1, 1, 1) < 0, x.flip(3), x)
    if "shift" in kinds:
        theta = torch.eye(2, 3, device=x.device) * (1 + 0.05 * uniform(b, 1, 1))         # (B, 2, 3)
        theta[:, :, 2] = uniform(b, 2) / 8                                               # of half a side
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), padding_mode="reflection", align_corners=False)
    if "colour" in kinds:
        x = (x * (1 + 0.3 * uniform(b, 3, 1, 1)) + 0.3 * uniform(b, 3, 1, 1)).clamp(-1, 1)
    return x


def fine_tune(model: Classifier, schedule: Schedule, source: Tensor, target: Tensor, iterations: int, batch_size: int,
              learning_rate: float, kinds: Collection[str], g: torch.Generator, micro_batch_size: int | None = None,
              progress: Callable = lambda steps: steps) -> None:
    """Teach source against target at all timesteps, every batch half source and half target.

    source (N, C, H, W), target (M, C, H, W), on the model's device.  `kinds` are augmentations; randomness comes from g.
    micro_batch_size limits the pictures that go through the network at once.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    model.train().requires_grad_(True)
    half = max(1, batch_size // 2)
    micro = micro_batch_size or 2 * half
    labels = torch.tensor([SOURCE] * half + [TARGET] * half, device=source.device)
    for _ in progress(range(iterations)):
        pick = lambda images: images[torch.randint(len(images), (half,), generator=g).to(images.device)]
        x0 = augment(torch.cat([pick(source), pick(target)]), kinds, g)
        t = torch.randint(schedule.timesteps, (2 * half,), generator=g).to(x0.device)
        eps = torch.randn(x0.shape, generator=g).to(x0.device)
        xt = schedule.add_noise(x0, t, eps)
        optimizer.zero_grad()
        for part in range(0, 2 * half, micro):
            logits = model(xt[part:part + micro], t[part:part + micro]).float()
            (F.cross_entropy(logits, labels[part:part + micro], reduction="sum") / (2 * half)).backward()
        optimizer.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_by_quartile(model: Classifier, schedule: Schedule, source: Tensor, target: Tensor, g: torch.Generator,
                         repeats: int = 32) -> list[float]:
    """Share of right answers on noised pictures in each quarter of the timesteps, both classes counting equally.

    0.5 is chance: there the guidance means nothing.  In each quarter every target picture is noised `repeats` times, and
    source pictures about as often in all.
    """
    result = []
    for quartile in range(4):
        right = []
        for label, images in ((SOURCE, source), (TARGET, target)):
            hits = []
            for _ in range(repeats if label == TARGET else max(1, repeats * len(target) // len(source))):
                t = (torch.randint(schedule.timesteps // 4, (len(images),), generator=g) + quartile * schedule.timesteps // 4).to(images.device)
                eps = torch.randn(images.shape, generator=g).to(images.device)
                hits.append((model(schedule.add_noise(images, t, eps), t).argmax(1) == label).float().mean().item())
            right.append(sum(hits) / len(hits))
        result.append(sum(right) / 2)
    return result


def guided_loss(eps: Tensor, eps_predicted: Tensor, guidance: Tensor | float) -> Tensor:
    """|| eps - eps_theta(x_t, t) - guidance ||^2 of Eqs. 6 and 9, as a mean over each image: (B, ...) -> (B,).

    guidance = sigma_hat_t^2 gamma grad log p(y = T | x_t); with 0 it is Eq. 1.
    """
    return (eps - eps_predicted - guidance).square().flatten(1).mean(1)


def similarity_guidance(classifier: Callable | None, schedule: Schedule, xt: Tensor, t: Tensor, gamma: float, power: int = 2,
                        below: int | None = None) -> Tensor | float:
    """sigma_hat_t^2 gamma grad log p(y = T | x_t) of Eq. 6, shaped like xt; 0 without a classifier, and from timestep `below` on.

    power    of sigma_hat: 2 as printed, 1 as Eqs. 2-3 give with the posterior variance
    """
    if classifier is None:
        return 0.0
    guidance = schedule.sigma_hat(t, xt) ** power * gamma * log_prob_gradient(classifier, xt, t, TARGET)
    return guidance if below is None else guidance * (t < below).view(-1, *[1] * (xt.dim() - 1))
