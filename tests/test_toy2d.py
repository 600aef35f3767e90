"""toy2d.py, and the campaign experiments/toy2d_measured.py, on a tiny budget."""

import contextlib
import functools
import io
import json

import pytest
import torch
from conftest import call

import gaussians
import toy2d
from classifier import SOURCE, TARGET
from experiments import toy2d_measured
from gaussians import MEANS, SCHEDULE, angle, draw_points, optimal_predictor, pretrain, train_classifier
from plumbing.options import InputError
from plumbing.seeds import generator

FLAGS = "--draws 3 --repeats 4 --iterations 4 --timesteps 100 500 --pgd-steps 2".split()
PROGRAMS = {toy2d: ["figure2.png", "results.json"],
            toy2d_measured: ["measured.json", "measured.png", "tables.md"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(program): the folder that it fills with these flags, what its JSON holds, what it prints."""
    @functools.cache
    def run(program, name="a"):
        folder, printed = tmp_path_factory.mktemp(name), io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            patch.setattr(gaussians, "pretrain", lambda n, *a: pretrain(n // 8, *a))
            patch.setattr(gaussians, "train_classifier", lambda points, n, *a: train_classifier(points, n // 8, *a))
            call(program.main, *FLAGS, "--output-dir", folder)
        results, = (json.loads(file.read_text()) for file in folder.glob("*.json"))
        return folder, results, printed.getvalue()
    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_reproduce(program, run):
    (folder, *first), (_, *second) = run(program), run(program, "b")
    assert sorted(file.name for file in folder.iterdir()) == PROGRAMS[program]
    picture, = folder.glob("*.png")
    assert picture.stat().st_size > 10_000
    for results, _ in (first, second):
        results.pop("seconds", None)
        assert results["options"].pop("output_dir")
    assert first[0] == second[0] and "NaN" not in json.dumps(first[0])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("bad", ["--timesteps 1000", "--timesteps", "--draws 0", "--learning-rate nan",
                                 "--gamma 0"])
def test_bad_input_is_refused(program, bad, tmp_path):
    with pytest.raises(InputError, match=bad.split()[0]):
        call(program.main, *bad.split(), "--output-dir", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_the_demo_prints_what_it_writes(run):
    _, results, printed = run(toy2d)
    assert results["shown"] == list(toy2d.COLUMNS) and results["options"]["draws"] == 3
    for claim, numbers in results["claims"].items():
        line, = (line for line in printed.splitlines() if line.startswith(claim))
        cells = [f"{number:.2f}" for number in numbers if number is not None]
        assert line.removeprefix(claim).split() == cells
    for method, curve in results["distances"].items():
        iterations, low, medians, high = zip(*curve)
        assert iterations == (1, 2, 3, 4) and all(a <= b <= c for a, b, c in zip(low, medians, high))
        assert medians[0] < 8 ** 0.5  # a step towards the target
        assert results["claims"]["    at the end"][toy2d.COLUMNS.index(method)] == medians[-1]
    baseline, guided, tan, fading = (results["distances"][name] for name in toy2d.METHODS)
    assert baseline != guided != tan != baseline
    assert fading[0] == guided[0] and fading[1] != guided[1]  # at first gamma is the same


def test_quick_holds_where_nothing_else_is_typed(monkeypatch):
    """The program is stopped before it works."""
    seen = []
    monkeypatch.setattr(toy2d.flags, "positive", lambda options, *names: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(toy2d.main, "--quick", "--draws", 7)
    assert (seen[0].draws, seen[0].repeats, seen[0].iterations) == (7, 100, 32)


def test_the_campaign_tabulates_every_method(run):
    folder, results, printed = run(toy2d_measured)
    text = (folder / "tables.md").read_text()
    assert text in printed and "| baseline |" in text
    ends = {row["method"]: row["w2"] for row in results["adaptation"]}
    assert ends.keys() == toy2d_measured.METHODS.keys() and len(set(map(tuple, ends.values()))) == len(ends)
    assert {row["batch"] for row in results["angles"]} == {"repeated", "one noise each"}
    for row in results["angles"]:
        assert ("paper_order" in row) == row["method"].startswith("TAN")
        assert row["quartiles"] == sorted(row["quartiles"])


def test_the_predictors_error_is_measured_where_it_says():
    """This one is right but for points whose coordinates sum to more than 0: most of the source's, few of the target's."""
    wrong_above = lambda xt, t: optimal_predictor(xt, t) + (xt.sum(-1, keepdim=True) > 0)
    errors = toy2d_measured.predictor_errors(wrong_above, [50], seed=0)
    assert errors["source"] > 0.75 and errors["target"][50] < 0.35  # over all t, near the end only half of the points


def test_samples_at_the_target_have_no_error(monkeypatch):
    rates = []
    monkeypatch.setattr(toy2d_measured.gaussians, "adapt", lambda *given: rates.append(given[7]) or iter([None]))
    monkeypatch.setattr(toy2d_measured.gaussians, "trajectories", lambda model, noise, steps: (noise + MEANS[TARGET])[None])
    options = toy2d_measured.Options(draws=2, iterations=1, learning_rate=1.0)
    for row in toy2d_measured.measure_adaptation(options, None, lambda part: {}, None):
        assert row["error"].max() < 1e-5 and row["w2"].max() < 0.3
    assert rates == [2.2 if method == "faster baseline" else 1.0 for method in toy2d_measured.METHODS]


def test_the_gradient_is_linear_in_gamma(monkeypatch):
    """So the angles at another gamma follow from those at --gamma: as if they had been asked for."""
    options = toy2d_measured.Options(draws=2, repeats=3, timesteps=(500,), gamma=5.0)
    shots = draw_points(TARGET, 10, 2, generator(1))
    monkeypatch.setattr(toy2d_measured, "GAMMAS", (20.0,))

    def rows(gamma):
        options.gamma = gamma
        exact = {"bayes": toy2d_measured.gaussians.bayes_classifier}
        found = toy2d_measured.measure_angles(options, optimal_predictor, lambda part: exact, shots)
        return {row["method"]: row["angle"] for row in found if row["batch"] == "repeated"}

    derived, asked = rows(5.0)["guided, bayes, gamma 20.0"], rows(20.0)["guided, bayes"]
    torch.testing.assert_close(derived, asked, atol=1e-3, rtol=1e-3)


def test_worst_noise_against_its_recursion(monkeypatch):
    """On the optimal predictor Eq. 8 is linear.

    Per coordinate eps = A eps_0 + C d, d the shots about their mean, with A <- p A / s, C <- (p C - q) / s,
    p = 1 + 2 omega a^2, q = 2 omega a sqrt(a (1-a)), s the standard deviation that Norm takes away.
    """
    shots, omega, steps, t = draw_points(TARGET, 10, 6, generator(1)), 0.5, 10, 100
    a = SCHEDULE.alpha_bar[t].item()
    p, q = 1 + 2 * omega * a * a, 2 * omega * a * (a * (1 - a)) ** 0.5
    d = shots - shots.mean(0)
    variance = d.square().mean(0)
    A, C = torch.ones(6, 2), torch.zeros(6, 2)
    for _ in range(steps):
        A, C = p * A, p * C - q
        s = (A ** 2 + C ** 2 * variance).sqrt()
        A, C = A / s, C / s
    # Of the two coordinates of the noise; its axes are sqrt(1 +- correlation).
    correlation = C.prod(1) * (d[..., 0] * d[..., 1]).mean(0)
    expected = ((1 + correlation.abs()) / (1 - correlation.abs())).sqrt()
    monkeypatch.setattr(toy2d_measured, "ASCENTS", [(omega, steps)])
    rows = toy2d_measured.measure_noise(optimal_predictor, "exact", shots.repeat(20, 1, 1), 0)
    row, = (row for row in rows if row["t"] == "100")
    torch.testing.assert_close(row["ratio"], expected, atol=0.02, rtol=0.02)
    away = angle(shots.mean(0) - MEANS[SOURCE], (MEANS[TARGET] - MEANS[SOURCE]).expand(6, 2))
    torch.testing.assert_close(row["away"], away, atol=0.05, rtol=0)
    assert (row["off"] >= 0).all() and (row["off"] <= 90).all()
