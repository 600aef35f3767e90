"""checkpoints/: what is saved loads, what does not fit is named, and nothing in a file is run."""

import json
import os
import shutil

import pytest
import torch
from conftest import TINY, call, tiny_network
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints.__main__ import main
from checkpoints.load import (
    ASSETS,
    BUILT_IN,
    BUILT_IN_GANS,
    NOT_SOURCES,
    built_in,
    load_network,
    load_source,
    start_classifier,
)
from checkpoints.network import build, fingerprint, save_network
from checkpoints.published import LINEAR
from checkpoints.weights_file import read_tensors
from classifier import from_unet
from ddpm import Schedule
from plumbing.options import InputError
from unet import UNet

X, T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 800])


def rewrite(source, path, change):
    """A copy of a safetensors file with its dict of tensors changed."""
    tensors = load_file(source)
    with safe_open(source, "pt") as f:
        metadata = f.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    return path


# ---- what is saved loads -----------------------------------------------------------------------------------

def test_round_trip(tmp_path):
    network = tiny_network()
    network.description.update(made_by="a test", schedule=dict(name="cosine", timesteps=50))
    network.schedule = Schedule(**network.description["schedule"])
    save_network(tmp_path / "a.safetensors", network)
    loaded = load_network(tmp_path / "a.safetensors")
    assert isinstance(loaded.model, UNet) and not loaded.model.training
    assert loaded.model(X, T).equal(network.model(X, T))
    assert loaded.schedule.alpha_bar.equal(network.schedule.alpha_bar)
    assert loaded.description["made_by"] == "a test"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_classifier_round_trip(tmp_path):
    source = tiny_network()
    network = start_classifier("scratch", None, "", source)
    save_network(tmp_path / "c.safetensors", network)
    assert load_network(tmp_path / "c.safetensors").model(X, T).equal(network.model(X, T))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_published_files(tmp_path, zipped, suffix):
    model, path = tiny_network().model, tmp_path / f"published{suffix}"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    (tmp_path / "arch.json").write_text(json.dumps(dict(config=TINY)))
    network = load_source(str(path), str(tmp_path / "arch.json"))
    assert network.model(X, T).equal(model(X, T)) and network.schedule.config == LINEAR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    model = tiny_network().model
    torch.save({k: v.to(dtype) for k, v in model.state_dict().items()}, tmp_path / "half.pt")
    (tmp_path / "arch.json").write_text(json.dumps(dict(config=TINY, schedule=dict(LINEAR, timesteps=10))))
    network = load_network(tmp_path / "half.pt", str(tmp_path / "arch.json"))
    assert {p.dtype for p in network.model.parameters()} == {torch.float32}
    assert network.schedule.timesteps == 10
    torch.testing.assert_close(network.model.out[2].weight, model.out[2].weight, rtol=0.01, atol=0)


def test_fingerprint():
    network = tiny_network()
    before = fingerprint(network)
    assert fingerprint(tiny_network()) == before and len(before) == 16
    network.model.input_blocks[0][0].bias.data[0] += 1e-6
    assert fingerprint(network) != before
    latent = load_source("toyfaces-latent")
    before, latent.scale_factor = fingerprint(latent), 2 * latent.scale_factor  # other latents of the same pictures
    assert fingerprint(latent) != before
    before, latent.clip = fingerprint(latent), 3.0  # other samples
    assert fingerprint(latent) != before


# ---- built-in names are a list -----------------------------------------------------------------------------

def test_every_file_in_assets_has_a_name():
    assert {built_in(name) for name in BUILT_IN + BUILT_IN_GANS + NOT_SOURCES} == set(ASSETS.glob("*.safetensors"))


@pytest.fixture
def beside(tiny, tmp_path):
    """A name with neighbours of which one is a source and one its classifier, but itself no file."""
    shutil.copy(tiny.source, tmp_path / "model.safetensors")
    scratch = start_classifier("scratch", None, "", tiny_network())
    save_network(tmp_path / "model-classifier.safetensors", scratch)
    return tmp_path / "model"


