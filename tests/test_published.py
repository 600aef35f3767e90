"""Published files: each known layout, at small size with random weights, gives what an independent implementation gives."""

import importlib
import json
import os
import re
import sys
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import call, tiny_network
from safetensors.torch import load_file, save_file
from test_unet import GOLDEN, golden_case, state

from checkpoints import layouts
from checkpoints.__main__ import main
from checkpoints.load import CALLBACKS, load_network, load_source
from checkpoints.network import build
from checkpoints.published import ARCHITECTURES, LINEAR, describe
from plumbing.options import InputError, run

T = torch.tensor([17, 803])
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arch(folder, **description):
    """A file for --arch."""
    (folder / "arch.json").write_text(json.dumps(description))
    return str(folder / "arch.json")


# ---- guided-diffusion, and Ho et al.'s port --------------------------------------------------------------------------

@pytest.mark.parametrize("name, config", [
    ("adm_unet_conv_resample", dict(num_head_channels=32)), ("adm_unet_updown_scaleshift", dict(num_head_channels=16)),
    ("adm_classifier_attention_pool", dict(num_head_channels=16)), ("ho_ddpm_unet", {})])
@torch.no_grad()
def test_golden_file_with_no_more_than_what_it_does_not_show(tmp_path, name, config):
    golden, x, t, expected = golden_case(name)
    torch.save(state(golden), tmp_path / "a.ckpt")
    network = load_network(tmp_path / "a.ckpt", arch(tmp_path, config=dict(config, image_size=16)))
    assert (network.model(x, t) - expected).abs().max() < 1e-4


# ---- diffusers -------------------------------------------------------------------------------------------------------

HO = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None)
DIFFUSERS = dict(sample_size=16, block_out_channels=[32, 64, 96], layers_per_block=2, norm_num_groups=16,
                 down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])


def diffusers_model(**config):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**dict(DIFFUSERS, **config)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    return model


def same_output(ours, theirs, side=16):
    x = randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, T), theirs(x, T).sample, atol=1e-5, rtol=1e-4)


def old_names(path):
    """Rewrite a folder's weights with the attention names of 2022."""
    tensors = load_file(path)
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({re.sub("to_(q|k|v|out.0)", lambda m: new[m[0]], key): value for key, value in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("config", [HO, {}, dict(HO, norm_eps=1e-2), dict(flip_sin_to_cos=False, attention_head_dim=16)])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old names"])
def test_diffusers_folder(tmp_path, config, kind):
    theirs = diffusers_model(**config)
    theirs.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, num_train_timesteps=500).save_pretrained(tmp_path)
    if kind == "old names":
        old_names(tmp_path / "diffusion_pytorch_model.safetensors")
    network = load_source(str(tmp_path))
    same_output(network.model, theirs)
    assert network.schedule.config == dict(name="scaled-linear", timesteps=500, beta_start=0.001, beta_end=0.02)
    assert network.description["layout"] == ("diffusers, old attention names" if kind == "old names" else "diffusers")


def test_diffusers_pipeline_folder(tmp_path):
    theirs = diffusers_model(**HO)
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    same_output(load_source(str(tmp_path)).model, theirs)
    same_output(load_source(str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")).model, theirs)


@pytest.mark.parametrize("key, value", [("time_embedding_type", "fourier"), ("resnet_time_scale_shift", "scale_shift"), ("num_class_embeds", 10),
                                        ("act_fn", "gelu"), ("mid_block_scale_factor", 2), ("block_out_channels", [32, 48, 96]),
                                        ("down_block_types", ["SkipDownBlock2D"] * 3), ("up_block_types", ["UpBlock2D"] * 3),
                                        ("sample_size", [16, 24])])
def test_diffusers_options_that_are_not_here(tmp_path, key, value):
    diffusers_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(config, **{key: value})))
    with pytest.raises(InputError, match=f"config.json: .*{key}.* can be read"):
        load_source(str(tmp_path))


def test_diffusers_folders_that_lack_something(tmp_path):
    theirs = diffusers_model()
    with pytest.raises(InputError, match="nor one of diffusers"):
        load_source(str(tmp_path))
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="no scheduler_config.json .* add --arch ddpm256"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path), "ddpm256").schedule.config == LINEAR
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match="scheduler_config.json: prediction_type is 'v_prediction'; only 'epsilon' can be read"):
        load_source(str(tmp_path))
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(InputError, match=r"a latent pipeline of diffusers \(vqvae/\)"):
        load_source(str(tmp_path))
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match="unet/config.json: .* cannot be read"):
        load_source(str(tmp_path))


