"""Lightning files of latent diffusion: the goldens' outputs, and nothing in a file is run."""

import importlib
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, tiny_network
from safetensors.torch import load_file, save_file
from test_published import T, arch, randn
from test_unet import GOLDEN, golden_case, state

from checkpoints.__main__ import main
from checkpoints.load import load_source
from checkpoints.weights_file import read_tensors
from plumbing.options import InputError, run

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"
SCHEDULE = ("alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
            "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod "
            "posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar "
            "first_stage_model.loss.discriminator.weight").split()


def lightning(path, unet, first_stage, betas, half=False, callback=None, **buffers):
    """A .ckpt as Lightning writes it: the EMA copies of the U-Net are right, its raw weights are not."""
    tensors = {f"first_stage_model.{key}": value for key, value in first_stage.items()}
    for key, value in unet.items():
        tensors[f"model.diffusion_model.{key}"] = value + 1
        tensors["model_ema." + f"diffusion_model.{key}".replace(".", "")] = value
    tensors.update(dict.fromkeys(SCHEDULE, betas), betas=betas.float())
    tensors.update({"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}, **buffers)
    if half:
        tensors = {key: value.half() if value.dim() > 1 else value for key, value in tensors.items()}
    module = types.ModuleType(CALLBACK)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": CALLBACK})
    best = {"best_model_score": torch.tensor(1.0), "best_model_path": "x", "evil": callback}
    content = {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": tensors,
               "optimizer_states": [], "callbacks": {module.ModelCheckpoint: best}}
    with pytest.MonkeyPatch.context() as patch:  # Lightning is there only while it saves
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, CALLBACK, module)
        torch.save(content, path)
    return str(path)


def betas(start=0.0015, end=0.0195, n=1000):
    return torch.linspace(start ** 0.5, end ** 0.5, n, dtype=torch.float64) ** 2


@pytest.fixture
def vq(tmp_path):
    """A Lightning file of FFHQ's kind, its --arch, and the goldens in it."""
    unet, *case = golden_case("adm_unet_conv_resample")
    first = json.loads((GOLDEN / "ldm_vq_autoencoder_vis.json").read_text())
    config = {key: first["config"][key] for key in ("ddconfig", "embed_dim", "n_embed")}
    path = lightning(tmp_path / "model.ckpt", state(unet), state(first), betas())
    description = dict(config=dict(image_size=8, num_head_channels=32),
                       first_stage=dict(network="VQ", config=config))
    return path, description, unet, case, first


def images(golden):
    noise = np.random.RandomState(12345).standard_normal(golden["input_shape"])
    return torch.from_numpy(noise.astype(np.float32))


def check_first_stage(network, golden, scale):
    """The latent that the reference gives, times the scale factor, and its picture; returns the latent."""
    latent = network.encode(images(golden))
    expected = torch.tensor(golden["latent"]).view(golden["latent_shape"])
    assert (latent - scale * expected).abs().max() < 1e-4
    decoded = network.first_stage.decode(latent / network.scale_factor)
    assert (decoded - torch.tensor(golden["output"]).view(golden["output_shape"])).abs().max() < 1e-4
    return latent


@torch.no_grad()
def test_latent_vq(vq, tmp_path):
    path, description, unet, (x, t, expected), first = vq
    network = load_source(path, arch(tmp_path, **description))
    assert (network.model(x, t) - expected).abs().max() < 1e-4  # of the EMA
    check_first_stage(network, first, scale=1)
    assert network.scale_factor == 1 and network.shape == (3, 8, 8) and network.image_size == 16
    schedule = dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0195)
    assert network.schedule.config == schedule
    predicts_x0 = load_source(path, arch(tmp_path, **description, schedule=dict(name="scaled-linear", prediction="x0")))
    assert predicts_x0.schedule.config == dict(schedule, prediction="x0")  # which betas do not show
    assert "latent-diffusion" in network.description["layout"] and "EMA" in network.description["layout"]
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_latent_kl_and_conversion(tmp_path, capsys, half):
    golden = json.loads((GOLDEN / "ldm_kl_autoencoder_vis.json").read_text())
    unet = tiny_network(image_size=8, in_channels=4, out_channels=4, num_head_channels=None, num_heads=2,
                        resblock_updown=True).model
    path = lightning(tmp_path / "model.ckpt", unet.state_dict(), state(golden), betas(end=0.0155), half,
                     scale_factor=torch.tensor(0.25))
    flag = arch(tmp_path, config=dict(image_size=8, num_heads=2, norm_groups=8),
                first_stage=dict(network="KL", config=golden["config"]))
    network = load_source(path, flag)
    if half:
        torch.testing.assert_close(network.model.out[2].weight, unet.out[2].weight, atol=1e-2, rtol=1e-3)
        return
    assert network.model(randn(2, 4, 8, 8), T).equal(unet(randn(2, 4, 8, 8), T))
    latent = check_first_stage(network, golden, scale=0.25)

    call(main, path, "--arch", flag, "--convert", tmp_path / "new" / "ldm.safetensors")
    printed = capsys.readouterr().out
    for text in ("latent-diffusion", "averaged weights (EMA)", "scaled-linear, 1000 steps, beta 0.0015 to 0.0155",
                 "16x16, as latents 4x8x8, scaled by 0.25", "KL, ", "yes, all", "written to"):
        assert text in printed
    call(main, tmp_path / "new" / "ldm.safetensors")
    printed = capsys.readouterr().out
    assert "this project's own, converted from model.ckpt (latent-diffusion, arch.json" in printed
    again = load_source(str(tmp_path / "new" / "ldm.safetensors"))
    assert again.decode(latent).equal(network.decode(latent)) and again.scale_factor == 0.25
    assert again.model(randn(2, 4, 8, 8), T).equal(unet(randn(2, 4, 8, 8), T))
    assert again.description["converted_from"].startswith("model.ckpt (latent-diffusion")
    with pytest.raises(SystemExit):
        run(lambda: call(main, path, "--arch", flag, "--convert", tmp_path / "new" / "ldm.safetensors"))
    assert "is there already" in capsys.readouterr().err

    tensors = load_file(tmp_path / "new" / "ldm.safetensors")
    half = {key: value for key, value in tensors.items() if not key.startswith("first_stage.")}
    save_file(half, tmp_path / "half.safetensors", {"description": json.dumps(again.description)})
    with pytest.raises(InputError, match="half.safetensors: the first stage is missing"):
        load_source(str(tmp_path / "half.safetensors"))


