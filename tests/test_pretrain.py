"""pretrain.py: what it refuses, and that an old run never comes back in place of a new one."""

import contextlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, tiny_network
from PIL import Image

import pretrain
from baselines.gan_training import Players
from checkpoints import pretrain_settings
from checkpoints.load import load_network
from checkpoints.network import Network
from checkpoints.weights_file import read_tensors
from ddpm import predict_eps
from plumbing.files import load_checkpoint, read_metrics
from plumbing.options import InputError, flat, replace
from plumbing.picture_folder import load_folder
from plumbing.training import EMA

SMALL = "--size 16 --channels 16 --channel-mult 1 2 --attention 2 --head-channels 16 --batch-size 4 --device cpu".split()
TINY = [*SMALL, "--images", "16"]


def weights(run):
    return read_tensors(run / "model.safetensors")[0]


def saved_parameters(run):
    """The weights of model.safetensors in the order of the optimiser."""
    return list(load_network(run / "model.safetensors").model.parameters())


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run)
    old = weights(run)
    (run / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="holds a run already"):  # a model without a checkpoint is one, too
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run)
    assert all(torch.equal(value, old[key]) for key, value in weights(run).items())
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", run, "--overwrite")

    def killed(*a):
        raise RuntimeError("killed")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(pretrain, "predict_eps", killed)
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--seed", 7, "--output-dir", run, "--overwrite")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--seed", 7, "--output-dir", run, "--resume")
    assert not (run / "model.safetensors").exists()


@pytest.mark.parametrize("flags, says", [
    (["--seed", 1], "--seed 1: the run in .* has 0; --resume takes the same flags"),
    (["--channels", 32], "--channels 32: the run in .* has 16"),
    (["--channel-mult", 1, 1], r"--channel-mult \(1, 1\): the run in .* has \(1, 2\)"),
])
def test_resume_takes_the_same_flags(tmp_path, flags, says):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path)
    with pytest.raises(InputError, match=says):
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume", *flags)
    with pytest.raises(InputError, match="toychurches: the run in .* has toyfaces"):
        call(pretrain.main, "toychurches", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume")
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 2, "--learning-rate", 1e-4, "--output-dir", tmp_path, "--resume")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_may_change_when_a_run_goes_on(monkeypatch):
    """All else decides on what is learnt, or on which random numbers are drawn: the run would be another."""
    may = {"resume", "overwrite", "output_dir", "device", "threads", "download", "save_every",  # where and how
           "iterations", "learning_rate", "p2"}                                                # what docs/built-in-weights.md did change
    began = pretrain.Options("toyfaces")
    monkeypatch.setattr(pretrain_settings, "load_checkpoint", lambda *a: dict(options=flat(began)))
    changed = {name: not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "another" for name, value in flat(began).items()}
    for name, value in changed.items():
        expects = contextlib.nullcontext() if name in may else pytest.raises(InputError, match="--resume takes the same flags")
        with expects:
            pretrain_settings.resumed(Path("run"), replace(began, **{name: value}))


@pytest.mark.parametrize("flags, says", [
    (["photos", "--images", 16], "--images: is how many to draw of a built-in domain"),
    (["photos", "--output-dir", "photos"], "--output-dir photos: pictures are read from there .photos.; choose one elsewhere"),
    (["photos", "--output-dir", "photos/runs/new"], "--output-dir photos/runs/new: pictures are read from there"),  # in subfolders, too
    (["photos", "--size", 30], "--size 30: the sides of what the network sees must be divisible by 4"),
    (["toyfaces", "--network", "stylegan2", "--channel-mult"], "--channel-mult: give at least one"),
    (["toyfaces", "--network", "kl", "--perceptual-weight", 2], "--perceptual-weight: is for --perceptual; give that, too"),
    (["toyfaces", "--network", "stylegan2", "--batch-size", 5], "--batch-size 5: the discriminator compares pictures in groups"),
])
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=says):
        call(pretrain.main, *flags)
    assert not any((tmp_path / "photos").iterdir()) and not (tmp_path / "runs").exists()


def test_resume_does_no_fewer_iterations(tmp_path):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 2, "--output-dir", tmp_path)
    with pytest.raises(InputError, match="--iterations 1: the run in .* has done 2 already"):
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume")


