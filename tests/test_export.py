"""export.py: diffusers, in a process that knows nothing of this project, draws the same from the folder."""

import ast
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call
from safetensors.torch import load_file, save_file

from checkpoints import export
from checkpoints.__main__ import main as checkpoints_main
from checkpoints.load import load_source
from checkpoints.network import build, save_network
from checkpoints.run_folder import identity_of, load_run
from plumbing.options import InputError
from plumbing.pictures import to_uint8

STAGE = dict(z_channels=3, resolution=16, ch=8, ch_mult=[1, 2], num_res_blocks=1, norm_groups=4)
VQ = dict(ddconfig=dict(STAGE, double_z=False, attn_resolutions=[8]), embed_dim=3, n_embed=16)
KL = dict(ddconfig=dict(STAGE, double_z=True), embed_dim=3)
FIRST_STAGES = {"vq": dict(network="VQ", config=VQ), "kl": dict(network="KL", config=KL)}
# Those that take their code along: bottleneck adaptors, and networks that diffusers cannot express.
NAMES = "adapted", "source", "vq", "kl-adapted"
# Those that are diffusers' own.
PLAIN = "finetuned", "scale-shift", "low-rank", "plain-source", "plain-vq", "plain-kl"

# Every folder is loaded before the first is used: they share the names of their modules, and must not get in
# each other's way.
CONSUMER = """
import sys, torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
root = sys.argv[1]
def load(name):
    folder = f"{root}/{name}"
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipes, drawn = {name: load(name) for name in sys.argv[3].split()}, {}
for name, pipe in pipes.items():
    noise = torch.load(f"{root}/{name}.noise.pt")
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = dict(num_inference_steps=4, output_type="pt")
    drawn[name] = dict(noise=pipe(latents=noise, **options).images,
                       seeds=pipe(batch_size=2, generator=seeds, eta=1.0, **options).images,
                       x0=pipe(latents=noise, num_inference_steps=4, output_type="latent").images,
                       pil=[list(image.getdata()) for image in pipe(latents=noise, num_inference_steps=4).images])
    if pipe.scheduler.config.num_train_timesteps == 12:
        drawn[name]["every_step"] = pipe(latents=noise, num_inference_steps=12, output_type="pt").images
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        drawn[name]["ddim"] = pipe(latents=noise, num_inference_steps=12, output_type="pt").images
noise = torch.load(f"{root}/kl-adapted.noise.pt")
drawn["bf16"] = pipes["kl-adapted"].to(torch.bfloat16)(latents=noise, **options).images
for name in sys.argv[2].split():
    pipe, inputs = DiffusionPipeline.from_pretrained(f"{root}/{name}"), torch.load(f"{root}/{name}.inputs.pt")
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with torch.no_grad():
        drawn[name] = dict(eps=pipe.unet(*inputs).sample, kind=type(pipe).__name__, pictures=torch.tensor(pipe(
            batch_size=2, generator=seeds, num_inference_steps=12, output_type="np").images).movedim(3, 1))
drawn["by DDPM"] = len(DDPMPipeline.from_pretrained(f"{root}/plain-source")(num_inference_steps=4).images)
try:
    load("damaged")
except ValueError as error:
    drawn["damaged"] = str(error)
drawn["ours"] = sorted({"adaptor", "autoencoder", "checkpoints", "ddpm", "unet"} & set(sys.modules))
torch.save(drawn, f"{root}/drawn.pt")
"""