def test_a_path_is_no_built_in_name(beside):
    assert built_in(str(beside)) is None and built_in(str(ASSETS / "toyfaces")) is None
    with pytest.raises(InputError, match="model: no such file"):
        load_source(str(beside))
    with pytest.raises(InputError, match="model: no such file"):
        call(main, beside)


def test_a_neighbour_is_no_built_in_classifier(beside):
    source = tiny_network()
    ours = start_classifier(None, None, str(beside), source)
    assert "started_from" not in ours.description
    encoder = start_classifier("encoder", None, "", source).model
    assert ours.model.time_embed[0].weight.equal(encoder.time_embed[0].weight)


def test_the_built_in_classifier_is_found():
    classifier = start_classifier(None, None, "toyfaces", load_source("toyfaces"))
    assert classifier.description["started_from"] == str(ASSETS / "toyfaces-classifier.safetensors")


# ---- what does not fit is named ----------------------------------------------------------------------------

KEY, PSI = "time_embed.0.weight", "input_blocks.1.0.adaptor.up.weight"


@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop(KEY), f"missing {KEY}"),
    (lambda t: t.update(extra=torch.ones(1)), "unexpected extra"),
    # load_state_dict(strict=True) would drop psi without a word
    (lambda t: t.update({PSI: torch.ones(1)}), f"unexpected {PSI}"),
    (lambda t: t.update({KEY: t[KEY].T.contiguous()}), rf"{KEY} is \[16, 64\], expected \[64, 16\]"),
    (lambda t: [t.pop(k) for k in list(t)[:5]], "missing .*; missing .*; missing .* and 2 more; is --arch"),
])
def test_keys(tiny, tmp_path, change, says):
    with pytest.raises(InputError, match=f"broken.safetensors: weights do not fit the network: {says}"):
        load_network(rewrite(tiny.source, tmp_path / "broken.safetensors", change))


@pytest.mark.parametrize("arch, says", [
    (None, "a.pt: the file does not say which network it is for; add --arch {ffhq256"),
    ("nosuch", "--arch nosuch: neither one of ffhq256, .*imagenet256-classifier nor a JSON file"),
    ("[1]", r"must hold {\"config\""),
    ('{"config": {"image_size": 16}}',
     r"arch.json: add num_head_channels \(or num_heads\) to \"config\"; .*a.pt does not show it"),
    (json.dumps(dict(config=dict(TINY, colour="red"))),
     "does not describe a network .*unexpected keyword argument 'colour'"),
    (json.dumps(dict(config=TINY, network="GAN")),
     r"is not the network of .*: it has network UNet \(expected GAN\)"),
    (json.dumps(dict(config=TINY, schedule=dict(name="sine"))), "unknown noise schedule 'sine'"),
    (json.dumps(dict(config=dict(TINY, norm_groups=7))), "does not describe a network .*divisible"),
    (json.dumps(dict(config=dict(TINY, image_size=15))), "does not describe a network .*image_size 15 must be divisible by 2"),
    (json.dumps(dict(config=dict(TINY, attention_resolutions=2))), "attention_resolutions must be a list"),
    (json.dumps(dict(config=dict(TINY, attention_resolutions=[2, "4"]))), "attention_resolutions must be a list"),
    (json.dumps(dict(config=TINY, schedule="linear")), '"schedule" must hold'),
    (json.dumps(dict(config=TINY, scale_factor="x")), '"scale_factor" must be a number'),
    ("{", "nor a JSON file"),
])
def test_architectures(tmp_path, arch, says):
    torch.save(tiny_network().model.state_dict(), tmp_path / "a.pt")
    if arch and not arch.isalpha():
        (tmp_path / "arch.json").write_text(arch)
        arch = str(tmp_path / "arch.json")
    with pytest.raises(InputError, match=says):
        load_network(tmp_path / "a.pt", arch)


def test_arch_is_for_published_files(tiny):
    with pytest.raises(InputError, match="--arch ffhq256: for published files; .*source.safetensors says"):
        load_network(tiny.source, "ffhq256")