def test_killed_between_the_last_checkpoint_and_the_model(tmp_path):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path)
    made = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path, "--resume")
    assert (tmp_path / "model.safetensors").read_bytes() == made


@pytest.mark.parametrize("flags, says", [
    (["--learning-rate", "nan"], "--learning-rate nan: must be a positive number"),
    (["--norm-groups", 0], "--norm-groups 0: must be at least 1"),
    (["--head-channels", 64], "not a multiple of the 64 of a head"),
    (["--network", "kl", "--kl-weight", "nan"], "--kl-weight nan: must be at least 0"),
    (["--network", "judge", "--images", 2], "--images 2: must be at least 6"),
    (["--network", "classifier", "--flip"], "--flip: a mirrored picture has other attributes"),
    (["--attention", 3], "--attention 3: this network halves the size to factors of 1, 2"),
    (["--channel-mult", 0, 1], "--channel-mult 0 1: must be at least 1"),
    (["--threads", -1], "--threads -1: must be at least 1"),
    (["--seed", 2 ** 64], f"--seed {2 ** 64}: must be from 0"),
    (["--ema", 1], "--ema 1.0: must be below 1"),
    (["--codes", 8], "--codes: --network unet does not use it"),
])
def test_wrong_flags(tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        call(pretrain.main, "toyfaces", *TINY, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what it trains --------------------------------------------------------------------------------------------------

def test_the_averaged_weights_are_saved_and_the_learning_rate_falls(tmp_path):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 6, "--warmup", 2, "--ema", 0.9, "--output-dir", tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    saved = saved_parameters(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved, state["ema"]["average"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(saved, state["parameters"]))
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    expected = [1e-3 * min(1, (i + 1) / 2) * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    assert rates == pytest.approx(expected)


def test_every_iteration_draws_its_own_batch(tmp_path, monkeypatch):
    drawn, original = [], pretrain.losses_of
    monkeypatch.setattr(pretrain, "losses_of", lambda network, x0, labels, t, eps, *rest:
                        drawn.append((x0, t, eps)) or original(network, x0, labels, t, eps, *rest))
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 3, "--output-dir", tmp_path)
    for a, b in itertools.combinations(drawn, 2):
        assert not any(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("network", ["unet", "stylegan2"])
def test_the_numbers_reach_the_loop(network, tmp_path, monkeypatch):
    seen, gan = [], ["--network", "stylegan2", "--r1", 3, "--r1-every", 2, "--path-length", 5]

    class Watched(Players):
        def __init__(self, *a):
            super().__init__(*a)
            seen.append((self.r1, self.r1_every, self.path_length))

    monkeypatch.setattr(pretrain, "Players", Watched)
    monkeypatch.setattr(pretrain, "EMA", lambda parameters, decay: seen.append(decay) or EMA(parameters, decay))
    flags = [*gan, "--images", 4, "--size", 16, "--channels", 4, "--batch-size", 4, "--device", "cpu"] if network == "stylegan2" else TINY
    call(pretrain.main, "toyfaces", *flags, "--iterations", 1, "--ema", 0.7, "--output-dir", tmp_path)
    assert seen == ([(3.0, 2, 5.0), 0.7] if network == "stylegan2" else [0.7])


def test_a_first_stage_is_shown_and_saved_with_averaged_weights(tmp_path):
    flags = "--network kl --size 16 --channels 8 --channel-mult 1 2 --norm-groups 4 --images 16 --batch-size 4".split()
    call(pretrain.main, "toyfaces", *flags, "--iterations", 2, "--device", "cpu", "--output-dir", tmp_path)
    average = load_checkpoint(tmp_path / "checkpoint.pt")["ema"]["average"]
    assert all(torch.equal(a, b) for a, b in zip(saved_parameters(tmp_path), average, strict=True))


@pytest.fixture
def trained_on(monkeypatch):
    """What losses_of was given: x_0 and t of each iteration."""
    seen, original = [], pretrain.losses_of
    monkeypatch.setattr(pretrain, "losses_of", lambda network, x0, labels, t, *rest: seen.append((x0, t)) or original(network, x0, labels, t, *rest))
    return seen


@pytest.mark.parametrize("flags, limit", [(["--network", "judge"], 50), (["--network", "classifier"], 1000), ([], 1000)])
def test_the_judge_sees_little_noise(flags, limit, trained_on, tmp_path):
    call(pretrain.main, "toyfaces", *TINY, *flags, "--iterations", 4, "--batch-size", 16, "--output-dir", tmp_path)
    largest = max(t.max().item() for _, t in trained_on)
    assert limit / 2 < largest < limit


@pytest.fixture
def photos(tmp_path):
    """A folder of two pictures."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def mirrored(batches, photos):
    """Whether each picture of these batches (B, 3, H, W) is the mirror image of one in the folder."""
    shots = load_folder(photos, 16)
    return [any(torch.equal(x, shot.flip(2)) for shot in shots) for batch in batches for x in batch]


@pytest.mark.parametrize("flags", [[], ["--flip"]])
def test_pictures_are_mirrored_on_request(flags, trained_on, photos, tmp_path):
    call(pretrain.main, photos, *SMALL, *flags, "--iterations", 2, "--batch-size", 8, "--output-dir", tmp_path / "run")
    turned = mirrored([x0 for x0, _ in trained_on], photos)
    assert any(turned) == bool(flags) and not all(turned)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0


@pytest.mark.parametrize("flags", [[], ["--flip"]])
def test_a_gan_sees_mirrored_pictures_on_request(flags, photos, tmp_path, monkeypatch):
    seen, turn = [], Players.discriminator_turn
    monkeypatch.setattr(Players, "discriminator_turn", lambda self, real, *rest: seen.append(real) or turn(self, real, *rest))
    wanted = "--network stylegan2 --size 16 --channels 4 --channel-mult 1 4 --style-dim 8 --mapping-layers 2 --batch-size 8 --iterations 2 --device cpu".split()
    call(pretrain.main, photos, *wanted, *flags, "--output-dir", tmp_path / "run")
    turned = mirrored(seen, photos)
    assert any(turned) == bool(flags) and not all(turned)


def test_the_weight_of_kl(tmp_path):
    flags = "toyfaces --network kl --size 16 --channels 8 --channel-mult 1 2 --norm-groups 4 --images 8 --batch-size 4 --iterations 1 --device cpu".split()
    losses = []
    for weight in (0, 1, 3):
        call(pretrain.main, *flags, "--kl-weight", weight, "--output-dir", tmp_path / str(weight))
        losses.append(read_metrics(tmp_path / str(weight) / "metrics.jsonl")[0]["loss"])
    assert losses[1] > losses[0] and losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)


def test_p2_weighs_each_picture_by_its_signal_to_noise_ratio():
    network, g = tiny_network(), torch.Generator().manual_seed(0)
    x0, eps, t = torch.randn(3, 3, 16, 16, generator=g), torch.randn(3, 3, 16, 16, generator=g), torch.tensor([0, 300, 999])
    plain, weighted = (pretrain.losses_of(network, x0, None, t, eps, None, p2).detach() for p2 in (0.0, 2.0))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    snr = alpha_bar / (1 - alpha_bar)
    np.testing.assert_allclose(weighted / plain, 1 / (1 + snr[t]) ** 2, rtol=1e-3)


def test_resume_takes_the_same_pictures_and_first_stage(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
    small = "--size 16 --channels 8 --channel-mult 1 2 --norm-groups 4 --batch-size 2 --device cpu".split()
    stage, run = tmp_path / "stage", ["--output-dir", tmp_path / "run", "--first-stage", tmp_path / "stage" / "model.safetensors"]
    call(pretrain.main, folder, "--network", "kl", *small, "--iterations", 1, "--output-dir", stage)
    call(pretrain.main, folder, *small, "--attention", 2, "--head-channels", 8, "--iterations", 1, *run)
    Image.new("RGB", (16, 16)).save(folder / "more.png")
    with pytest.raises(InputError, match="photos: is not what it was when the run in .* began"):
        call(pretrain.main, folder, *small, "--attention", 2, "--head-channels", 8, "--iterations", 2, *run, "--resume")
    (folder / "more.png").unlink()
    call(pretrain.main, folder, "--network", "kl", *small, "--iterations", 2, "--output-dir", stage, "--resume")
    with pytest.raises(InputError, match="--first-stage .*: is not what it was when the run in .* began"):
        call(pretrain.main, folder, *small, "--attention", 2, "--head-channels", 8, "--iterations", 2, *run, "--resume")


def test_resumed_it_is_the_same_run(tmp_path):
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 4, "--output-dir", tmp_path / "whole")

    def killed(model, xt, t, schedule, left=[2]):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return predict_eps(model, xt, t, schedule)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(pretrain, "predict_eps", killed)
        call(pretrain.main, "toyfaces", *TINY, "--iterations", 4, "--save-every", 1, "--output-dir", tmp_path / "run")
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 4, "--output-dir", tmp_path / "run", "--resume")
    ends = [weights(tmp_path / name) for name in ("whole", "run")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_a_run_that_diverged_goes_on_from_what_it_saved_before(tmp_path):
    flags = ["toyfaces", *TINY, "--warmup", 0, "--save-every", 2, "--output-dir", tmp_path]
    with pytest.raises(InputError, match="at iteration 1; start again with a lower --learning-rate"):  # nothing is saved yet
        call(pretrain.main, *flags, "--iterations", 2, "--learning-rate", 1e30)
    call(pretrain.main, *flags, "--iterations", 2)
    with pytest.raises(InputError, match="loss nan, .*; the last state that was saved is in .*checkpoint.pt; go on with --resume"):
        call(pretrain.main, *flags, "--iterations", 9, "--resume", "--learning-rate", 1e20)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == 2
    call(pretrain.main, *flags, "--iterations", 9, "--resume", "--learning-rate", 1e-4)
    said = load_network(tmp_path / "model.safetensors").description["made_by"]
    assert said.count("python pretrain.py") == 2 and "--resume" not in said  # that which diverged left nothing


def test_large_gradients_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "predict_eps", lambda model, xt, t, schedule: 1000 * model(xt, t) + 5)
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 1, "--output-dir", tmp_path)
    moments = load_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["state"].values()
    norm = sum((moment["exp_avg"] / 0.1).square().sum() for moment in moments) ** 0.5  # Adam's first step: 0.1 g
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["gradient_norm"] > 100 and norm == pytest.approx(1, rel=1e-3)


def test_sample_pictures_are_drawn_with_the_average(tmp_path, monkeypatch):
    drawn = []

    def record(network, seeds, **how):
        drawn.extend(p.detach().clone() for p in network.model.parameters())
        return torch.zeros(len(seeds), 3, 16, 16)
    monkeypatch.setattr(Network, "sample", record)
    call(pretrain.main, "toyfaces", *TINY, "--iterations", 2, "--output-dir", tmp_path)
    average = load_checkpoint(tmp_path / "checkpoint.pt")["ema"]["average"]
    assert all(torch.equal(a, b) for a, b in zip(drawn, average, strict=True))


def test_a_first_stage_learns_with_lpips(tmp_path, monkeypatch):
    """--perceptual adds the distance of load_lpips, with its weight, to what a first stage descends."""
    asked, flags = [], ["toyfaces", "--network", "kl", "--size", 16, "--channels", 8, "--norm-groups", 4, "--images", 8, "--batch-size", 4,
                        "--iterations", 1, "--device", "cpu"]
    distance = torch.nn.Module()
    distance.forward = lambda a, b: torch.full((len(a), 1, 1, 1), 3.0)
    monkeypatch.setattr(pretrain, "load_lpips", lambda *given: asked.append(given) or distance)
    call(pretrain.main, *flags, "--output-dir", tmp_path / "without")
    call(pretrain.main, *flags, "--output-dir", tmp_path / "with", "--perceptual", "squeeze", "--perceptual-weight", 0.5, "--lpips-backbone", "f.pth")
    without, with_ = (read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("without", "with"))
    assert asked == [("squeeze", "f.pth", False)] and with_ == pytest.approx(without + 0.5 * 3.0, rel=1e-5)
    with pytest.raises(InputError, match="--perceptual: --network unet does not use it"):
        call(pretrain.main, "toyfaces", "--perceptual", "vgg", "--output-dir", tmp_path / "unet")
