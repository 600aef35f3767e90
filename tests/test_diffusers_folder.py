"""Folders of diffusers, and files with the weights of its models: the same output as diffusers gives."""

import json
import re

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_published import T, arch, randn

from checkpoints.diffusers_folder import unet_config, unet_weights
from checkpoints.layouts import sources
from checkpoints.load import load_source
from checkpoints.network import build
from checkpoints.published import ARCHITECTURES, LINEAR
from plumbing.options import InputError
from unet import UNet

HO = dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, downsample_padding=0, attention_head_dim=None)
DIFFUSERS = dict(sample_size=16, block_out_channels=[32, 64, 96], layers_per_block=2, norm_num_groups=16,
                 down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
                 up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])


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
    names = {key: re.sub("to_(q|k|v|out.0)", lambda m: new[m[0]], key) for key in tensors}
    save_file({names[key]: value for key, value in tensors.items()}, path, {"format": "pt"})


@pytest.mark.parametrize("config", [HO, {}, dict(HO, norm_eps=1e-2),
                                    dict(flip_sin_to_cos=False, attention_head_dim=16)])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old names"])
def test_diffusers_folder(tmp_path, config, kind):
    theirs = diffusers_model(**config)
    theirs.save_pretrained(tmp_path, safe_serialization=kind != "bin")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.001, num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    if kind == "old names":
        old_names(tmp_path / "diffusion_pytorch_model.safetensors")
    network = load_source(str(tmp_path))
    same_output(network.model, theirs)
    assert network.schedule.config == dict(name="scaled-linear", timesteps=500, beta_start=0.001, beta_end=0.02)
    layout = "diffusers, old attention names" if kind == "old names" else "diffusers"
    assert network.description["layout"] == layout


def test_diffusers_pipeline_folder(tmp_path):
    theirs = diffusers_model(**HO)
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    same_output(load_source(str(tmp_path)).model, theirs)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    same_output(load_source(str(file)).model, theirs)


@pytest.mark.parametrize("key, value", [
    ("time_embedding_type", "fourier"), ("resnet_time_scale_shift", "spatial"), ("num_class_embeds", 10),
    ("act_fn", "gelu"), ("mid_block_scale_factor", 2), ("block_out_channels", [32, 48, 96]),
    ("down_block_types", ["SkipDownBlock2D"] * 3), ("up_block_types", ["UpBlock2D"] * 3),
    ("sample_size", [16, 24]), ("downsample_type", "fir"), ("upsample_type", "resnet"), ("attn_norm_num_groups", 8)])
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
    says = "scheduler_config.json: prediction_type is 'v_prediction'; only 'epsilon' can be read"
    with pytest.raises(InputError, match=says):
        load_source(str(tmp_path))
    diffusers.DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(InputError, match="beta_schedule is 'sigmoid'; only 'linear' or 'scaled_linear' or "):
        load_source(str(tmp_path))
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(InputError, match=r"a latent pipeline of diffusers \(vqvae/\)"):
        load_source(str(tmp_path))
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match="unet/config.json: .* cannot be read"):
        load_source(str(tmp_path))


