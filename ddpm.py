"""Denoising diffusion (section 3): noise schedules, forward process, reverse step for any eta, sampling.

The loss, Eq. 1, is classifier.guided_loss without guidance.

Timesteps count from 0 (t = 0..T-1 is the paper's 1..T); alpha_bar at index -1 is 1.  Nothing here knows what
the model is: any callable model(x_t, t) will do whose first C output channels are eps (or v, or x_0:
Schedule.prediction), on images (B, C, H, W) or vectors (B, D).
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor], Tensor]
SCHEDULES = ("linear", "scaled-linear", "cosine")
PREDICTIONS = ("eps", "v", "x0")


class Schedule:
    """The noise levels alpha_bar_0..alpha_bar_{T-1} (float64, CPU) and what follows from them alone.

    name         "linear": beta from beta_start to beta_end (Ho et al. 2020)
                 "scaled-linear": sqrt(beta) linear between the square roots (Rombach et al. 2022)
                 "cosine": alpha_bar ~ cos^2, beta at most 0.999 (Nichol & Dhariwal 2021);
                 no beta_start, beta_end
    timesteps    T
    prediction   what the network gives: "eps", "v" or "x0"
    """

    def __init__(self, name: str = "linear", timesteps: int = 1000, beta_start: float = 1e-4,
                 beta_end: float = 0.02, prediction: str = "eps"):
        self.config = dict(name=name, timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction '{prediction}': {', '.join(PREDICTIONS)}")
        if prediction != "eps":  # files from before there was a choice do not say it
            self.config["prediction"] = prediction
        self.prediction = prediction
        if name == "linear":
            betas = torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64)
        elif name == "scaled-linear":
            betas = torch.linspace(beta_start ** 0.5, beta_end ** 0.5, timesteps, dtype=torch.float64) ** 2
        elif name == "cosine":
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"unknown noise schedule '{name}': {', '.join(SCHEDULES)}")
        self.timesteps = timesteps
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)
        self.tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, t: Tensor, x: Tensor) -> Tensor:
        """alpha_bar_t, shaped (B, 1, ...) to multiply x of shape (B, ...); t is int (B,), -1 gives 1."""
        kind = x.device, torch.promote_types(x.dtype, torch.float32)
        if kind not in self.tables:  # copied to a device once, not at every call
            with torch.inference_mode(False):  # training may use what sampling put there
                self.tables[kind] = torch.cat([torch.ones(1), self.alpha_bar]).to(*kind)
        return self.tables[kind][t + 1].view(-1, *[1] * (x.dim() - 1))

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, a draw from q(x_t | x_0).

        Shapes (B, ...), (B,), (B, ...) -> (B, ...).
        """
        a = self.at(t, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    def to_eps(self, out: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """eps from what the network gives at x_t: eps itself, x_0, or v (Salimans & Ho 2022),

            v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0

        Shapes (B, ...), (B, ...), (B,) -> (B, ...).
        """
        if self.prediction == "eps":
            return out
        a = self.at(t, xt)
        if self.prediction == "v":
            return a.sqrt() * out + (1 - a).sqrt() * xt
        return (xt - a.sqrt() * out) / (1 - a).sqrt()

    def predict_x0(self, xt: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 that x_t and eps imply.

        The paper prints alpha_bar under the line; it is its square root.
        """
        a = self.at(t, xt)
        return (xt - (1 - a).sqrt() * eps) / a.sqrt()

    def sigma_hat(self, t: Tensor, x: Tensor) -> Tensor:
        """Eq. 6: sigma_hat_t = (1 - alpha_bar_{t-1}) sqrt(alpha_t / (1 - alpha_bar_t)), shaped like `at`."""
        a, b = self.at(t, x), self.at(t - 1, x)                      # alpha_bar_t, alpha_bar_{t-1}
        return (1 - b) * (a / b / (1 - a)).sqrt()                    # a / b = alpha_t

    def reverse_step(self, xt: Tensor, t: Tensor, s: Tensor, eps: Tensor, noise: Tensor | None = None,
                     eta: float | str = 0.0, clip: float | None = None,
                     guidance: Tensor | None = None) -> Tensor:
        """x_s from x_t (Song et al. 2020), s < t, s = -1 for the last step.

        With s = t - 1, eta = 1 and no clip its mean is mu_theta of Eq. 3, with 1 / sqrt(alpha_t).

        eta         0: DDIM, 1: DDPM, "large": the paper's third choice, DDPM with variance beta_t
        noise       N(0, I); may be None where eta = 0
        clip        limit the predicted x_0 to [-clip, clip]: 1 for images.  The direction keeps the model's
                    own eps: one derived anew from the clipped x_0 leaves speckle in few-step sampling.  So
                    where the clip bites, eta = 1 is not the clipped posterior mean of Ho et al.
        guidance    gamma times grad log p(y|x_t), which corrects eps by -sqrt(1 - alpha_bar_t) times it
                    (Dhariwal & Nichol 2021, Algorithm 2): with gamma = 1, E[eps | x_t, y].  From one timestep
                    to the next with eta = 1 this moves the mean by beta_t / sqrt(alpha_t) times it: Eq. 2
                    with the variance beta_t, but for 1 / sqrt(alpha_t): nearly 1 where linear.  Unlike
                    Eq. 2 it is right for every eta, and for steps of any length.
        """
        a, b = self.at(t, xt), self.at(s, xt)                        # alpha_bar_t, alpha_bar_s
        if guidance is not None:
            eps = eps - (1 - a).sqrt() * guidance
        x0 = self.predict_x0(xt, t, eps)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        # "large" widens the noise only: in the direction term it would make the root negative at small t.
        sigma = (1.0 if eta == "large" else eta) * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
        # predicted x0  +  direction pointing to x_t  +  random noise
        xs = b.sqrt() * x0 + (1 - b - sigma ** 2).clamp(min=0).sqrt() * eps
        if eta == 0:
            return xs
        if eta == "large":  # variance beta_t; none in the last step, where b = 1
            sigma = torch.where(b < 1, (1 - a / b).sqrt(), 0.0)
        return xs + sigma * noise

    def subset(self, steps: int) -> list[int]:
        """`steps` timesteps spread evenly over 0..T-1, noisiest first."""
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"{steps} sampling steps: choose 1 to {self.timesteps}")
        return torch.linspace(self.timesteps - 1, 0, steps).round().long().tolist()


def predict_eps(model: Model, xt: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """eps_theta(x_t, t), float32.  A network with learned variance gives 2C channels; eps is the first C.

    A prediction of v or x_0 is turned into eps.
    """
    out = model(xt, t)[:, : xt.shape[1]]
    return schedule.to_eps(out if out.dtype == torch.float64 else out.float(), xt, t)


def draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """N(0, I) noise (B, *shape), a row from each of B generators."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def sample(model: Model, schedule: Schedule, shape: Sequence[int], seeds: Sequence[int], steps: int = 50,
           eta: float | str = 0.0, noise: Tensor | None = None, clip: float | None = 1.0,
           device: torch.device | str = "cpu", gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
           gamma: float = 1.0, batch_size: int = 64, progress: Callable[[Iterable], Iterable] = iter,
           on_step: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Images (N, *shape) on the CPU, one for each seed; each depends on its own seed alone.

    noise      x_T (N, *shape); drawn from the seeds if not given
    gradient   grad_{x_t} log p(y|x_t) as a function of (x_t, t): classifier guidance of strength gamma, as
               `reverse_step` has it in place of Eq. 2
    progress   wraps the list of steps of each batch, e.g. tqdm
    on_step    called with (timestep reached, x) after each step
    Raises ValueError for a number of steps outside 1..T.
    """
    timesteps = schedule.subset(steps)
    finished = []
    for first in range(0, len(seeds), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[first:first + batch_size]]
        x = draw(shape, generators)  # in any case, so that later draws are the same
        if noise is not None:
            x = noise[first:first + batch_size].cpu()
        with torch.inference_mode():
            x = x.to(device)
            for t, s in progress(list(zip(timesteps, timesteps[1:] + [-1]))):
                t_batch, s_batch = (torch.full((len(x),), i, device=device) for i in (t, s))
                guidance = None
                if gradient is not None:
                    with torch.inference_mode(False):  # there a copy has a gradient
                        guidance = gamma * gradient(x.clone(), t_batch)
                step_noise = draw(shape, generators).to(device) if eta != 0 else None
                eps = predict_eps(model, x, t_batch, schedule)
                x = schedule.reverse_step(x, t_batch, s_batch, eps, step_noise, eta, clip, guidance)
                if on_step is not None:
                    on_step(s, x)
        finished.append(x.clone().cpu())
    return torch.cat(finished) if finished else torch.empty(0, *shape)
