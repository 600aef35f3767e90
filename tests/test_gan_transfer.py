"""GANs in files, and python -m baselines.gan_transfer: runs, what they leave, what is refused."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import evaluate
import pretrain
import sample
from baselines import gan_methods, gan_settings, gan_training, gan_transfer
from baselines.gan_methods import METHODS
from baselines.gan_training import check_groups
from baselines.stylegan2 import Discriminator, Generator
from checkpoints import __main__ as checkpoints_main
from checkpoints import export, gan, run_folder
from checkpoints.load import load_gan, load_network, load_source
from checkpoints.network import fingerprint, save_network
from checkpoints.weights_file import read_tensors
from plumbing import distributed
from plumbing.files import read_metrics
from plumbing.options import InputError, flag, parse
from plumbing.picture_folder import load_folder
from plumbing.training import EMA

CHANNELS = dict(size=16, channel_base=64, channel_max=16)
SHORT = "--iterations 4 --batch-size 4 --samples 4 --previews 2 --save-every 2 --device cpu".split()


def untrained(seed=0):
    torch.manual_seed(seed)
    config = dict(generator=dict(CHANNELS, style_dim=8, n_mlp=2), discriminator=CHANNELS)
    network = gan.build(dict(network="StyleGAN2", config=config), "test")
    for p in network.model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """gan.safetensors, ours; source.pt as CDC publishes its own; a folder of pictures."""
    folder = tmp_path_factory.mktemp("gan")
    network = untrained()
    save_network(folder / "gan.safetensors", network)
    states = dict(g_ema=network.model.state_dict(), g=untrained(1).model.state_dict(), d=network.discriminator.state_dict())
    torch.save(dict(states, g_optim={}, latent_avg=torch.zeros(8)), folder / "source.pt")
    (folder / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 128, (5, 16, 16, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


def transfer(files, out, *flags):
    call(gan_transfer.main, *SHORT, "--source", files / "gan.safetensors", "--target", files / "photos", "--output-dir", out, *flags)
    return out


def test_our_file_and_a_published_one_hold_the_same(files):
    ours, published = load_gan(str(files / "gan.safetensors")), load_gan(str(files / "source.pt"))
    assert fingerprint(ours) == fingerprint(published)
    assert ours.description["config"] == published.description["config"]
    assert torch.equal(ours.sample(range(3)), published.sample(range(3)))


def test_the_published_size_is_recognised():
    with torch.device("meta"):
        states = Generator(256).state_dict(), Discriminator(256).state_dict()
    found = gan.describe(*states, "source_ffhq.pt")["config"]
    assert found["generator"] == dict(size=256, style_dim=512, n_mlp=8, channel_base=32768, channel_max=512)
    assert found["discriminator"] == dict(size=256, channel_base=32768, channel_max=512)


def test_pictures_come_from_their_seeds_alone():
    network = untrained()
    images = network.sample(range(5), batch_size=2)
    torch.testing.assert_close(images[3:4], network.sample([3]))
    assert images.shape == (5, 3, 16, 16) and network.sample([]).shape == (0, 3, 16, 16)
    g = torch.Generator().manual_seed(3)
    z = torch.randn(8, generator=g)[None]
    noise = [torch.randn(fixed.shape[1:], generator=g)[None] for fixed in network.model.fixed_noise]
    torch.testing.assert_close(images[3:4], network.model.synthesize(network.model.style(z), noise)[0])


def test_a_run_leaves_what_a_run_leaves(files, tmp_path):
    out = transfer(files, tmp_path / "run", "--method", "cdc")
    there = {path.name for path in out.iterdir()}
    assert there == {"options.json", "checkpoint.pt", "weights.safetensors", "metrics.jsonl", "targets.png", "samples.png",
                     "progress.png", "progress", "stages", "loss.png", "report.html"}
    assert [record["iteration"] for record in run_folder.stages(out)] == [0, 2, 4]
    assert len(read_metrics(out / "metrics.jsonl")) == 4
    adapted, options = run_folder.load_run(out)
    source = load_source(str(files / "gan.safetensors"))
    assert options["method"] == "cdc"
    assert not torch.equal(adapted.sample([0]), source.sample([0]))
    before, _ = run_folder.load_run(out, at=0)
    torch.testing.assert_close(before.sample([0]), source.sample([0]))
    call(sample.main, out, "-n", 2, "--device", "cpu")
    assert len(list((out / "drawn").glob("*.png"))) == 2
    assert "python -m baselines.gan_transfer" in (out / "report.html").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit(files, tmp_path, method, monkeypatch):
    flags = ["--method", method, "--path-length", 2, *(["--fisher-samples", 2, "--ewc-weight", 1] if method == "ewc" else [])]
    if method == "ada":  # every picture is augmented from the second iteration on
        monkeypatch.setattr(gan_methods.ADA, "observe", lambda self, real: dict(ada_p=self.state["p"].fill_(1.0).item()))
    whole = transfer(files, tmp_path / "whole", *flags)
    first = transfer(files, tmp_path / "parts", *flags, "--iterations", 2)
    call(gan_transfer.main, "--output-dir", first, "--resume", "--iterations", 4, "--device", "cpu")
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, first)]
    assert all(torch.equal(a, b) for a, b in zip(*(state["parameters"] for state in states), strict=True))
    assert states[0]["gan"] == states[1]["gan"]
    assert all(torch.equal(value, read_tensors(first / "weights.safetensors")[0][key])
               for key, value in read_tensors(whole / "weights.safetensors")[0].items())


def test_a_run_depends_on_its_seed_and_averages_once_an_iteration(files, tmp_path):
    runs = [transfer(files, tmp_path / str(seed), "--method", "tgan", "--samples", 0, "--seed", seed) for seed in (0, 1)]
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    assert not any(torch.equal(a, b) for a, b in zip(*(state["parameters"] for state in states)) if a.numel() > 100)
    assert states[0]["ema"]["updates"] == 4


def test_every_iteration_draws_its_own_and_gets_the_numbers(files, tmp_path, monkeypatch):
    seen, numbers, turn = [], set(), gan_training.Players.discriminator_turn

    def watched(self, real, z, *rest):
        seen.append(z)
        numbers.add((self.r1, self.r1_every, self.path_length))
        return turn(self, real, z, *rest)

    monkeypatch.setattr(gan_training.Players, "discriminator_turn", watched)
    monkeypatch.setattr(gan_transfer, "EMA", lambda parameters, decay: numbers.add(decay) or EMA(parameters, decay))
    transfer(files, tmp_path / "run", "--method", "tgan", "--samples", 0, "--r1", 3, "--r1-every", 2, "--path-length", 5, "--ema", 0.7)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2)) and len(seen) == 4
    assert numbers == {(3.0, 2, 5.0), 0.7}


def test_a_name_of_the_hub_is_kept_with_its_commit(files, tmp_path, monkeypatch):
    monkeypatch.setattr(gan_transfer, "pinned", lambda name: str(files / "gan.safetensors") if name == "owner/gan" else name)
    out = transfer(files, tmp_path / "run", "--source", "owner/gan", "--iterations", 0, "--samples", 0)
    assert json.loads((out / "options.json").read_text())["source"] == str(files / "gan.safetensors")


@pytest.mark.parametrize("options", [gan_settings.PUBLISHED, gan_settings.SMALL])
def test_the_numbers_are_those_of_the_help(options, capsys):
    """"(default: what small ones have; above 64 pixels what published ones have)", or one for both."""
    with pytest.raises(SystemExit):
        parse(gan_settings.Options, "", ["--help"])
    words = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for name, value in options.items():
        default = re.search(rf"{flag(name)} .*?default: (.*?)[.)] ", words)[1]
        of_small, _, of_published = default.partition("; above 64 pixels ")
        said = of_published or of_small if options is gan_settings.PUBLISHED else of_small
        assert float(re.match(r"[\d.e-]+", said)[0]) == value, name


@pytest.mark.parametrize("flags, mirrored", [(["--no-flip"], False), ([], True)])
def test_mirrored_pictures(files, tmp_path, flags, mirrored, monkeypatch):
    seen, turn = [], gan_training.Players.discriminator_turn
    monkeypatch.setattr(gan_training.Players, "discriminator_turn", lambda self, real, *rest: seen.append(real) or turn(self, real, *rest))
    transfer(files, tmp_path / "run", "--method", "tgan", "--samples", 0, *flags)
    shots = load_folder(files / "photos", 16)
    plain, turned = ([any(torch.equal(x, shot) for shot in kind) for x in torch.cat(seen)] for kind in (shots, shots.flip(3)))
    assert any(plain) and any(turned) == mirrored and all(a or b for a, b in zip(plain, turned))


def test_stages_are_compared(files, tmp_path, capsys, monkeypatch):
    out = transfer(files, tmp_path / "run")
    monkeypatch.setattr(evaluate, "comparison", lambda *a: lambda samples: (None, {"Intra-LPIPS": 0.5, "nearest": 0.1}))
    call(evaluate.main, out, "--at", "all", "-n", 3, "--device", "cpu")
    assert "| 4 | 0.5 | 0.1 |" in capsys.readouterr().out


def test_pretraining_goes_on_bit_for_bit(tmp_path):
    flags = ("toyfaces --network stylegan2 --size 16 --channels 4 --channel-mult 1 4 --style-dim 8 --mapping-layers 2 --images 16 "
             "--batch-size 4 --save-every 2 --r1-every 2 --path-length 2 --device cpu --learning-rate 1e-3").split()
    schedule = lambda training, iteration: training.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", schedule)  # which falls with the run's length
        call(pretrain.main, *flags, "--iterations", 4, "--output-dir", tmp_path / "whole")
        call(pretrain.main, *flags, "--iterations", 2, "--output-dir", tmp_path / "parts")
        call(pretrain.main, *flags, "--iterations", 4, "--output-dir", tmp_path / "parts", "--resume")
    whole, parts = (load_gan(str(tmp_path / name / "model.safetensors")) for name in ("whole", "parts"))
    assert fingerprint(whole) == fingerprint(parts)
    assert (tmp_path / "whole" / "samples.png").exists()


def test_what_a_file_is(files, capsys):
    call(checkpoints_main.main, files / "source.pt", "--convert", files / "converted.safetensors")
    said = capsys.readouterr().out
    assert "StyleGAN2, PyTorch port" in said and "discriminator" in said and "yes, all" in said
    converted = load_network(files / "converted.safetensors")
    assert fingerprint(converted) == fingerprint(load_network(files / "source.pt"))
    assert converted.description["layout"] == "this project's own"


def spoilt(files, tmp_path, change):
    state = torch.load(files / "source.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "spoilt.pt")
    return tmp_path / "spoilt.pt"


@pytest.mark.parametrize("change, says", [
    (lambda s: s.pop("d"), "a generator alone; adapting it takes its discriminator"),
    (lambda s: s["g_ema"].pop("conv1.noise.weight"), "missing g_ema.conv1.noise.weight"),
    (lambda s: s["d"].pop("final_conv.0.weight"), "missing d.final_conv.0.weight"),
    (lambda s: s["d"].pop("convs.0.0.weight"), r"another layout than that of its common PyTorch port \(no convs.0.0.weight\)"),
    (lambda s: s["g_ema"].update(more=torch.zeros(1)), "unexpected g_ema.more"),
    (lambda s: s["g_ema"]["conv1.noise.weight"].fill_(float("nan")), "NaN or Inf"),
    (lambda s: s["g_ema"].update({"style.1.weight": torch.zeros(3)}), "does not fit|do not fit|another layout"),
])
def test_spoilt_files_are_refused(files, tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        load_gan(str(spoilt(files, tmp_path, change)))


def test_a_state_without_average_gives_its_generator(files, tmp_path):
    network = load_gan(str(spoilt(files, tmp_path, lambda s: s.pop("g_ema"))))
    assert torch.equal(network.sample([1]), untrained(1).sample([1]))


def test_networks_of_two_sizes_are_refused(tmp_path):
    config = dict(generator=dict(CHANNELS, style_dim=8, n_mlp=2), discriminator=dict(CHANNELS, size=32))
    with pytest.raises(InputError, match="one draws at 16, the other judges at 32"):
        gan.build(dict(network="StyleGAN2", config=config), "file")


@pytest.mark.parametrize("spoil", [lambda s: s.pop("gan"), lambda s: s["gan"].pop("path_length"), lambda s: s["gan"].update(path_length="x")])
def test_a_damaged_state_is_refused(files, tmp_path, spoil):
    out = transfer(files, tmp_path / "run", "--method", "tgan", "--samples", 0)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    spoil(state)
    torch.save(state, out / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt: is of another network"):
        call(gan_transfer.main, "--output-dir", out, "--resume", "--iterations", 5)


def test_a_run_that_diverges_keeps_its_last_state(files, tmp_path):
    """A state between the turns of discriminator and generator would be none."""
    flags = ["--method", "tgan", "--samples", 0, "--save-every", 1, "--learning-rate", 1e30]
    with pytest.raises(InputError, match=r"gradient .* at iteration \d+; start again with --overwrite"):  # none was saved
        transfer(files, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    out = transfer(files, tmp_path / "goes-on", *flags[:-1], 1e-3, "--iterations", 2)
    saved = (out / "checkpoint.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="the last state that was saved is in .*checkpoint.pt"):
        patch.setattr(gan_training, "generator_loss", lambda fake: fake.sum() * float("nan"))
        call(gan_transfer.main, "--output-dir", out, "--resume", "--iterations", 4)
    assert (out / "checkpoint.pt").read_bytes() == saved


def test_a_generator_alone_draws(files, tmp_path):
    path = spoilt(files, tmp_path, lambda s: s.pop("d"))
    assert torch.equal(load_source(str(path)).sample([1]), load_gan(str(files / "source.pt")).sample([1]))


@pytest.mark.parametrize("flags, says", [
    (["--method", "tgan", "--cdc-weight", 3], "--cdc-weight: --method tgan does not use it, only cdc; leave it out"),
    (["--batch-size", 1], "--batch-size 1: must be at least 2"),
    (["--method", "cdc", "--batch-size", 2], "--batch-size 2: cdc judges .* give at least 3"),
    (["--method", "tgan", "--batch-size", 7], "--batch-size 7: the discriminator compares pictures in groups .* and would see 7 at once"),
    (["--batch-size", 20], "--batch-size 20: the discriminator compares pictures in groups .* and would see 5 at once"),  # whole ones of cdc
    (["--method", "ada", "--ada-target", "nan"], "--ada-target nan: must be at least -1"),
    (["--patch-block", 3], "--patch-block 3: must be below 3"),
    (["--dcl-weights", 1, "--method", "dcl"], "--dcl-weights: give two numbers"),
    (["--target", "nowhere"], "nowhere: neither a folder nor a built-in target"),
    (["--source", "toyfaces"], "toyfaces: a UNet, not a StyleGAN2; train_tan.py adapts diffusion models"),
])
def test_what_is_refused(files, tmp_path, flags, says):
    with pytest.raises(InputError, match=says):
        transfer(files, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_each_process_has_pictures_to_compare(monkeypatch):
    check_groups(40)
    monkeypatch.setattr(distributed, "world", lambda: 8)
    check_groups(32)
    with pytest.raises(InputError, match="--batch-size 40: .* would see 5 at once"):
        check_groups(40)


def test_a_gan_where_a_diffusion_model_belongs(files, tmp_path, train):
    with pytest.raises(InputError, match="a StyleGAN2, not a diffusion model; python -m baselines.gan_transfer adapts it"):
        train(tmp_path / "run", "--source", files / "source.pt")
    out = transfer(files, tmp_path / "gan", "--method", "tgan", "--samples", 0)
    with pytest.raises(InputError, match="a StyleGAN2, not a diffusion model"):
        call(export.main, out, tmp_path / "exported")
    with pytest.raises(InputError, match="--steps: .* is a GAN, which draws in one pass; leave it out"):
        call(sample.main, out, "--steps", 5)
    with pytest.raises(InputError, match="holds a run already"):
        transfer(files, out)
    assert json.loads((out / "options.json").read_text())["method"] == "tgan"