def rewrite(path, change):
    """Change the state_dict of a Lightning file."""
    tensors, _ = read_tensors(path)
    change(tensors)
    torch.save({"state_dict": tensors}, path)


def without(start):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(start)]


@pytest.mark.parametrize("change, says", [
    (without("first_stage_model."), "the first stage is missing"),
    (without("first_stage_model.quantize"),
     "weights do not fit the network: missing first_stage_model.quantize.embedding.weight"),
    (lambda t: t.pop("model_ema.diffusion_modelout2bias"),
     "weights do not fit the network: missing model_ema.diffusion_modelout2bias;"),
    (lambda t: t.pop("model.diffusion_model.middle_block.1.norm.bias"),
     ".*: missing model.diffusion_model.middle_block.1.norm.bias;"),
    (lambda t: t.update({"cond_stage_model.w": torch.ones(1)}),
     "a model that is conditioned on text or classes; only unconditional ones"),
    (lambda t: t.update(betas=t["betas"] * 1.5),
     "was trained with the schedule .*0.00225.*, expected was .*0.0015"),
    (lambda t: t.update(betas=t["betas"] ** 2),
     "its 1000 betas, 2.25e-06 to 0.00038025, are neither scaled-linear nor linear"),
])
def test_latent_files_that_do_not_fit(vq, tmp_path, change, says):
    path, description, *_ = vq
    rewrite(path, change)
    schedule = dict(name="scaled-linear", beta_start=0.0015, beta_end=0.0195)
    with pytest.raises(InputError, match=f"model.ckpt: {says}"):
        load_source(path, arch(tmp_path, **description, schedule=schedule))


def test_latent_architectures_that_do_not_fit(vq, tmp_path):
    path, description, *_ = vq
    kl = json.loads((GOLDEN / "ldm_kl_autoencoder_vis.json").read_text())["config"]
    with pytest.raises(InputError, match="the first stage gives latents of 4 channels, the U-Net takes 3"):
        load_source(path, arch(tmp_path, **dict(description, first_stage=dict(network="KL", config=kl))))
    with pytest.raises(InputError, match="arch.json: add \"first_stage\""):
        load_source(path, arch(tmp_path, config=description["config"]))
    says = r"is not the network of --arch ldm-ffhq256: it has model_channels 32 \(expected 224\)"
    with pytest.raises(InputError, match=says):
        load_source(path, "ldm-ffhq256")
    says = "holds latent-diffusion names, --arch ffhq256 has those of guided-diffusion"
    with pytest.raises(InputError, match=says):
        load_source(path, "ffhq256")
    says = "the file does not say which network .*found: latent-diffusion names, in_channels 3"
    with pytest.raises(InputError, match=says):
        load_source(path)
    with pytest.raises(ValueError, match="input of 4 channels: this network takes 3"):
        load_source(path, arch(tmp_path, **description)).model(randn(1, 4, 8, 8), T[:1])
    rewrite(path, lambda t: t.pop("betas"))
    with pytest.raises(InputError, match="arch.json: add \"schedule\"; .*model.ckpt does not show it"):
        load_source(path, arch(tmp_path, **description))
    rewrite(path, lambda t: t.pop("model.diffusion_model.time_embed.0.weight"))
    says = r"add in_channels, .* does not show it \(missing model.diffusion_model.time_embed.0.weight\)"
    with pytest.raises(InputError, match=says):
        load_source(path, arch(tmp_path, **description))


# ---- files that would run code -----------------------------------------------------------------------------

class Malicious:
    def __init__(self, function, *arguments):
        self.run = function, arguments

    def __reduce__(self):
        return self.run


@pytest.mark.parametrize("function", [os.system, exec])
def test_a_callback_that_would_run_code(tmp_path, function):
    victim = tmp_path / "created"
    command = f"touch {victim}" if function is os.system else f"open({str(victim)!r}, 'w')"
    path = lightning(tmp_path / "evil.ckpt", {}, {}, betas(), callback=Malicious(function, command))
    name = "posix.system" if function is os.system else "exec"
    says = f"evil.ckpt: not a file of weights .* safely: it asks for (builtins.)?{name}, which is code"
    with pytest.raises(InputError, match=says):
        load_source(path, "ldm-ffhq256")
    assert not victim.exists()


def test_the_callback_class_is_never_imported(vq, tmp_path, monkeypatch):
    package = tmp_path / "pytorch_lightning" / "callbacks"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model_checkpoint.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    load_source(vq[0], arch(tmp_path, **vq[1]))
    assert CALLBACK.encode() in Path(vq[0]).read_bytes()  # the danger is real: the file names the module
    with pytest.raises(SystemExit, match="imported"):
        importlib.import_module("pytorch_lightning.callbacks.model_checkpoint")