def test_ho_port_with_the_weights_of_a_diffusers_model(tmp_path):
    theirs = diffusers_model(**HO, attn_norm_num_groups=None)
    rules = [(r"time_embedding\.linear_1", "temb.dense.0"), (r"time_embedding\.linear_2", "temb.dense.1"), (r"conv_norm_out", "norm_out"),
             (r"down_blocks\.", "down."), (r"up_blocks\.(\d)", lambda m: f"up.{2 - int(m[1])}"), (r"mid_block\.resnets\.0", "mid.block_1"),
             (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"), (r"\.resnets\.", ".block."),
             (r"\.attentions\.", ".attn."), (r"samplers\.0", "sample"), (r"time_emb_proj", "temb_proj"), (r"conv_shortcut", "nin_shortcut"),
             (r"group_norm", "norm"), (r"to_([qkv])", r"\1"), (r"to_out\.0", "proj_out")]
    tensors = {}
    for key, value in theirs.state_dict().items():
        value = value[..., None, None] if re.search(r"to_.*weight", key) else value
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        tensors[key] = value
    torch.save(tensors, tmp_path / "ema_lsun.ckpt", _use_new_zipfile_serialization=False)
    config = dict(image_size=16, norm_groups=16)
    same_output(load_source(str(tmp_path / "ema_lsun.ckpt"), arch(tmp_path, config=config)).model, theirs)
    with pytest.raises(InputError, match=r"ema_lsun.ckpt: is not the network of --arch .*num_res_blocks 2 \(expected 3\)"):
        load_source(str(tmp_path / "ema_lsun.ckpt"), arch(tmp_path, config=dict(config, num_res_blocks=3)))
    tensors["down.1.attn.0.q.bias"] = tensors.pop("down.1.attn.0.k.bias")[:5]
    torch.save(tensors, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match=r"missing down.1.attn.0.k.bias; down.1.attn.0.q.bias is \[5\], expected \[64\]"):
        load_source(str(tmp_path / "b.ckpt"), arch(tmp_path, config=config))


# ---- latent diffusion ------------------------------------------------------------------------------------------------

SCHEDULE = ("alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod "
            "sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped posterior_mean_coef1 "
            "posterior_mean_coef2 logvar first_stage_model.loss.discriminator.weight").split()


def lightning(path, unet, first_stage, betas, half=False, callback=None, **buffers):
    """A .ckpt as Lightning writes it, with the weights of both goldens: the EMA copies are right, the raw weights are not."""
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
    content = {"epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": tensors, "optimizer_states": [],
               "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(1.0), "best_model_path": "x", "evil": callback}}}
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
    return path, dict(config=dict(image_size=8, num_head_channels=32), first_stage=dict(network="VQ", config=config)), unet, case, first


def images(golden):
    return torch.from_numpy(np.random.RandomState(12345).standard_normal(golden["input_shape"]).astype(np.float32))


@torch.no_grad()
def test_latent_vq(vq, tmp_path):
    path, description, unet, (x, t, expected), first = vq
    network = load_source(path, arch(tmp_path, **description))
    assert (network.model(x, t) - expected).abs().max() < 1e-4  # of the EMA
    latent = network.encode(images(first))
    assert (latent - torch.tensor(first["latent"]).view(first["latent_shape"])).abs().max() < 1e-4
    assert (network.first_stage.decode(latent / network.scale_factor) - torch.tensor(first["output"]).view(first["output_shape"])).abs().max() < 1e-4
    assert network.scale_factor == 1 and network.shape == (3, 8, 8) and network.image_size == 16
    assert network.schedule.config == dict(name="scaled-linear", timesteps=1000, beta_start=0.0015, beta_end=0.0195)
    assert "latent-diffusion" in network.description["layout"] and "EMA" in network.description["layout"]
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_latent_kl_and_conversion(tmp_path, capsys, half):
    golden = json.loads((GOLDEN / "ldm_kl_autoencoder_vis.json").read_text())
    unet = tiny_network(image_size=8, in_channels=4, out_channels=4, num_head_channels=None, num_heads=2, resblock_updown=True).model
    path = lightning(tmp_path / "model.ckpt", unet.state_dict(), state(golden), betas(end=0.0155), half, scale_factor=torch.tensor(0.25))
    flag = arch(tmp_path, config=dict(image_size=8, num_heads=2, norm_groups=8), first_stage=dict(network="KL", config=golden["config"]))
    network = load_source(path, flag)
    if half:
        torch.testing.assert_close(network.model.out[2].weight, unet.out[2].weight, atol=1e-2, rtol=1e-3)
        return
    assert network.model(randn(2, 4, 8, 8), T).equal(unet(randn(2, 4, 8, 8), T))
    latent = network.encode(images(golden))
    assert (latent - 0.25 * torch.tensor(golden["latent"]).view(golden["latent_shape"])).abs().max() < 1e-4
    assert (network.first_stage.decode(latent / network.scale_factor) - torch.tensor(golden["output"]).view(golden["output_shape"])).abs().max() < 1e-4

    call(main, path, "--arch", flag, "--convert", tmp_path / "new" / "ldm.safetensors")
    printed = capsys.readouterr().out
    for text in ("latent-diffusion", "averaged weights (EMA)", "scaled-linear, 1000 steps, beta 0.0015 to 0.0155",
                 "16x16, as latents 4x8x8, scaled by 0.25", "KL, ", "yes, all", "written to"):
        assert text in printed
    call(main, tmp_path / "new" / "ldm.safetensors")
    assert "this project's own, converted from model.ckpt (latent-diffusion, arch.json" in capsys.readouterr().out
    again = load_source(str(tmp_path / "new" / "ldm.safetensors"))
    assert again.decode(latent).equal(network.decode(latent)) and again.scale_factor == 0.25
    assert again.model(randn(2, 4, 8, 8), T).equal(unet(randn(2, 4, 8, 8), T))
    assert again.description["converted_from"].startswith("model.ckpt (latent-diffusion")
    with pytest.raises(SystemExit):
        run(lambda: call(main, path, "--arch", flag, "--convert", tmp_path / "new" / "ldm.safetensors"))
    assert "is there already" in capsys.readouterr().err

    tensors = load_file(tmp_path / "new" / "ldm.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("first_stage.")}, tmp_path / "half.safetensors",
              {"description": json.dumps(again.description)})
    with pytest.raises(InputError, match="half.safetensors: the first stage is missing"):
        load_source(str(tmp_path / "half.safetensors"))


def rewrite(path, change):
    """Change the state_dict of a Lightning file."""
    with torch.serialization.safe_globals(CALLBACKS):
        tensors = torch.load(path, weights_only=True)["state_dict"]
    change(tensors)
    torch.save({"state_dict": tensors}, path)


def without(start):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(start)]


@pytest.mark.parametrize("change, says", [
    (without("first_stage_model."), "the first stage is missing"),
    (without("first_stage_model.quantize"), "weights do not fit the network: missing first_stage_model.quantize.embedding.weight"),
    (lambda t: t.pop("model_ema.diffusion_modelout2bias"), "weights do not fit the network: missing model_ema.diffusion_modelout2bias;"),
    (lambda t: t.pop("model.diffusion_model.middle_block.1.norm.bias"), ".*: missing model.diffusion_model.middle_block.1.norm.bias;"),
    (lambda t: t.update({"cond_stage_model.w": torch.ones(1)}), "weights do not fit the network: unexpected cond_stage_model.w;"),
    (lambda t: t.update(betas=t["betas"] * 1.5), "was trained with the schedule .*0.00225.*, expected was .*0.0015"),
    (lambda t: t.update(betas=t["betas"] ** 2), "its 1000 betas, 2.25e-06 to 0.00038025, are neither scaled-linear nor linear"),
])
def test_latent_files_that_do_not_fit(vq, tmp_path, change, says):
    path, description, *_ = vq
    rewrite(path, change)
    with pytest.raises(InputError, match=f"model.ckpt: {says}"):
        load_source(path, arch(tmp_path, **description, schedule=dict(name="scaled-linear", beta_start=0.0015, beta_end=0.0195)))


def test_latent_architectures_that_do_not_fit(vq, tmp_path):
    path, description, *_ = vq
    kl = json.loads((GOLDEN / "ldm_kl_autoencoder_vis.json").read_text())["config"]
    with pytest.raises(InputError, match="the first stage gives latents of 4 channels, the U-Net takes 3"):
        load_source(path, arch(tmp_path, **dict(description, first_stage=dict(network="KL", config=kl))))
    with pytest.raises(InputError, match="arch.json: add \"first_stage\""):
        load_source(path, arch(tmp_path, config=description["config"]))
    with pytest.raises(InputError, match=r"is not the network of --arch ldm-ffhq256: it has model_channels 32 \(expected 224\)"):
        load_source(path, "ldm-ffhq256")
    with pytest.raises(InputError, match="holds latent-diffusion names, --arch ffhq256 has those of guided-diffusion"):
        load_source(path, "ffhq256")
    with pytest.raises(InputError, match=r"the file does not say which network .*found: latent-diffusion names, in_channels 3"):
        load_source(path)
    with pytest.raises(ValueError, match="input of 4 channels: this network takes 3"):
        load_source(path, arch(tmp_path, **description)).model(randn(1, 4, 8, 8), T[:1])
    rewrite(path, lambda t: t.pop("betas"))
    with pytest.raises(InputError, match="arch.json: add \"schedule\"; .*model.ckpt does not show it"):
        load_source(path, arch(tmp_path, **description))
    rewrite(path, lambda t: t.pop("model.diffusion_model.time_embed.0.weight"))
    with pytest.raises(InputError, match=r"add in_channels, .* does not show it \(missing model.diffusion_model.time_embed.0.weight\)"):
        load_source(path, arch(tmp_path, **description))


# ---- files that would run code ---------------------------------------------------------------------------------------

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
    with pytest.raises(InputError, match=f"evil.ckpt: not a file of weights .* safely .it asks for (builtins.)?{name}, which is code"):
        load_source(path, "ldm-ffhq256")
    assert not victim.exists()


def test_the_callback_class_is_never_imported(vq, tmp_path, monkeypatch):
    package = tmp_path / "pytorch_lightning" / "callbacks"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model_checkpoint.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    load_source(vq[0], arch(tmp_path, **vq[1]))
    assert b"pytorch_lightning.callbacks.model_checkpoint" in Path(vq[0]).read_bytes()  # the danger is real: the file names the module
    with pytest.raises(SystemExit, match="imported"):
        importlib.import_module("pytorch_lightning.callbacks.model_checkpoint")


def test_truncated_lightning_file(vq):
    whole = open(vq[0], "rb").read()
    for n in range(0, len(whole), len(whole) // 10):
        open(vq[0], "wb").write(whole[:n])
        with pytest.raises(InputError, match="model.ckpt: not a file of weights that can be read safely"):
            load_source(vq[0])


def test_unknown_layout(tmp_path):
    torch.save({"generator.w": torch.ones(1)}, tmp_path / "gan.pt")
    with pytest.raises(InputError, match="gan.pt: no layout that is known here; it holds generator.w..., expected are the names of guided"):
        load_source(str(tmp_path / "gan.pt"))


# ---- the published sizes ---------------------------------------------------------------------------------------------

def published_file(name):
    """The names and shapes of a published file, without its weights."""
    with torch.device("meta"):
        own = build(ARCHITECTURES[name], name).state_dict()
    _, shapes = layouts.sources(own, ARCHITECTURES[name]["layout"], ARCHITECTURES[name]["config"], [])
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name, millions", [("ffhq256", 93.56), ("adm256", 552.81), ("ddpm256", 113.67), ("ldm-ffhq256", 274.06),
                                            ("ldm-church256", 294.97), ("imagenet256-classifier", 54.10)])