@pytest.fixture(scope="module")
def networks(train, finished, tmp_path_factory):
    """name -> (what export.py is given, the network it means).

    All of 16x16, some of them latent, those with a source or VQ in their name with 12 timesteps.
    """
    folder, paths = tmp_path_factory.mktemp("models"), dict(adapted=finished)
    torch.manual_seed(0)
    schedules = dict(source=dict(name="cosine", timesteps=12),
                     vq=dict(name="scaled-linear", timesteps=12, beta_start=1e-3, beta_end=0.4, prediction="v"),
                     kl=dict(name="scaled-linear", beta_start=0.0015, beta_end=0.0155))
    for name in [*schedules, *(f"plain-{kind}" for kind in schedules)]:
        kind, schedule = name.removeprefix("plain-"), schedules[name.removeprefix("plain-")]
        latent = dict(first_stage=FIRST_STAGES[kind], scale_factor=0.7) if kind != "source" else {}
        out_channels = 6 if kind == "source" else 3  # a learned variance
        shape = {} if "plain" in name or kind == "kl" else dict(channel_mult=[2, 2])  # not one of diffusers
        config = dict(TINY, image_size=8 if latent else 16, out_channels=out_channels, **shape)
        network = build(dict(network="UNet", config=config, schedule=schedule, **latent), name)
        for p in [*network.model.parameters(), *(network.first_stage.parameters() if latent else ())]:
            p.data += 0.05 * torch.randn(p.shape)
        if kind == "vq":
            network.first_stage.quantize.embedding.weight.data.normal_()  # spread: which is nearest matters
        paths[name] = folder / f"{name}.safetensors"
        save_network(paths[name], network)
    for form in ("scale-shift", "low-rank"):
        paths[form] = train(folder / form, "--method", "adaptor", "--adaptor", form, "--iterations", "4",
                            "--learning-rate", "0.01")
    paths["finetuned"] = train(folder / "finetuned", "--method", "finetune", "--iterations", "2")
    paths["kl-adapted"] = train(folder / "kl-run", "--source", paths["kl"], "--method", "adaptor",
                                "--iterations", "4", "--learning-rate", "0.01")
    return {name: (path, load_run(path)[0] if path.is_dir() else load_source(str(path)))
            for name, path in paths.items()}