def test_more_steps_than_the_schedule_has():
    network = tiny_network()
    network.check_steps(1000)
    with pytest.raises(InputError, match="--sample-steps 1001: this model has 1000"):
        network.check_steps(1001, "--sample-steps")


def test_a_classifier_is_not_a_source_nor_a_source_a_classifier(tiny, tmp_path):
    source = load_source(str(tiny.source))
    path = str(tmp_path / "c.safetensors")
    save_network(path, start_classifier("encoder", None, "", source))
    with pytest.raises(InputError, match="c.safetensors: a Classifier, not a diffusion model"):
        load_source(path)
    with pytest.raises(InputError, match="source.safetensors: a UNet, not a classifier"):
        start_classifier(str(tiny.source), None, "", source)
    with pytest.raises(InputError, match="made for 3x16x16, the source's x_0 is 3x32x32"):
        start_classifier(path, None, "", tiny_network(image_size=32))


def test_start_classifier_from_a_file_keeps_all_but_the_head(tiny, tmp_path):
    source = load_source(str(tiny.source))
    model = from_unet(source.model)
    config = dict(model.config, out_channels=10)
    many = build(dict(network="Classifier", config=config, schedule=dict(LINEAR, timesteps=500)), "test")
    save_network(tmp_path / "c.safetensors", many)
    network = start_classifier(str(tmp_path / "c.safetensors"), None, "", source)
    assert network.model(X, T).shape == (2, 2) and network.description["config"]["out_channels"] == 2
    assert network.schedule.timesteps == network.description["schedule"]["timesteps"] == 1000  # the source's
    assert network.model.encode(X, T)[0].equal(many.model.encode(X, T)[0])


# ---- nothing in a file is run ------------------------------------------------------------------------------

class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hide", [lambda bad: bad, lambda bad: {"a": torch.ones(1), "b": bad}])
def test_a_file_that_would_run_code(tmp_path, zipped, hide):
    victim, path = tmp_path / "created", tmp_path / "evil.pt"
    torch.save(hide(Malicious(str(victim))), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="evil.pt: not a file of weights that can be read safely"):
        read_tensors(path)
    assert not victim.exists()
    assert b"mkdir" in path.read_bytes()  # the danger is real: the file names the call, which does harm
    function, arguments = Malicious(str(victim)).__reduce__()
    function(*arguments)
    assert victim.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {"step": 3}, {}, [], 5, {1: torch.ones(1)}])
def test_not_a_flat_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt: holds something else than a flat dict of tensors"):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_damaged_files(tiny, tmp_path, kind):
    tensors = {"w": torch.randn(50), "b": torch.zeros(3)}
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for content in [whole[:n] for n in range(0, len(whole), len(whole) // 40)]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path.name}: not a file of weights that can be read safely"):
            read_tensors(path)


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read_tensors(tmp_path / name)
    with pytest.raises(InputError, match="folder.pt: is a folder"):
        read_tensors(tmp_path / "folder.pt")


# ---- what can be a source --------------------------------------------------------------------------------

@pytest.mark.parametrize("takes, gives", [(4, 4), (1, 1), (3, 1), (3, 12)])
def test_a_source_is_of_rgb_pictures(takes, gives, tmp_path):
    save_network(tmp_path / "a.safetensors", tiny_network(in_channels=takes, out_channels=gives))
    with pytest.raises(InputError, match=f"a.safetensors: takes {takes} channels and gives {gives}; only models of RGB"):
        load_source(str(tmp_path / "a.safetensors"))


def test_a_classifier_from_scratch_is_untrained_and_has_the_noise_of_the_source():
    source = tiny_network()
    source.schedule = Schedule("cosine", 50)
    scratch, encoder = (start_classifier(name, None, "", source) for name in ("scratch", "encoder"))
    for network in (scratch, encoder):
        assert network.schedule.config == network.description["schedule"] == source.schedule.config
    first = [network.model.input_blocks[0][0].weight for network in (source, encoder, scratch)]
    assert first[0].equal(first[1]) and not first[0].equal(first[2])
