"""Published files: each known layout, small and with random weights, gives what the reference gives."""

import json

import pytest
import torch
from conftest import call
from test_unet import golden_case, state

from checkpoints.__main__ import main
from checkpoints.layouts import layout_of, sources
from checkpoints.load import load_network, load_source
from checkpoints.network import build
from checkpoints.published import ARCHITECTURES, describe
from plumbing.options import InputError

T = torch.tensor([17, 803])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arch(folder, **description):
    """A file for --arch."""
    (folder / "arch.json").write_text(json.dumps(description))
    return str(folder / "arch.json")


# ---- guided-diffusion, and Ho et al.'s port ----------------------------------------------------------------

@pytest.mark.parametrize("name, config", [
    ("adm_unet_conv_resample", dict(num_head_channels=32)),
    ("adm_unet_updown_scaleshift", dict(num_head_channels=16)),
    ("adm_classifier_attention_pool", dict(num_head_channels=16)), ("ho_ddpm_unet", {})])
@torch.no_grad()
def test_golden_file_with_no_more_than_what_it_does_not_show(tmp_path, name, config):
    golden, x, t, expected = golden_case(name)
    torch.save(state(golden), tmp_path / "a.ckpt")
    network = load_network(tmp_path / "a.ckpt", arch(tmp_path, config=dict(config, image_size=16)))
    assert (network.model(x, t) - expected).abs().max() < 1e-4


def test_unknown_layout(tmp_path):
    torch.save({"generator.w": torch.ones(1)}, tmp_path / "gan.pt")
    says = "gan.pt: no layout that is known here; it holds generator.w..., expected are the names of guided"
    with pytest.raises(InputError, match=says):
        load_source(str(tmp_path / "gan.pt"))


# ---- the published sizes -----------------------------------------------------------------------------------

def published_file(name):
    """The names and shapes of a published file, without its weights."""
    with torch.device("meta"):
        own = build(ARCHITECTURES[name], name).state_dict()
    _, shapes = sources(own, ARCHITECTURES[name]["layout"], ARCHITECTURES[name]["config"], [])
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name, millions", [
    ("ffhq256", 93.56), ("adm256", 552.81), ("ddpm256", 113.67), ("ldm-ffhq256", 274.06),
    ("ldm-church256", 294.97), ("imagenet256-classifier", 54.10)])
def test_published_sizes_and_their_recognition(name, millions, tmp_path):
    tensors = published_file(name)
    layout = layout_of(tensors, tmp_path / "a.pt")
    description = describe(tensors, layout, tmp_path / "a.pt", None)
    assert description["config"] == ARCHITECTURES[name]["config"] and layout == ARCHITECTURES[name]["layout"]
    assert name + ", recognised by its shapes" in description["layout"]
    count = sum(value.numel() for key, value in tensors.items() if not key.startswith("first_stage_model."))
    assert count / 1e6 == pytest.approx(millions, abs=0.006)
    other = "adm256" if name == "ffhq256" else "ffhq256"
    with pytest.raises(InputError, match="is not the network of --arch|names, --arch"):
        describe(tensors, layout, tmp_path / "a.pt", other)


# What no shape shows, as the publishers' own configurations have it: guided-diffusion's flags for the 256x256 models,
# the YAML files of latent-diffusion, the port of Ho et al.'s network.
@pytest.mark.parametrize("name, heads, schedule", [
    ("ffhq256", dict(num_head_channels=64), ("linear", 1000, 1e-4, 0.02)),
    ("adm256", dict(num_head_channels=64), ("linear", 1000, 1e-4, 0.02)),
    ("imagenet256-classifier", dict(num_head_channels=64), ("linear", 1000, 1e-4, 0.02)),
    ("ddpm256", dict(num_heads=1), ("linear", 1000, 1e-4, 0.02)),
    ("ldm-ffhq256", dict(num_head_channels=32), ("scaled-linear", 1000, 0.0015, 0.0195)),
    ("ldm-church256", dict(num_heads=8), ("scaled-linear", 1000, 0.0015, 0.0155))])
def test_what_no_shape_shows(name, heads, schedule):
    known = ARCHITECTURES[name]
    assert heads.items() <= known["config"].items()
    assert len({"num_heads", "num_head_channels"} & known["config"].keys()) == 1
    assert known["schedule"] == dict(zip(("name", "timesteps", "beta_start", "beta_end"), schedule))


def test_every_known_network_is_in_the_test_above():
    assert len(ARCHITECTURES) == 6


def test_the_list_of_known_networks(capsys):
    call(main)
    printed = capsys.readouterr().out
    assert all(name in printed and known["listed"] in printed for name, known in ARCHITECTURES.items())
