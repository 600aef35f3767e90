"""What each GAN baseline adds: against closed forms, loops and PyTorch's own losses."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from baselines import gan_methods as M
from baselines import gan_training
from baselines.gan_training import Plain, Players
from baselines.stylegan2 import Discriminator, Generator
from plumbing.seeds import generator as stream


def networks(seed=0):
    torch.manual_seed(seed)
    made = Generator(16, 8, 2, channel_base=64, channel_max=16), Discriminator(16, channel_base=64, channel_max=16)
    made[0].convs[0].noise.weight.data.fill_(0.1)
    return made


def step(method, generator, discriminator, iteration=0, r1_every=1):
    """One iteration with this method; which parameters moved, by name, of both."""
    before = [{name: p.detach().clone() for name, p in model.named_parameters()} for model in (generator, discriminator)]
    players, g = Players(generator, discriminator, method, 8, 1e-2, 0.1, r1_every, 0.5), stream(0, iteration)
    z, noise = players.draw(g)
    measured = players.discriminator_turn(torch.rand(8, 3, 16, 16, generator=g) * 2 - 1, z, noise, iteration, g)
    players.optimizer.step()
    players.generator_turn(z, noise, iteration, g)
    players.optimizer.step()
    moved = [{name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
             for model, old in zip((generator, discriminator), before)]
    return (*moved, measured)


class Everything(Plain):
    """Does something in every place where a method may, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.parameters, self.judged = [self.weight], []

    def augment(self, images, g):
        return images + 1

    def judge(self, discriminator, images, fake):
        self.judged.append((images.detach(), fake))
        return [discriminator(images)]

    def discriminator_term(self, discriminator, real, fake, z, noise):
        self.pictures = real, fake
        return 100 * self.weight

    def generator_term(self, generator, features, z, noise):
        self.features = features
        return torch.tensor(1000.0)

    def observe(self, real):
        self.real = real
        return dict(seen=1.0)


def test_a_method_is_asked_in_every_place():
    generator, discriminator = networks()
    before = copy.deepcopy(generator), copy.deepcopy(discriminator)
    g, everything = stream(0, 0), Everything()
    players = Players(generator, discriminator, everything, 8, 1e-2, 0.0, 16, 0.0)
    z, noise = players.draw(g)
    real = torch.rand(8, 3, 16, 16, generator=g)
    with torch.no_grad():
        fake, features = before[0].synthesize(before[0].style(z), noise)
        logits, of_fake = before[1](real + 1), before[1](fake + 1)
        discriminator_loss = gan_training.discriminator_loss(logits, of_fake) + 100
    line = players.discriminator_turn(real, z, noise, 0, g)
    players.optimizer.step()
    loss = players.generator_turn(z, noise, 0, g)
    torch.testing.assert_close(torch.tensor(line["discriminator_loss"]), discriminator_loss)
    torch.testing.assert_close(torch.tensor(loss - 1000), gan_training.generator_loss(discriminator(fake + 1)), rtol=0, atol=1e-3)
    for (images, of), expected in zip(everything.judged, ((real, False), (fake, True), (fake, True)), strict=True):
        torch.testing.assert_close(images, expected[0] + 1)
        assert of == expected[1]
    torch.testing.assert_close(everything.real, logits)
    assert line["seen"] == 1 and torch.equal(everything.pictures[0], real)
    torch.testing.assert_close(everything.pictures[1], fake)
    torch.testing.assert_close(everything.features, features)
    torch.testing.assert_close(everything.weight.detach(), torch.tensor(0.99))  # Adam's first step is its learning rate


def test_the_numbers_reach_their_method():
    generator, discriminator = networks()
    numbers = M.Numbers(0.1, 20, 3, 4.0, 5, 6.0, 0.7, 2, (8.0, 9.0))
    made = {name: M.make(name, generator, discriminator, 10, numbers, 0) for name in M.METHODS}
    assert (made["ada"].target, made["ada"].images, made["freezed"].blocks, made["ewc"].weight) == (0.1, 20, 3, 4.0)
    assert (made["cdc"].weight, made["cdc"].spread, made["cdc"].block, len(made["cdc"].anchors)) == (6.0, 0.7, 2, 10)
    assert (made["dcl"].of_generator, made["dcl"].of_discriminator) == (8.0, 9.0)
    for f, g in zip(made["ewc"].fisher, M.fisher_information(generator, discriminator, 5, 0), strict=True):
        assert torch.equal(f, g)


@pytest.mark.parametrize("name, drawn", [("cdc", lambda cdc: cdc.anchors), ("cdc", lambda cdc: cdc.patch.weight),
                                         ("ewc", lambda ewc: ewc.fisher[0])])
def test_what_a_method_draws_comes_from_the_seed(name, drawn):
    numbers = M.Numbers(fisher_samples=2, ewc_weight=1.0, cdc_weight=1.0)
    found = [drawn(M.make(name, *networks(), 10, numbers, seed)) for seed in (0, 0, 1)]
    assert torch.equal(*found[:2]) and not torch.equal(*found[1:])