def test_ho_port_with_the_weights_of_a_diffusers_model(tmp_path):
    theirs = diffusers_model(**HO, attn_norm_num_groups=None)
    rules = [(r"time_embedding\.linear_1", "temb.dense.0"), (r"time_embedding\.linear_2", "temb.dense.1"),
             (r"conv_norm_out", "norm_out"), (r"down_blocks\.", "down."),
             (r"up_blocks\.(\d)", lambda m: f"up.{2 - int(m[1])}"), (r"mid_block\.resnets\.0", "mid.block_1"),
             (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
             (r"\.resnets\.", ".block."), (r"\.attentions\.", ".attn."), (r"samplers\.0", "sample"),
             (r"time_emb_proj", "temb_proj"), (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"),
             (r"to_([qkv])", r"\1"), (r"to_out\.0", "proj_out")]
    tensors = {}
    for key, value in theirs.state_dict().items():
        value = value[..., None, None] if re.search(r"to_.*weight", key) else value
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        tensors[key] = value
    torch.save(tensors, tmp_path / "ema_lsun.ckpt", _use_new_zipfile_serialization=False)
    config = dict(image_size=16, norm_groups=16)
    same_output(load_source(str(tmp_path / "ema_lsun.ckpt"), arch(tmp_path, config=config)).model, theirs)
    says = r"ema_lsun.ckpt: is not the network of --arch .*num_res_blocks 2 \(expected 3\)"
    with pytest.raises(InputError, match=says):
        load_source(str(tmp_path / "ema_lsun.ckpt"), arch(tmp_path, config=dict(config, num_res_blocks=3)))
    tensors["down.1.attn.0.q.bias"] = tensors.pop("down.1.attn.0.k.bias")[:5]
    torch.save(tensors, tmp_path / "b.ckpt")
    says = r"missing down.1.attn.0.k.bias; down.1.attn.0.q.bias is \[5\], expected \[64\]"
    with pytest.raises(InputError, match=says):
        load_source(str(tmp_path / "b.ckpt"), arch(tmp_path, config=config))


OURS = dict(image_size=16, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, norm_groups=8,
            attention_resolutions=[2], channel_mult=[1, 2, 2])
UPDOWN = dict(resblock_updown=True, use_scale_shift_norm=True, num_head_channels=32)


@pytest.mark.parametrize("more", [
    dict(flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-2, downsample_padding=0), UPDOWN, dict(UPDOWN, out_channels=6),
    dict(num_heads=2), dict(UPDOWN, num_res_blocks=2, attention_resolutions=[1, 2, 4], channel_mult=[1, 2, 3]),
    dict(use_scale_shift_norm=True, attention_resolutions=[1, 4])])
def test_our_unet_as_one_of_diffusers_and_back(tmp_path, more):
    torch.manual_seed(0)
    ours = UNet(**dict(OURS, **more)).eval()
    for p in ours.parameters():
        p.data += 0.05 * torch.randn(p.shape)
    theirs = diffusers.UNet2DModel.from_config(unet_config(ours)).eval()
    theirs.load_state_dict(unet_weights(ours))
    x = randn(2, 3, 16, 16)
    with torch.no_grad():
        eps = ours(x, T)[:, :3]
        torch.testing.assert_close(theirs(x, T).sample, eps, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load_source(str(tmp_path), "ddpm256").model(x, T), eps, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("more", [dict(channel_mult=[2, 2]), dict(num_heads=2, attention_resolutions=[1])])
def test_our_unets_that_diffusers_has_not(more):
    with pytest.raises(ValueError, match="channel_mult to begin with 1, and attention heads of one width"):
        unet_config(UNet(**dict(OURS, **more)))


@pytest.mark.parametrize("name", ["ffhq256", "adm256", "ddpm256", "ldm-ffhq256"])
def test_published_networks_can_be_exported_as_diffusers(name):
    with torch.device("meta"):
        ours = build(ARCHITECTURES[name], name).model
        theirs = diffusers.UNet2DModel.from_config(unet_config(ours)).state_dict()
        shapes = {key: value.shape for key, value in unet_weights(ours).items()}
    assert shapes == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name, config", [
    # google/ddpm-ema-church-256
    ("ddpm256", dict(HO, sample_size=256, block_out_channels=[128, 128, 256, 256, 512, 512],
                     down_block_types=["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
                     up_block_types=["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4)),
    ("ldm-ffhq256", dict(sample_size=64, block_out_channels=[224, 448, 672, 896], attention_head_dim=32,
                         down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
                         up_block_types=["AttnUpBlock2D"] * 3 + ["UpBlock2D"]))])
def test_full_size_keys_are_those_of_diffusers(name, config):
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(layers_per_block=2, **config)
        own = build(ARCHITECTURES[name], name).model.state_dict()
    _, shapes = sources(own, "diffusers", ARCHITECTURES[name]["config"], [])
    assert shapes == {key: list(value.shape) for key, value in theirs.state_dict().items()}
