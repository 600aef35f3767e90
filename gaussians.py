"""Section 5.1's world: two Gaussians in the plane, where everything is known.

Source N((1, 1), I), target N((-1, -1), I).  With a = alpha_bar_t, x_t of the source is N(sqrt(a) mu_S, I); so
the best predictor and, on a target sample, its residual are

    eps*(x_t, t) = sqrt(1-a) (x_t - sqrt(a) mu_S)        eps - eps* = a eps - sqrt(a (1-a)) (x_0 - mu_S)

The first gradient by the output layer's bias is -2 mean(eps - eps_theta - guidance).  It points to the
target: descent takes it from eps_theta, and samples move along it.
 1. Without guidance it points along mean(x_0) - mu_S - sqrt(a / (1-a)) mean(eps).  Ten shots, repeated a
    thousand times, leave the error of their mean: an angle whose standard deviation is
    sqrt(1/10) / |mu_T - mu_S| = 6.4 degrees; its size is 5.1 degrees on average.
 2. Guidance adds 2 sigma_hat^2 gamma mean(grad log p).  The Bayes classifier's gradient lies on mu_T - mu_S
    exactly: the sum turns towards it and gets longer, a larger step as well as a better one.  A classifier
    that knows only the ten shots can at best point where they do.
 3. Eq. 8 adds a multiple of the residual to eps, and Norm takes the mean away again: noise of mean 0 gives
    the gradient of 1 whatever omega and J.  What is left is the residual's difference between shots, which
    makes the noise an ellipse with the shots' own correlation: as Norm makes both variances 1, its long axis
    lies on a diagonal, as often across the gradient as along it.

Arrays are (B, E, 2): B points of each of E independent experiments, draws of shots or networks, side by side.
New networks take their weights from torch's global generator; the rest is drawn from the one that is given.
"""

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adversarial_noise import norm, worst_case_noise
from classifier import SOURCE, TARGET, fade, guided_loss, similarity_guidance
from ddpm import Model, Schedule, predict_eps, sample
from unet import timestep_embedding

MEANS = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # of SOURCE and TARGET; both covariances are I
SCHEDULE = Schedule()
Progress = Callable[[Iterable[int]], Iterable[int]]