def test_published_sizes_and_their_recognition(name, millions, tmp_path):
    tensors = published_file(name)
    description, layout = describe(tensors, tmp_path / "a.pt", None)
    assert description["config"] == ARCHITECTURES[name]["config"] and layout == ARCHITECTURES[name]["layout"]
    assert name + ", recognised by its shapes" in description["layout"]
    count = sum(value.numel() for key, value in tensors.items() if not key.startswith("first_stage_model."))
    assert count / 1e6 == pytest.approx(millions, abs=0.006)
    other = "adm256" if name == "ffhq256" else "ffhq256"
    with pytest.raises(InputError, match="is not the network of --arch|names, --arch"):
        describe(tensors, tmp_path / "a.pt", other)


def test_every_known_network_is_in_the_test_above():
    assert len(ARCHITECTURES) == 6


@pytest.mark.parametrize("name, config", [
    ("ddpm256", dict(HO, sample_size=256, block_out_channels=[128, 128, 256, 256, 512, 512],  # google/ddpm-ema-church-256
                     down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
                     up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4)),
    ("ldm-ffhq256", dict(sample_size=64, block_out_channels=[224, 448, 672, 896], attention_head_dim=32,
                         down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * 3, up_block_types=["AttnUpBlock2D"] * 3 + ["UpBlock2D"]))])
def test_full_size_keys_are_those_of_diffusers(name, config):
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(layers_per_block=2, **config)
        own = build(ARCHITECTURES[name], name).model.state_dict()
    _, shapes = layouts.sources(own, "diffusers", ARCHITECTURES[name]["config"], [])
    assert shapes == {key: list(value.shape) for key, value in theirs.state_dict().items()}


def test_the_list_of_known_networks(capsys):
    call(main)
    printed = capsys.readouterr().out
    assert all(name in printed and known["listed"] in printed for name, known in ARCHITECTURES.items())
