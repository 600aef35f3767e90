"""Folders of diffusers, and files with the weights of its models: the same output as diffusers gives."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import call
from safetensors.torch import load_file, save_file
from test_published import T, arch, randn

from checkpoints import export
from checkpoints.diffusers_unet import schedule_config, schedule_options, unet_config, unet_weights
from checkpoints.layouts import sources
from checkpoints.load import load_source
from checkpoints.network import build
from checkpoints.published import ARCHITECTURES, LINEAR
from ddpm import SCHEDULES, Schedule, predict_eps
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


def same_output(ours, theirs, channels=3):
    x = randn(2, channels, 16, 16)
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_one_of_diffusers(name):
    """So that models with it can be exported; and it comes back as it was."""
    schedule = Schedule(name, 100, 1e-3, 0.03, "v")
    written = schedule_config(schedule)
    theirs = diffusers.DDPMScheduler(**written)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar, rtol=3e-4, atol=0)
    assert theirs.config.prediction_type == "v_prediction"
    assert schedule_options(written, Path("scheduler_config.json")) == schedule.config


def test_diffusers_pipeline_folder(tmp_path):
    theirs = diffusers_model(**HO)
    diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    same_output(load_source(str(tmp_path)).model, theirs)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    same_output(load_source(str(file)).model, theirs)


@pytest.mark.parametrize("key, value", [
    ("time_embedding_type", "fourier"), ("resnet_time_scale_shift", "spatial"),
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
    with pytest.raises(InputError, match="holds no network: .*no folder of diffusers"):
        load_source(str(tmp_path))
    theirs.save_pretrained(tmp_path / "unet")
    with pytest.raises(InputError, match="no scheduler_config.json .* add --arch ddpm256"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path), "ddpm256").schedule.config == LINEAR
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match="unet/config.json: .* cannot be read"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("config, says", [
    (dict(prediction_type="flow"), "prediction_type is 'flow'; only 'epsilon' or 'v_prediction' or 'sample' can be read"),
    (dict(beta_schedule="sigmoid"), "beta_schedule is 'sigmoid'; only 'linear' or 'scaled_linear' or "),
    (dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True"), (dict(trained_betas=[0.1]), "trained_betas"),
    (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatchEulerDiscreteScheduler, of a model that was not"),
    (dict(num_train_timesteps="many"), "does not describe a network"), (dict(beta_start=None), "does not describe")])
def test_schedules_that_are_not_here(tmp_path, config, says):
    diffusers.DDPMPipeline(diffusers_model(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(InputError, match=says):
        load_source(str(tmp_path))


@pytest.mark.parametrize("config, says", [
    (dict(num_class_embeds=10), "a class-conditional model"), (dict(class_embed_type="timestep"), "a class-conditional"),
    (dict(_class_name="UNet2DConditionModel"), "a text-to-image model"),
    (dict(_class_name="DiTTransformer2DModel"), "a DiTTransformer2DModel; of diffusers only UNet2DModel")])
def test_models_that_are_named_for_what_they_are(tmp_path, config, says):
    diffusers.DDPMPipeline(diffusers_model(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(InputError, match=f"config.json: {says}"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("config", [
    dict(resnet_time_scale_shift="scale_shift"), dict(add_attention=False), dict(sample_size=[16, 16]),
    dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=16),
    dict(downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", add_attention=False,
         down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"],
         up_block_types=["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"])])
def test_other_networks_of_diffusers_and_back(tmp_path, config):
    theirs = diffusers_model(**config)
    theirs.save_pretrained(tmp_path)
    ours = load_source(str(tmp_path), "ddpm256").model
    same_output(ours, theirs)
    again = diffusers.UNet2DModel.from_config(unet_config(ours)).eval()
    again.load_state_dict(unet_weights(ours))
    same_output(ours, again)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_what_predicts_v_or_x0(tmp_path, kind):
    """Also from its export, the same pictures as diffusers draws."""
    pipeline = diffusers.DDIMPipeline(diffusers_model(), diffusers.DDIMScheduler(
        prediction_type=kind, clip_sample=False, timestep_spacing="trailing", num_train_timesteps=20))
    pipeline.save_pretrained(tmp_path / "theirs")
    network, x = load_source(str(tmp_path / "theirs")), randn(2, 3, 16, 16)
    for i in range(20):  # eps of both, at all noise levels
        out = pipeline.unet(x, i).sample
        step = pipeline.scheduler
        step.set_timesteps(20)
        expected = step.step(out, i, x)
        t = torch.full((2,), i)
        eps = predict_eps(network.model, x, t, network.schedule)
        mine = network.schedule.reverse_step(x, t, t - 1, eps)
        # diffusers takes alpha_bar_0 in place of 1 in the last step, unless set_alpha_to_one
        torch.testing.assert_close(mine, expected.prev_sample, atol=2e-4, rtol=1e-4)
    call(export.main, str(tmp_path / "theirs"), tmp_path / "again")
    assert json.loads((tmp_path / "again/scheduler/scheduler_config.json").read_text())["prediction_type"] == kind
    assert load_source(str(tmp_path / "again")).schedule.config == network.schedule.config


VAES = {
    "vqvae": lambda: diffusers.VQModel(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
                                       up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], norm_num_groups=8,
                                       block_out_channels=[16, 32], num_vq_embeddings=32, sample_size=32, scaling_factor=0.5),
    "vae": lambda: diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                                           block_out_channels=[16, 32], norm_num_groups=8, latent_channels=4, sample_size=32)}


@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("how", ["plain", "old names", "named"])
def test_latent_pipelines(tmp_path, kind, how):
    torch.manual_seed(1)
    stage = VAES[kind]().eval()
    channels = stage.config.latent_channels
    unet = diffusers_model(in_channels=channels, out_channels=channels)
    unet.save_pretrained(tmp_path / "unet")
    stage.save_pretrained(tmp_path / kind)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    if how == "old names":
        old_names(tmp_path / kind / "diffusion_pytorch_model.safetensors")
    name = tmp_path / "unet" / "diffusion_pytorch_model.safetensors" if how == "named" else tmp_path
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LDMPipeline", kind: ["diffusers", "AModel"], "safety_checker": [None, None]}))
    (tmp_path / kind).rename(tmp_path / "away")
    with pytest.raises(InputError, match=f"model_index.json names a first stage, but {kind}/ has no weights; download it"):
        load_source(str(name))
    (tmp_path / "away").rename(tmp_path / kind)
    with pytest.raises(InputError, match="--arch ddpm256: .*scheduler_config.json says how it was trained; leave it out"):
        load_source(str(name), "ddpm256")
    network = load_source(str(name))
    assert network.image_size == 32 and network.scale_factor == stage.config.scaling_factor
    same_output(network.model, unet, channels)
    x = randn(2, 3, 32, 32).clamp(-1, 1)
    with torch.no_grad():
        encoded = stage.encode(x)
        latents = (encoded.latents if kind == "vqvae" else encoded.latent_dist.mode()) * network.scale_factor
        torch.testing.assert_close(network.encode(x), latents, atol=1e-5, rtol=1e-4)
        decoded = stage.decode(latents / network.scale_factor).sample.clamp(-1, 1)
        torch.testing.assert_close(network.decode(latents), decoded, atol=1e-5, rtol=1e-4)


def test_a_first_stage_that_states_no_scaling_factor(tmp_path, capsys):
    test_latent_pipelines(tmp_path, "vqvae", "plain")
    file = tmp_path / "vqvae" / "config.json"
    config = json.loads(file.read_text())
    del config["scaling_factor"]
    file.write_text(json.dumps(config))
    assert load_source(str(tmp_path)).scale_factor == 1.0
    assert "states no scaling_factor; taken as 1" in capsys.readouterr().out
    file.write_text(json.dumps(dict(config, norm_type="spatial")))
    with pytest.raises(InputError, match="norm_type is 'spatial'"):
        load_source(str(tmp_path))
    file.write_text(json.dumps(dict(config, _class_name="AutoencoderTiny")))
    with pytest.raises(InputError, match="a AutoencoderTiny; only VQModel and AutoencoderKL"):
        load_source(str(tmp_path))


# ---- which files -------------------------------------------------------------------------------------------

def test_variants_parts_and_averages(tmp_path, capsys):
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "fp16", variant="fp16")
    same_output(load_source(str(tmp_path / "fp16"), "ddpm256").model, theirs)
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    assert len(list((tmp_path / "parts").glob("*-of-*.safetensors"))) > 2
    same_output(load_source(str(tmp_path / "parts"), "ddpm256").model, theirs)
    next((tmp_path / "parts").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match="parts: .* of the .* parts of the weights are there"):
        load_source(str(tmp_path / "parts"), "ddpm256")
    (tmp_path / "fp16" / "diffusion_pytorch_model.ema.safetensors").touch()
    with pytest.raises(InputError, match="several variants, diffusion_pytorch_model.ema.safetensors, diffusion_pytor"):
        load_source(str(tmp_path / "fp16"), "ddpm256")

    diffusers.DDPMScheduler(num_train_timesteps=77).save_pretrained(tmp_path / "out" / "scheduler")
    place = tmp_path / "out" / "checkpoint-500"
    diffusers_model(dropout=0.1).save_pretrained(place / "unet")
    average = diffusers_model()
    average.conv_in.weight.data += 1
    average.save_pretrained(place / "unet_ema")
    (place / "optimizer.bin").touch()
    network = load_source(str(place))
    same_output(network.model, average)
    assert network.schedule.timesteps == 77 and "averaged weights are taken, unet_ema/" in capsys.readouterr().out


def test_a_folder_of_one_file_and_of_several(tmp_path, tiny):
    (tmp_path / "one").mkdir()
    shutil.copy(tiny.source, tmp_path / "one" / "anything.safetensors")
    (tmp_path / "one" / "optimizer.pt").touch()
    assert load_source(str(tmp_path / "one")).image_size == 16
    shutil.copy(tiny.source, tmp_path / "one" / "other.safetensors")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for name in ("options.json", "weights.safetensors"):
        (tmp_path / "runs" / "a" / name).touch()
    with pytest.raises(InputError, match="runs: holds runs, a; give the folder of one"):
        load_source(str(tmp_path / "runs"))
    shutil.copy(tiny.source, tmp_path / "runs" / "model.safetensors")
    assert load_source(str(tmp_path / "runs")).image_size == 16  # a run beside it does not matter
    with pytest.raises(InputError, match="one: several files of weights, anything.safetensors, other.safetensors; give"):
        load_source(str(tmp_path / "one"))
    shutil.copy(tiny.source, tmp_path / "one" / "model.safetensors")  # of pretrain.py
    assert load_source(str(tmp_path / "one")).image_size == 16


def test_a_run_and_its_export_are_no_sources(finished, tmp_path):
    with pytest.raises(InputError, match="finished: a run of train_tan.py, which cannot be the source of another"):
        load_source(str(finished))
    call(export.main, finished, tmp_path / "export")
    with pytest.raises(InputError, match="an export of this project that carries its code, or psi alone; give the run"):
        load_source(str(tmp_path / "export"))


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