class MLP(nn.Module):
    """E small networks side by side: x (B, E, 2), t (B,) -> (B, E, 2).  A single one serves any E."""

    def __init__(self, copies: int):
        super().__init__()
        sizes = [(2 + 16, 32), (32, 32), (32, 2)]
        self.weights = nn.ParameterList(torch.randn(copies, i, o) / i ** 0.5 for i, o in sizes)
        self.biases = nn.ParameterList(torch.zeros(copies, 1, o) for _, o in sizes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = timestep_embedding(t, 16)[:, None].expand(-1, x.shape[1], -1)     # (B,) -> (B, E, 16)
        h = torch.cat([x, e], dim=2).transpose(0, 1)                          # (E, B, 18)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            h = F.silu(h @ weight + bias)                                     # (E, B, 32)
        return (h @ self.weights[-1] + self.biases[-1]).transpose(0, 1)       # (B, E, 2)

    def class_logits(self, x: Tensor, t: Tensor) -> Tensor:
        """As a classifier, with the classes second: (B, E, 2), (B,) -> (B, 2, E)."""
        return self(x, t).transpose(1, 2)

    def select(self, which: slice | list[int]) -> "MLP":
        """Copies of some of the networks; [0] * n makes n that begin as the first."""
        other = copy.deepcopy(self)
        for p in other.parameters():
            p.data = p.data[which]
        return other


def optimal_predictor(xt: Tensor, t: Tensor, domain: int = SOURCE) -> Tensor:
    """eps*(x_t, t) = E[eps | x_t] for SOURCE or TARGET: (B, E, 2), (B,) -> (B, E, 2)."""
    a = SCHEDULE.at(t, xt)
    return (1 - a).sqrt() * (xt - a.sqrt() * MEANS[domain].to(xt))


def bayes_classifier(xt: Tensor, t: Tensor) -> Tensor:
    """log q(x_t | domain) up to a constant, as logits, classes second: (B, E, 2), (B,) -> (B, 2, E)."""
    centres = SCHEDULE.at(t, xt)[..., None].sqrt() * MEANS                    # (B, 1, 2 classes, 2)
    return -0.5 * (xt[:, :, None] - centres).square().sum(3).transpose(1, 2)


def draw_points(domain: int, n: int, experiments: int, g: torch.Generator) -> Tensor:
    """(n, experiments, 2) points of SOURCE or TARGET."""
    return MEANS[domain] + torch.randn(n, experiments, 2, generator=g)


def train(model: MLP, loss: Callable[[], Tensor], iterations: int, progress: Progress) -> MLP:
    """Adam with a learning rate that falls from 0.005 to 0 by half a cosine; then the model is fixed."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in progress(range(iterations)):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def pretrain(iterations: int, g: torch.Generator, progress: Progress) -> MLP:
    """A noise predictor of the source (Eq. 1), a single network."""
    model = MLP(1)

    def loss() -> Tensor:
        x0, eps = draw_points(SOURCE, 1024, 1, g), torch.randn(1024, 1, 2, generator=g)
        t = torch.randint(SCHEDULE.timesteps, (1024,), generator=g)
        return guided_loss(eps, predict_eps(model, SCHEDULE.add_noise(x0, t, eps), t, SCHEDULE), 0.0).mean()

    return train(model, loss, iterations, progress)


def train_classifier(targets: Tensor, iterations: int, g: torch.Generator, progress: Progress) -> MLP:
    """E networks that tell the source from `targets` (N, E, 2) on noised points; all begin as the same."""
    experiments = targets.shape[1]
    model = MLP(1).select([0] * experiments)
    labels = torch.tensor([SOURCE, TARGET]).repeat_interleave(32)[:, None].expand(-1, experiments)

    def loss() -> Tensor:
        source = draw_points(SOURCE, 32, experiments, g)
        x0 = torch.cat([source, targets[torch.randint(len(targets), (32,), generator=g)]])
        t = torch.randint(SCHEDULE.timesteps, (64,), generator=g)
        xt = SCHEDULE.add_noise(x0, t, torch.randn(x0.shape, generator=g))
        return experiments * F.cross_entropy(model.class_logits(xt, t), labels)  # a sum over experiments

    return train(model, loss, iterations, progress)


def output_gradient(model: Model, x0: Tensor, t: Tensor, eps: Tensor, classifier: Model | None = None,
                    gamma: float = 0.0) -> Tensor:
    """Gradient (E, 2) of the loss (Eqs. 1, 6, 9) by the bias of the model's output layer."""
    xt = SCHEDULE.add_noise(x0, t, eps)
    bias = torch.zeros(x0.shape[1:], requires_grad=True)
    guidance = similarity_guidance(classifier, SCHEDULE, xt, t, gamma)
    losses = guided_loss(eps, predict_eps(model, xt, t, SCHEDULE) + bias, guidance)  # means over E and 2
    # Times their number: ||.||^2 of each point, summed over E.
    return torch.autograd.grad(losses.mean() * bias.numel(), bias)[0]


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Between vectors (..., 2), in degrees, 0 to 180."""
    cross = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
    return torch.atan2(cross.abs(), (u * v).sum(-1)).rad2deg()


def ellipse(eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of a cloud (B, E, 2): half axes (E, 2), the short one first, and direction (E, 2) of the long one."""
    variances, directions = torch.linalg.eigh(torch.einsum("bei,bej->eij", eps, eps) / len(eps))
    return variances.sqrt(), directions[..., 1]


def wasserstein(x: Tensor) -> Tensor:
    """2-Wasserstein distance (E,) of the Gaussian N(m, C) fitted to samples (N, E, 2) to the target N(mu, I):
    W_2^2 = |m - mu|^2 + tr(C + I - 2 C^(1/2))."""
    axes, _ = ellipse(x - x.mean(0))
    return ((x.mean(0) - MEANS[TARGET]).norm(dim=1) ** 2 + (axes - 1).square().sum(1)).sqrt()


def compare_gradients(model: Model, classifiers: dict[str, Model], shots: Tensor, t: int, repeats: int,
                      g: torch.Generator, gamma: float, omega: float, J: int,
                      own: bool = False) -> dict[str, Tensor]:
    """First gradients (E, 2) by name, of shots (10, E, 2) repeated `repeats` times, at one t.  All have the
    same noises.

    reference      of 10,000 different target points
    baseline       of the shots
    norm only      with the noise normalised, without any ascent
    adversarial    with the worst-case noise, without guidance
    guided, NAME   with this one of the classifiers;  TAN, NAME: and with the worst-case noise
    worst          the worst-case noise (B, E, 2) itself
    """
    x0, many = shots.repeat(repeats, 1, 1), draw_points(TARGET, 10_000, shots.shape[1], g)
    noises = torch.randn(max(len(many), len(x0)), *many.shape[1:], generator=g)
    reference = output_gradient(model, many, torch.full((len(many),), t), noises[:len(many)])
    eps, times = noises[:len(x0)], torch.full((len(x0),), t)
    worst, _ = worst_case_noise(model, SCHEDULE, x0, times, eps, J, omega, (0,), own)
    found = {"reference": reference, "worst": worst}
    for name, noise in (("baseline", eps), ("norm only", norm(eps, dims=(0,))), ("adversarial", worst)):
        found[name] = output_gradient(model, x0, times, noise)
    for name, classifier in classifiers.items():
        for method, noise in (("guided", eps), ("TAN", worst)):
            found[f"{method}, {name}"] = output_gradient(model, x0, times, noise, classifier, gamma)
    return found


def adapt(model: MLP, shots: Tensor, g: torch.Generator, classifier: Model | None, gamma: float, omega: float,
          J: int, learning_rate: float, iterations: int, progress: Progress = iter, fading: int = 0,
          own: bool = False) -> Iterator[MLP]:
    """Algorithm 1: fine-tune a copy of `model` for each draw of shots (10, E, 2), 40 points an iteration;
    yields the copies, which go on changing, after each.  Without classifier, with J = 0: the baseline.

    fading    iterations over which gamma falls to 0; 0: it stays, as printed
    """
    experiments = shots.shape[1]
    model = model.select([0] * experiments).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    x0 = shots.repeat(4, 1, 1)  # in place of line 2's draw: every shot four times, in each iteration
    for i in progress(range(iterations)):                                                   # line 1
        t = torch.randint(SCHEDULE.timesteps, (len(x0),), generator=g)                      # line 3
        eps = torch.randn(x0.shape, generator=g)                                            # line 4
        eps, _ = worst_case_noise(model, SCHEDULE, x0, t, eps, J, omega, (0,), own)         # lines 5-7, Eq. 8
        xt = SCHEDULE.add_noise(x0, t, eps)
        guidance = similarity_guidance(classifier, SCHEDULE, xt, t, gamma * fade(i, fading))  # Eq. 6
        losses = guided_loss(eps, predict_eps(model, xt, t, SCHEDULE), guidance)            # line 8, Eq. 9
        optimizer.zero_grad()
        (experiments * losses.mean()).backward()  # a sum over E, and still the mean over two coordinates
        optimizer.step()                                                                    # line 9
        yield model


def trajectories(model: MLP, noise: Tensor, steps: int) -> Tensor:
    """DDIM from noise (N, E, 2), which comes first, to samples, which come last: (steps + 1, N, E, 2)."""
    path = [noise]
    sample(model, SCHEDULE, noise.shape[1:], range(len(noise)), steps, noise=noise, clip=None,
           batch_size=len(noise), on_step=lambda s, x: path.append(x.clone()))
    return torch.stack(path)