@pytest.fixture(scope="module")
def exported(networks, tmp_path_factory):
    """The exported folders, and what CONSUMER drew from them."""
    root = tmp_path_factory.mktemp("exported")
    for name in NAMES + PLAIN:
        path, network = networks[name]
        call(export.main, path, root / name)
        torch.save(noise(network), root / f"{name}.noise.pt")
        torch.save((noise(network), T), root / f"{name}.inputs.pt")
    call(export.main, networks["adapted"][0], root / "damaged")
    weights = root / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["unet.middle_block.0.adaptor.up.weight"]
    save_file(tensors, weights)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", CONSUMER, root, " ".join(PLAIN), " ".join(NAMES)], check=True, cwd=root, timeout=600,
                   env=dict(env, HF_HOME=str(root / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"))
    return root, torch.load(root / "drawn.pt")


T = torch.tensor([3, 10])


def noise(network):
    return torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(1))


def as_pt(images):
    """Ours in diffusers' range."""
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_same_noise_same_picture(networks, exported, name):
    network, drawn = networks[name][1], exported[1][name]
    ours = network.sample(range(2), 4, noise=noise(network))
    assert ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 0.1
    torch.testing.assert_close(drawn["noise"], as_pt(ours), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn["seeds"], as_pt(network.sample([5, 6], 4, eta=1.0)), atol=1e-4, rtol=0)
    torch.testing.assert_close(network.decode(drawn["x0"]), ours, atol=2e-4, rtol=0)
    pixels = to_uint8(ours).flatten(1, 2)
    assert (torch.tensor(drawn["pil"]) - pixels).abs().max() <= 1  # rounding may tip a grey level


@pytest.mark.parametrize("name", ["source", "vq"])
def test_the_schedule_is_what_diffusers_makes_of_its_options(exported, name):
    """With every timestep, its own DDIM takes the same steps as ours."""
    drawn = exported[1][name]
    torch.testing.assert_close(drawn["ddim"], drawn["every_step"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_diffusers_alone_computes_the_same(networks, exported, name):
    """Without trust_remote_code, from a folder that holds no code."""
    (_, network), drawn = networks[name], exported[1][name]
    assert drawn["kind"] == ("LDMPipeline" if network.first_stage else "DDIMPipeline")
    x = noise(network)
    with torch.no_grad():
        eps = network.model(x, T)[:, :x.shape[1]]
    torch.testing.assert_close(drawn["eps"], eps, atol=1e-5, rtol=1e-5)
    card = (exported[0] / name / "README.md").read_text()
    assert "remote" not in card and (f"--method adaptor --adaptor {name}`" in card) == (name in ("scale-shift", "low-rank"))
    assert eps.std() > 0.1 and not list((exported[0] / name).rglob("*.py"))
    if network.schedule.timesteps == 12:  # every step: the same pictures as ours
        ours = as_pt(network.sample([5, 6], 12))
        assert ours.std() > 0.1 and exported[1]["by DDPM"] == 1
        torch.testing.assert_close(drawn["pictures"], ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["finetuned", "scale-shift", "low-rank", "plain-source"])
def test_what_diffusers_can_be_is_read_back(networks, exported, name):
    """A plain folder is a source like any other of diffusers."""
    network, back = networks[name][1], load_source(str(exported[0] / name))
    x = noise(network)
    with torch.no_grad():
        torch.testing.assert_close(back.model(x, T), network.model(x, T)[:, :3], atol=1e-5, rtol=1e-5)
    assert back.schedule.alpha_bar.equal(network.schedule.alpha_bar)


def test_a_latent_model_keeps_its_limit(networks, tmp_path):
    """In our own files, in a plain folder and back: `ddpm.sample` draws blots without it."""
    network = networks["plain-kl"][1]
    limited = dataclasses.replace(network, description=dict(network.description, clip=3.5))
    save_network(tmp_path / "a.safetensors", limited)
    call(export.main, tmp_path / "a.safetensors", tmp_path / "folder")
    call(checkpoints_main, tmp_path / "folder", "--convert", tmp_path / "b.safetensors")
    drawn = [load_source(str(tmp_path / name)).sample(range(2), 4) for name in ("a.safetensors", "folder", "b.safetensors")]
    assert drawn[0].allclose(drawn[1], atol=1e-4) and drawn[0].allclose(drawn[2], atol=1e-4)
    assert not drawn[0].allclose(network.sample(range(2), 4), atol=0.01)
    scheduler = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    known = scheduler.read_text()
    scheduler.write_text(json.dumps(dict(json.loads(known), clip_sample_range=1.0)))  # nobody chose it
    assert load_source(str(tmp_path / "folder")).clip is None
    scheduler.write_text(known)
    call(export.main, networks["plain-kl"][0], tmp_path / "none")
    assert load_source(str(tmp_path / "none")).clip is None and load_source(str(tmp_path / "folder")).clip == 3.5


def test_adaptors_are_in_it(networks, exported, tiny):
    for name, source in (("adapted", tiny.source), ("kl-adapted", networks["kl"][0])):
        network = load_source(str(source))
        unadapted = as_pt(network.sample(range(2), 4, noise=noise(network)))
        assert (unadapted - exported[1][name]["noise"]).abs().max() > 0.01
    for says in ("missing_keys", "middle_block.0.adaptor.up.weight"):
        assert says in exported[1]["damaged"]


def test_dtype_and_nothing_of_this_project(exported):
    drawn = exported[1]
    assert 0 < (drawn["bf16"] - drawn["kl-adapted"]["noise"]).abs().max() < 0.1
    assert drawn["ours"] == []


def test_files_and_card(exported, finished):
    root, _ = exported
    folder = root / "kl-adapted"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "model_index.json", "pipeline.py",
                     "scheduler/scheduler_config.json", "scheduler/tan_scheduler.py",
                     "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/tan_unet.py",
                     "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert json.loads((root / "vq" / "model_index.json").read_text())["vae"] == ["diffusers", "VQModel"]
    card = (folder / "README.md").read_text()
    for says in ("# targets, from kl", "--method adaptor", "Loading runs code of this folder",
                 "16x16 pixels (the diffusion runs on latents of 3x8x8)",
                 'from_pretrained("kl-adapted", custom_pipeline="kl-adapted", trust_remote_code=True)'):
        assert says in card
    assert str(finished.parent) not in card and "samples.png" not in card


def test_pictures_of_the_run_go_along(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for file in ("options.json", "weights.safetensors"):
        (run / file).write_bytes((finished / file).read_bytes())
    (run / "samples.png").write_bytes(b"picture")
    (tmp_path / "out").mkdir()  # an empty folder is no hindrance
    call(export.main, run, tmp_path / "out")
    assert (tmp_path / "out" / "samples.png").read_bytes() == b"picture"
    assert "(samples.png)" in (tmp_path / "out" / "README.md").read_text()


def test_the_code_of_a_model_is_one_file():
    """Each of our imports is gone, however it is written, and no name is defined twice."""
    for files in (("unet.py", "adaptor.py", "checkpoints/exported/tan_unet.py"),
                  ("ddpm.py", "checkpoints/exported/tan_scheduler.py")):
        body = ast.parse(export.joined(*files)).body
        modules = {statement.module.split(".")[0] for statement in body if isinstance(statement, ast.ImportFrom)}
        assert modules.isdisjoint(path.stem for path in ROOT.iterdir())
        names = [statement.name for statement in body if isinstance(statement, (ast.ClassDef, ast.FunctionDef))]
        names += [target.id for statement in body if isinstance(statement, ast.Assign)
                  for target in statement.targets if isinstance(target, ast.Name)]
        assert names and len(names) == len(set(names))


def test_bad_input(finished, tiny, tmp_path):
    out = tmp_path / "out"
    config = dict(FIRST_STAGES["kl"]["config"], ddconfig=dict(STAGE, double_z=True, ch_mult=[2, 2]))
    odd = build(dict(network="UNet", config=dict(TINY, image_size=8),
                     first_stage=dict(network="KL", config=config)), "odd")
    save_network(tmp_path / "odd.safetensors", odd)
    for model, says in (("nosuch", "nosuch: no such file or folder; built-in are toyfaces"), (tiny.targets, "targets: holds no network: no run"),
                        (tmp_path / "odd.safetensors",
                         "odd.safetensors: this first stage cannot be exported .*ch_mult")):
        with pytest.raises(InputError, match=says):
            call(export.main, model, out)
        assert [path.name for path in tmp_path.iterdir()] == ["odd.safetensors"]
    for there in (tiny.targets, tiny.source):
        with pytest.raises(InputError, match="is there already; choose a folder that does not exist yet"):
            call(export.main, finished, there)
    with pytest.raises(InputError, match="source.safetensors/out: cannot be made"):
        call(export.main, finished, tiny.source / "out")


@pytest.mark.parametrize("config", [
    dict(num_heads=2, num_head_channels=-1), dict(num_heads=4, num_head_channels=8), dict(attention_resolutions=[2, 1]), dict(attention_resolutions=[2, 8])])
def test_an_export_is_the_same_source_in_other_words(config, tmp_path):
    """So that a run may go on from it: diffusers spells heads and resolutions its own way."""
    description = dict(network="UNet", config=dict(TINY, image_size=16, **config), schedule=dict(name="cosine"))
    save_network(tmp_path / "source.safetensors", build(description, "source"))
    call(export.main, tmp_path / "source.safetensors", tmp_path / "exported")
    source, exported = (load_source(str(tmp_path / name)) for name in ("source.safetensors", "exported"))
    assert source.model.config != exported.model.config or "num_heads" not in config
    assert identity_of(source) == identity_of(exported)
