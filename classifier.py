"""Similarity-guided training (Eqs. 5, 6): the classifier p_phi(y | x_t), its guidance, the guided loss.

Of Eq. 5's two gradients only the target's is used, as section 4.1 says; Eq. 6 puts it into the loss.

The network is guided-diffusion's ADM encoder with attention pooling, under its parameter names: the
published ImageNet classifier loads, its 1000-way head is replaced by a 2-way one, and ten target pictures
against source pictures fine-tune it.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm import Schedule
from unet import Encoder, GroupNorm, UNet, attend

SOURCE, TARGET = 0, 1
BATCHES, ACCURACY, ENCODING = 2, 3, 4  # streams of random numbers; 0 is that of the iterations
VERSIONS = 2, 16  # changed copies of each source and target picture that a latent model encodes, once
AUGMENTATIONS = ("flip", "shift", "colour")


def log_prob_gradient(model: Callable, xt: Tensor, t: Tensor, label: int = TARGET) -> Tensor:
    """grad_{x_t} log p_phi(y = label | x_t), shaped like xt, float32.

    Each image's own gradient: nothing is averaged.
    """
    with torch.enable_grad():
        xt = xt.detach().requires_grad_()
        log_p = F.log_softmax(model(xt, t).float(), dim=1)[:, label]    # (B, classes) -> (B,)
        return torch.autograd.grad(log_p.sum(), xt)[0]


def similarity_guidance(classifier: Callable | None, schedule: Schedule, xt: Tensor, t: Tensor, gamma: float,
                        power: int = 2, below: int | None = None) -> Tensor | float:
    """sigma_hat_t^2 gamma grad log p(y = T | x_t) of Eq. 6, shaped like xt; 0 without classifier or gamma.

    power    of sigma_hat: 2 as printed, 1 as Eqs. 2-3 give with the posterior variance
    below    0 from this timestep on
    """
    if classifier is None or gamma == 0:
        return 0.0
    guidance = schedule.sigma_hat(t, xt) ** power * gamma * log_prob_gradient(classifier, xt, t, TARGET)
    return guidance if below is None else guidance * (t < below).view(-1, *[1] * (xt.dim() - 1))


def fade(done: float, over: float) -> float:
    """Factor on gamma that falls linearly from 1 to 0 over the first `over` of a run; always 1 for over = 0.

    Not in the paper.  Training on the target's own pictures ends at the target without guidance, too.  A
    gamma that stays moves that end towards what p_phi is surest of; one that fades only gives a head start.
    """
    return max(0.0, 1 - done / over) if over else 1.0


def limited(guidance: Tensor | float, residual: Tensor, limit: float | None) -> Tensor | float:
    """The guidance (B, ...), for each image at most `limit` times as long as its residual eps - eps_theta."""
    if limit is None or not isinstance(guidance, Tensor):
        return guidance
    length, of_residual = (x.flatten(1).norm(dim=1) for x in (guidance, residual))
    factor = (limit * of_residual / length.clamp(min=1e-12)).clamp(max=1)
    return guidance * factor.view(-1, *[1] * (residual.dim() - 1))


def guided_loss(eps: Tensor, eps_theta: Tensor, guidance: Tensor | float) -> Tensor:
    """|| eps - eps_theta(x_t, t) - guidance ||^2 of Eqs. 6 and 9, as a mean over each image.

    eps, eps_theta (B, ...) -> (B,)
    guidance = sigma_hat_t^2 gamma grad log p(y = T | x_t); with 0 it is Eq. 1.  The paper's squared norm is
    a sum: the mean scales the loss, to which Adam is indifferent.
    """
    return (eps - eps_theta - guidance).square().flatten(1).mean(1)


# ---- the network -------------------------------------------------------------------------------------------


class AttentionPool(nn.Module):
    """(B, C, H, W) -> (B, out_channels): attention whose one query is the mean of all tokens (as in CLIP)."""

    def __init__(self, tokens: int, channels: int, num_heads: int, out_channels: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels ** 0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2)                                                 # (B, C, H, W) -> (B, C, L)
        h = torch.cat([h.mean(2, keepdim=True), h], dim=2)               # -> (B, C, 1 + L)
        h = h + self.positional_embedding.to(h.dtype)
        qkv = self.qkv_proj(h).unflatten(1, (3, self.num_heads, -1))     # -> (B, 3, heads, width, 1 + L)
        q, k, v = qkv.unbind(1)                                          # (B, heads, width, 1 + L) each
        return self.c_proj(attend(q, k, v)[:, :, :1]).squeeze(2)         # -> (B, out_channels)


class Classifier(Encoder):
    """Logits (B, out_channels) of x_t, float (B, C, H, W) with H = W = image_size, and t, int (B,).

    The options are `Encoder`'s.
    """

    def __init__(self, pool: str = "attention", **options: Any):
        if pool != "attention":
            raise ValueError(f"classifier pool '{pool}': only 'attention' exists here")
        super().__init__(**options)
        tokens = (self.image_size // self.factor) ** 2
        head = AttentionPool(tokens, self.channels, self.heads(self.channels), self.out_channels)
        self.out = nn.Sequential(GroupNorm(self.norm_groups, self.channels), nn.SiLU(), head)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.encode(x, t)[0])  # (B, C, H, W) -> (B, C', h, w) -> (B, out_channels)


def replace_head(model: Classifier) -> None:
    """A new last layer for two answers; everything before it keeps its pre-training."""
    pool = model.out[2]
    pool.c_proj = nn.Conv1d(pool.c_proj.in_channels, 2, 1).to(pool.c_proj.weight.device)
    model.out_channels = model.config["out_channels"] = 2


def from_unet(unet: UNet, pretrained: bool = True) -> Classifier:
    """A two-way classifier on the encoder of a U-Net, where no pre-trained classifier is at hand.

    pretrained    whether it starts from the encoder's weights; else it is the same network, untrained
    """
    model = Classifier(**dict(unet.config, out_channels=2)).eval()
    if pretrained:
        # What both have by name, but for the head `out`; psi is the U-Net's alone.
        encoder = {key: value for key, value in unet.state_dict().items()
                   if key in model.state_dict() and not key.startswith("out.")}
        model.load_state_dict({**model.state_dict(), **encoder})
    return model


# ---- its training on ten pictures --------------------------------------------------------------------------

def augment(x: Tensor, kinds: Collection[str], g: torch.Generator) -> Tensor:
    """Random changes that keep the label: (B, 3, H, W) in [-1, 1] -> the same shape and range.

    flip: mirror half of them; shift: move by up to 1/16 and scale by up to 5 %; colour: scale and shift
    each channel, for domains that colour does not define.
    """
    b, device = len(x), x.device

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=g) * 2 - 1).to(device)                      # U(-1, 1)

    if "flip" in kinds:
        x = torch.where(uniform(b, 1, 1, 1) < 0, x.flip(3), x)
    if "shift" in kinds:
        move = torch.eye(2, 3, device=device) * (1 + 0.05 * uniform(b, 1, 1))            # (B, 2, 3)
        move[:, :, 2] = uniform(b, 2) / 8                                                # of half a side
        grid = F.affine_grid(move, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if "colour" in kinds:
        x = (x * (1 + 0.3 * uniform(b, 3, 1, 1)) + 0.3 * uniform(b, 3, 1, 1)).clamp(-1, 1)
    return x


def fine_tune(model: Classifier, schedule: Schedule, source: Tensor, target: Tensor, iterations: int,
              batch_size: int, learning_rate: float, kinds: Collection[str], g: torch.Generator,
              micro_batch_size: int | None = None, progress: Callable[[Iterable], Iterable] = iter,
              share: Callable[[int], slice] = slice,
              sum_gradients: Callable[[list], object] = lambda parameters: None) -> None:
    """Teach source against target at all timesteps, every batch half source and half target.

    source (N, C, H, W), target (M, C, H, W), on the model's device.  `kinds` are augmentations; randomness
    comes from g.  micro_batch_size limits the pictures that go through the network at once.  Of several
    processes each takes its `share` of a batch (default: all), and `sum_gradients` adds up over them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    model.train().requires_grad_(True)
    half = max(1, batch_size // 2)
    micro = micro_batch_size or 2 * half
    labels = torch.tensor([SOURCE] * half + [TARGET] * half, device=source.device)

    def pick(images: Tensor) -> Tensor:
        return images[torch.randint(len(images), (half,), generator=g).to(images.device)]

    for _ in progress(range(iterations)):
        x0 = augment(torch.cat([pick(source), pick(target)]), kinds, g)
        t = torch.randint(schedule.timesteps, (2 * half,), generator=g).to(x0.device)
        eps = torch.randn(x0.shape, generator=g).to(x0.device)
        xt = schedule.add_noise(x0, t, eps)
        optimizer.zero_grad()
        parts = (values[share(2 * half)].split(micro) for values in (xt, t, labels))
        for xt_, t_, labels_ in zip(*parts):
            (F.cross_entropy(model(xt_, t_).float(), labels_, reduction="sum") / (2 * half)).backward()
        sum_gradients(list(model.parameters()))
        optimizer.step()
    model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_by_quarter(model: Classifier, schedule: Schedule, source: Tensor, target: Tensor,
                        g: torch.Generator, repeats: int = 32,
                        micro_batch_size: int | None = None) -> list[float]:
    """Share of right answers on noised pictures by quarter of the timesteps, classes counting equally.

    0.5 is chance: there the guidance means nothing.  In each quarter every target picture is noised
    `repeats` times, and source pictures about as often in all.  Raises ValueError for fewer than four
    timesteps.
    """
    if schedule.timesteps < 4:
        raise ValueError(f"{schedule.timesteps} timesteps: no quarters")

    def right(images: Tensor, label: int, times: int, first: int, end: int) -> float:
        micro, hits = micro_batch_size or len(images), []
        for _ in range(times):
            t = (torch.randint(end - first, (len(images),), generator=g) + first).to(images.device)
            xt = schedule.add_noise(images, t, torch.randn(images.shape, generator=g).to(images.device))
            parts = zip(xt.split(micro), t.split(micro))
            answers = torch.cat([model(xt_, t_).argmax(1) for xt_, t_ in parts])
            hits.append((answers == label).float().mean().item())
        return sum(hits) / times

    bounds = [-(-quarter * schedule.timesteps // 4) for quarter in range(5)]  # rounded up, as t * 4 // T
    source_repeats = max(1, repeats * len(target) // len(source))
    return [(right(source, SOURCE, source_repeats, *quarter) + right(target, TARGET, repeats, *quarter)) / 2
            for quarter in zip(bounds, bounds[1:])]


def make_classifier(start: Callable[[], Classifier], schedule: Schedule, source: Tensor, target: Tensor,
                    kinds: Collection[str], iterations: int, batch_size: int, learning_rate: float,
                    stream: Callable[[int], torch.Generator],
                    encode: Callable[[Tensor], Tensor] | None = None, check: bool = True,
                    micro_batch_size: int | None = None,
                    progress: Callable[[Iterable, str], Iterable] = lambda steps, text: steps,
                    **processes: Callable) -> tuple[Classifier, list[float] | None]:
    """p_phi of Eq. 5: `start()` fine-tuned on pictures of the target against pictures of the source.

    start             a classifier that has not seen a target picture, with a fresh two-way head; called for
                      each training
    source, target    pictures (N, 3, H, W), (M, 3, H, W) in [-1, 1], on the classifier's device
    stream            gives a generator for each of BATCHES, ACCURACY and ENCODING
    encode            of a latent model: pictures -> x_0.  Latents cannot be mirrored or coloured: of each
                      picture several changed versions are encoded
    check             first train a trial classifier without a fifth of the pictures, and return its accuracy
                      on that fifth by quarter of the timesteps (None without `check`, or with one picture)
    processes         share and sum_gradients of `fine_tune`
    """
    def as_x0(pictures: Tensor, versions: int) -> Tensor:
        if encode is None:
            return pictures
        return encode(augment(pictures.repeat(versions, 1, 1, 1), kinds, stream(ENCODING)))

    def train(source: Tensor, target: Tensor, text: str) -> Classifier:
        model = start()
        source, target = as_x0(source, VERSIONS[SOURCE]), as_x0(target, VERSIONS[TARGET])
        fine_tune(model, schedule, source, target, iterations, batch_size, learning_rate,
                  kinds if encode is None else (), stream(BATCHES), micro_batch_size,
                  lambda steps: progress(steps, text), **processes)
        return model

    accuracy = None
    if check and min(len(source), len(target)) >= 2:
        n_source, n_target = max(1, len(source) // 5), max(1, len(target) // 5)
        trial = train(source[n_source:], target[n_target:], "classifier, a fifth held out")
        parts = source[:n_source], target[:n_target]
        held_out = parts if encode is None else [encode(part) for part in parts]
        accuracy = accuracy_by_quarter(trial, schedule, *held_out, stream(ACCURACY),
                                       micro_batch_size=micro_batch_size)
    return train(source, target, "classifier"), accuracy
