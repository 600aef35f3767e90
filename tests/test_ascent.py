"""experiments/ascent.py against closed forms, and the program on the tiny source."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call

import adversarial_noise
import domains
from checkpoints import run_folder
from ddpm import Schedule
from experiments import ascent
from experiments.ascent import Row, ascend, compare, conclusion, fewest_steps
from plumbing.options import InputError

SCHEDULE = Schedule()
STEPS, REACH, T = [1, 2, 4], 0.2, torch.tensor([20, 400, 900])
NOISE = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
BLACK = torch.zeros(3, 3, 4, 4)  # x_t is the noise alone then


def noise_in(xt, t):
    """The eps of x_t where x_0 is 0."""
    return xt / (1 - SCHEDULE.alpha_bar[t]).sqrt().float().view(-1, 1, 1, 1)


def slope(xt, t):
    """eps_theta with || eps - eps_theta ||^2 = 10 + <u, eps>, u of length 1: the loss has the same gradient everywhere."""
    eps = noise_in(xt, t)
    u = torch.full_like(eps, 48 ** -0.5)
    return eps - u * (10 + (u * eps).sum((1, 2, 3), keepdim=True)).sqrt()


def half(xt, t):
    """eps_theta = eps / 2 in the first channel, eps elsewhere: the loss is a quarter of its square, the gradient half of it."""
    eps = noise_in(xt, t)
    return torch.cat([eps[:, :1] / 2, eps[:, 1:]], dim=1)


@pytest.fixture
def without_norm(monkeypatch):
    monkeypatch.setattr(adversarial_noise, "norm", lambda eps, dims, like: eps)


def test_one_big_step_is_many_small_ones_where_the_gradient_is_constant(without_norm):
    perturbations, before, after = ascend(slope, SCHEDULE, BLACK, T, NOISE, STEPS, REACH)
    torch.testing.assert_close(perturbations, torch.full((3, 3, 48), REACH * 48 ** -0.5))
    torch.testing.assert_close(after, (before + REACH).expand(3, 3))  # <u, reach u> more
    rows = compare("all", STEPS, NOISE, perturbations, before, after)
    for row in rows:
        assert (row.cosine, row.length, row.rise) == pytest.approx((1, 1, 1), rel=1e-4)
    assert rows[0].moves == pytest.approx(REACH / NOISE.flatten(1).norm(dim=1).mean().item(), rel=1e-4)
    assert rows[0].loss == pytest.approx(1 + REACH * 3 / before.sum().item(), rel=1e-4)
    assert fewest_steps(rows) == 1


def test_a_linear_network(without_norm):
    """eps_theta = A x: the J steps of rate omega multiply the first channel by (1 + omega / 2)^J."""
    perturbations, before, after = ascend(half, SCHEDULE, BLACK, T, NOISE, STEPS, REACH)
    factors = torch.tensor([(1 + REACH / J / 2) ** J for J in STEPS])
    first = NOISE[:, 0].flatten(1)
    torch.testing.assert_close(perturbations[:, :, :16], (factors - 1).view(-1, 1, 1) * first, atol=1e-6, rtol=1e-4)
    assert perturbations[:, :, 16:].abs().max() < 1e-6
    torch.testing.assert_close(before, first.square().sum(1) / 4)
    torch.testing.assert_close(after, factors[:, None] ** 2 * before)
    rows = compare("all", STEPS, NOISE, perturbations, before, after)
    for row, factor in zip(rows, factors.tolist(), strict=True):
        assert row.cosine == pytest.approx(1, abs=1e-5) and row.loss == pytest.approx(factor ** 2, rel=1e-4)
        assert row.length == pytest.approx((factor - 1) / (factors[-1].item() - 1), rel=1e-3)
        assert row.rise == pytest.approx((factor ** 2 - 1) / (factors[-1].item() ** 2 - 1), rel=1e-3)


def test_the_cosine_is_the_mean_over_pictures():
    perturbations = torch.tensor([[[1.0, 0], [1, 1]], [[0, 1], [2, 2]]])  # at right angles, and along
    rows = compare("all", [1, 2], torch.ones(2, 2), perturbations, torch.ones(2), torch.tensor([[1.5, 1.5], [2, 2]]))
    assert [row.cosine for row in rows] == pytest.approx([0.5, 1])
    assert [row.rise for row in rows] == pytest.approx([0.5, 1])


def rows_of(cosines, moves):
    """Rows of J = 1, 2, ...: cosines[quarter][J], moves[quarter]."""
    return [Row(f"{quarter}", J, cosine, 1.0, move, 1.2, 0.9) for quarter, move in enumerate(moves)
            for J, cosine in enumerate(cosines[quarter], start=1)]


@pytest.mark.parametrize("cosines, moves, fewest, says", [
    ([[0.99, 0.99, 1]], [0.1], 1, "--pgd-steps 1 --omega 0.2: "),
    ([[0.97, 0.99, 1]], [0.1], 2, "--pgd-steps 2 --omega 0.1: .* 90% of theirs.* takes 3 passes .* instead of 4"),
    ([[0.99, 0.99, 1], [0.97, 0.99, 1]], [0.1, 0.01], 2, "--pgd-steps 2"),      # the worst quarter decides
    ([[0.99, 0.99, 1], [0.50, 0.60, 1]], [0.1, 0.001], 1, "--pgd-steps 1"),     # of those that matter
    ([[0.90, 0.97, 1]], [0.1], 3, "--pgd-steps 3 --omega 0.0667: no fewer steps"),
    ([[1, 1, 1]], [0.001], None, "less than 0.5% everywhere"),
])
def test_the_conclusion(cosines, moves, fewest, says):
    rows = rows_of(cosines, moves)
    assert fewest_steps(rows) == fewest
    assert re.search(says, conclusion(rows, REACH))


def test_the_rise_that_is_promised_is_the_least():
    rows = [Row(quarter, J, 1.0, 1.0, 0.1, 1.2, rise) for quarter, J, rise in (("a", 1, 0.9), ("b", 1, 0.7), ("a", 2, 1.0), ("b", 2, 1.0))]
    assert "at least 70% of theirs" in conclusion(rows, REACH)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_ascended(own, tiny, monkeypatch):
    """Timesteps from all over each quarter; noises with mean 0 and standard deviation 1 where Norm is as printed."""
    network, seen = run_folder.load_model(str(tiny.source), None)[0], []
    monkeypatch.setattr(ascent, "ascend", lambda model, schedule, x0, t, eps, steps, reach, own: seen.append((t, eps)) or ascend(
        model, schedule, x0, t, eps, steps, reach, own))
    ascent.measure(network, domains.target_images(tiny.targets, 16), ascent.Options(str(tiny.source), n=5, steps=(1, 2), batch_size=5), own, torch.device("cpu"))
    assert [t.tolist() for t, _ in seen] == [[first + step for step in (0, 50, 100, 150, 200)] for first in (0, 250, 500, 750)]
    means = torch.cat([eps.mean((1, 2, 3)) for _, eps in seen])
    assert (means.abs().max() < 1e-6) == (not own)


# ---- the program -----------------------------------------------------------------------------------------------------

SMALL = ("--n", 3, "--steps", 1, 3, "--batch-size", 2, "--device", "cpu")


def table_of(out):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("more, norm", [((), "own"), (("--norm", "paper"), "paper")])
def test_on_a_source(more, norm, tiny, capsys):
    call(ascent.main, tiny.source, "--target", tiny.targets, *SMALL, *more)
    out = capsys.readouterr().out
    head, _, *rows = table_of(out)
    assert head[:3] == ["timesteps t", "J", "omega"] and f"norm {norm}" in out.splitlines()[0]
    assert [row[:3] for row in rows[:3]] == [["0 to 249", "1", "0.2"], ["0 to 249", "3", "0.0667"], ["250 to 499", "1", "0.2"]]
    assert len(rows) == 8
    assert all(row[3:5] == ["1.0000", "1.000"] and row[7] == "100.0%" for row in rows[1::2])  # the most steps, with themselves
    assert out.strip().splitlines()[-1].startswith(("--pgd-steps", "With J omega = 0.2"))
    call(ascent.main, tiny.source, "--target", tiny.targets, *SMALL, *more)
    assert capsys.readouterr().out == out  # the same seed, the same table


def test_the_batch_size_changes_nothing(tiny):
    network, _ = run_folder.load_model(str(tiny.source), None)
    pictures = domains.target_images(tiny.targets, 16)
    options = ascent.Options(str(tiny.source), n=5, steps=(1, 2))
    found = [ascent.measure(network, pictures, ascent.dataclasses.replace(options, batch_size=size), False, torch.device("cpu"))
             for size in (2, 5)]
    for one, other in zip(*found, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4) and one.moves == pytest.approx(other.moves, rel=1e-3)


def test_on_a_run_its_own_target_is_the_default(finished, tiny, capsys):
    call(ascent.main, finished, *SMALL)
    assert f"5 pictures of {tiny.targets}" in capsys.readouterr().out


def test_a_run_from_before_norm_was_an_option(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    options = json.loads((run / "options.json").read_text())
    (run / "options.json").write_text(json.dumps({name: value for name, value in options.items() if name != "norm"}))
    call(ascent.main, run, *SMALL)
    assert "norm paper" in capsys.readouterr().out


def test_pictures_that_a_run_held_out_are_not_measured(train, tiny, tmp_path, capsys):
    shutil.copytree(tiny.targets, tmp_path / "in" / "subfolder")
    run = train(tmp_path / "run", "--method", "adaptor", "--iterations", 1, "--hold-out", 2, "--recursive", "--target", tmp_path / "in")
    capsys.readouterr()
    call(ascent.main, run, *SMALL)  # the run had no ascent, so Norm is that of a small source
    assert "norm own" in (out := capsys.readouterr().out)
    assert f"3 pictures of {tmp_path / 'in'}" in out


def test_latents_are_encoded(capsys):
    call(ascent.main, "toyfaces-latent", "--n", 1, "--steps", 1, 2, "--device", "cpu")
    assert "10 pictures of sunglasses" in capsys.readouterr().out  # the first target of a built-in source


@pytest.mark.parametrize("flags, says", [
    ((), "--target: say to which pictures"),
    (("--target", "nowhere"), "nowhere: neither a folder nor a built-in target"),
    (("--target", "babies", "--steps", 3, 3), "--steps 3 3: give at least two"),
    (("--target", "babies", "--steps", 0, 3), "--steps 0 3: must be at least 1"),
    (("--target", "babies", "--reach", 0), "--reach 0.0: must be a positive number"),
    (("--target", "babies", "--seed", -1), "--seed -1"),
])
def test_errors(flags, says, tiny):
    with pytest.raises(InputError, match=says) as error:
        call(ascent.main, tiny.source, *flags, "--device", "cpu")
    assert "\n" not in str(error.value)