@pytest.mark.parametrize("name", M.METHODS)
def test_which_weights_learn(name):
    generator, discriminator = networks()
    method = M.make(name, generator, discriminator, 10, M.Numbers(fisher_samples=2, ewc_weight=1.0, cdc_weight=1.0, freeze_blocks=1), 0)
    source = copy.deepcopy(generator.state_dict())
    drawn, judged, measured = step(method, generator, discriminator)
    names = {name for name, _ in discriminator.named_parameters()}
    frozen = {name for name in names if name.startswith(("convs.0.", "convs.1."))} if name == "freezed" else set()
    assert judged == names - frozen
    assert drawn >= {name for name, _ in generator.named_parameters() if "noise" not in name}
    assert math.isfinite(measured["discriminator_loss"])
    if name in ("cdc", "dcl"):  # the copy of the source stays
        assert all(torch.equal(value, source[key]) for key, value in method.source.state_dict().items())


class OneWeight(torch.nn.Module):
    """Draws pictures theta x, x being the first noise; the Fisher information is known."""
    style_dim = 2

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta))
        self.style = torch.nn.Identity()

    def draw_noise(self, n, g):
        return [torch.randn(n, 1, 1, 1, generator=g)]

    def synthesize(self, w, noise):
        return self.theta * noise[0], []


class Mean(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1).mean(1)


def test_fisher_information_in_closed_form():
    """log L = log sigmoid(theta x): (d log L / d theta)^2 = x^2 sigmoid(-theta x)^2, averaged over x ~ N(0, 1)."""
    theta = 0.7
    found, = M.fisher_information(OneWeight(theta), Mean(), 4000, 0)
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-x ** 2 / 2) / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(x ** 2 * torch.sigmoid(-theta * x) ** 2 * density, x)
    assert abs(found / expected - 1) < 0.05


def test_ewc_is_a_parabola_about_the_source():
    generator, discriminator = networks()
    ewc = M.EWC(generator, discriminator, 3.0, 2, 0)
    assert ewc.generator_term(generator, [], None, None) == 0
    p, fisher = next(generator.parameters()), ewc.fisher[0]
    p.data += 0.1
    torch.testing.assert_close(ewc.generator_term(generator, [], None, None), 3.0 * 0.01 * fisher.sum())


def test_cdc_is_0_for_the_source_and_equals_a_double_loop():
    generator, discriminator = networks()
    source = copy.deepcopy(generator)
    cdc = M.CDC(source, discriminator, 10, 5.0, 0.05, 1, 0)
    z, noise = torch.randn(6, 8), generator.draw_noise(6, stream(0))
    assert cdc.generator_term(generator, generator.synthesize(generator.style(z), noise)[1], z, noise).abs() < 1e-4
    for p in generator.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    ours, theirs = (model.synthesize(model.style(z), noise)[1] for model in (generator, source))
    total = 0.0
    for a, b in zip(ours, theirs):
        for i in range(6):
            others = [j for j in range(6) if j != i]
            p, q = (torch.stack([F.cosine_similarity(x[i].flatten(), x[j].flatten(), 0) for j in others]).softmax(0)
                    for x in (a, b))
            total += 5.0 / 6 / len(ours) * (p * (p / q).log()).sum()
    torch.testing.assert_close(cdc.generator_term(generator, ours, z, noise), total, rtol=1e-3, atol=1e-5)


def test_cdc_judges_anchors_whole_and_the_rest_in_patches():
    _, discriminator = networks()
    cdc = M.CDC(networks()[0], discriminator, 10, 1.0, 0.05, 1, 0)
    images = torch.randn(8, 3, 16, 16)
    whole, patches = cdc.judge(discriminator, images, fake=True)
    torch.testing.assert_close(whole, discriminator(images[:2]))
    assert patches.shape == (6, 1, 8, 8)
    whole, patches = cdc.judge(discriminator, images, fake=False)
    torch.testing.assert_close(whole, discriminator(images[:2]))  # in as large a group as the others
    assert patches.shape == (8, 1, 8, 8) and [M.whole(n) for n in (2, 4, 8, 16)] == [2, 2, 2, 4]
    z = cdc.latents(4000, 8, stream(1))
    nearest = torch.cdist(z, cdc.anchors).min(1).values
    assert nearest[:1000].max() < 0.5 and (nearest[1000:] > 0.5).float().mean() > 0.9
    assert abs((z[:1000] - cdc.anchors[torch.cdist(z[:1000], cdc.anchors).argmin(1)]).std() - 0.05) < 0.003


def test_contrastive_losses_against_cross_entropy():
    """Similarities made by hand: unit vectors at known angles."""
    at = lambda *degrees: torch.stack([torch.tensor([math.cos(math.radians(d)), math.sin(math.radians(d))]) for d in degrees])
    ours, theirs = at(0, 90), at(60, 30)
    logits = torch.tensor([[60.0, 30.0], [30.0, 60.0]]).deg2rad().cos() / 0.07
    torch.testing.assert_close(M.contrast_in_batch(ours, theirs), F.cross_entropy(logits, torch.tensor([0, 1])))
    logits = torch.tensor([[60.0, 45.0, 90.0], [60.0, 45.0, 0.0]]).deg2rad().cos() / 0.07  # source, then two real ones
    found = M.contrast_to_real(ours, theirs, at(45, 90))
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.tensor([0, 0])))


def test_dcl_contrasts_with_the_source_in_every_layer():
    generator, discriminator = networks()
    source = copy.deepcopy(generator)
    for p in generator.parameters():
        p.data += 0.3 * torch.randn(p.shape)
    dcl = M.DCL(source, (2.0, 3.0))
    z, noise, real = torch.randn(4, 8), generator.draw_noise(4, stream(0)), torch.rand(5, 3, 16, 16)
    (fake, ours), (of_source, theirs) = (model.synthesize(model.style(z), noise) for model in (generator, source))
    alike = lambda a, b: F.cosine_similarity(a.flatten(), b.flatten(), 0) / 0.07
    total = 0.0
    for a, b in zip(ours, theirs):
        for i in range(4):
            logits = torch.stack([alike(a[i], b[j]) for j in range(4)])
            total += 2.0 / len(ours) / 4 * F.cross_entropy(logits[None], torch.tensor([i]))
    torch.testing.assert_close(dcl.generator_term(generator, ours, z, noise), total)
    layers = [discriminator.features(images) for images in (fake, of_source, real)]
    total = 0.0
    for a, b, x in zip(*layers):
        for i in range(4):
            logits = torch.stack([alike(a[i], b[i]), *(alike(a[i], x[j]) for j in range(5))])
            total += 3.0 / len(layers[0]) / 4 * F.cross_entropy(logits[None], torch.tensor([0]))
    torch.testing.assert_close(dcl.discriminator_term(discriminator, real, fake, z, noise), total)


def test_ada_follows_the_sign_of_the_logits():
    ada = M.ADA(target=0.6, images=100)
    assert ada.observe(torch.tensor([1.0, 2.0, 3.0, -1.0]))["ada_p"] == 0           # r = 0.5
    assert ada.observe(torch.tensor([1.0, 2.0, 3.0, 1.0]))["ada_r"] == 1
    assert ada.state["p"] == pytest.approx(0.04)                                    # 4 of 100 pictures
    for _ in range(40):
        ada.observe(torch.ones(4))
    assert ada.state["p"] == 1
    ada.observe(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert ada.state["p"] == pytest.approx(0.96)
    images = torch.rand(2, 3, 16, 16)
    assert not torch.equal(ada.augment(images, stream(0)), images)
    assert torch.equal(M.ADA(0.6, 100).augment(images, stream(0)), images)


def test_r1_is_the_mean_over_the_pictures_that_are_judged_whole():
    """CDC judges a quarter whole: the penalty is that of these alone, whatever else is in the batch."""
    _, discriminator = networks()
    real = torch.rand(8, 3, 16, 16)
    penalties = []
    for images, logits in ((real, lambda x: discriminator.decide(discriminator.features(x)[-1][:4])), (real[:4], discriminator)):
        seen = images.clone().requires_grad_()
        penalties.append(gan_training.r1_penalty(logits(seen), seen))
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("r1_every, iteration", [(1, 0), (2, 0), (2, 3), (3, 3)])
def test_an_iteration_is_two_steps_of_adam_with_the_penalties_that_are_due(r1_every, iteration):
    """Against the losses written out, with torch's own Adam, one network at a time."""
    of_r1, of_path = (0.05 * r1_every if iteration % r1_every == 0 else 0), (0.5 * 4 if iteration == 0 else 0)
    discriminator_loss, generator_loss, r1_penalty = (
        getattr(gan_training, name) for name in ("discriminator_loss", "generator_loss", "r1_penalty"))
    generator, discriminator = networks()
    ours = copy.deepcopy(generator), copy.deepcopy(discriminator)
    step(Plain(), *ours, iteration, r1_every)
    g = stream(0, iteration)
    z, noise = torch.randn(8, 8, generator=g), generator.draw_noise(8, g)
    real = (torch.rand(8, 3, 16, 16, generator=g) * 2 - 1).requires_grad_()
    logits = discriminator(real)
    fake = generator.synthesize(generator.style(z), noise)[0].detach()
    (discriminator_loss(logits, discriminator(fake)) + of_r1 * r1_penalty(logits, real)).backward()
    torch.optim.Adam(discriminator.parameters(), 1e-2, (0.0, 0.99)).step()
    w = generator.style(z)
    images, _ = generator.synthesize(w, noise)
    lengths = gan_training.path_lengths(images, w, torch.randn(images.shape, generator=g))
    path = (lengths - 0.01 * lengths.mean().detach()).square().mean()
    (generator_loss(discriminator(images)) + of_path * path).backward(inputs=list(generator.parameters()))
    torch.optim.Adam(generator.parameters(), 1e-2, (0.0, 0.99)).step()
    for model, expected in zip(ours, (generator, discriminator)):
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
