"""Write an adapted model, or a source alone, as a folder that diffusers loads without this project.

  python -m checkpoints.export runs/sunglasses exported-sunglasses
  python -m checkpoints.export toyfaces exported-toyfaces

What diffusers' own UNet2DModel can be is written as it:

    DIR/unet/, DIR/scheduler/        UNet2DModel and DDIMScheduler: weights and options
    DIR/vqvae/                       of latent models, the first stage as VQModel or AutoencoderKL

Bottleneck adaptors, and the few networks that it cannot be, take their code along:

    DIR/pipeline.py                  exported/pipeline.py
    DIR/unet/tan_unet.py             unet.py, adaptor.py and exported/tan_unet.py; beside it weights, options
    DIR/scheduler/tan_scheduler.py   ddpm.py and exported/tan_scheduler.py; beside it options
    DIR/vae/                         as vqvae/ above

    DIR/README.md, DIR/samples.png   in both: exported/card.md, and the pairs of a run

The code of a model is one file: of its folder on the Hub, diffusers fetches that file, config.json and
weights, and no other that it might import.  Nothing here needs diffusers; whoever loads the folder does.
"""

import ast
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

import adaptor
from checkpoints import run_folder
from checkpoints.diffusers_first_stage import first_stage_config, first_stage_weights
from checkpoints.diffusers_unet import schedule_config, unet_config, unet_weights
from checkpoints.load import need_diffusion_model, title_of
from checkpoints.network import Network, save_tensors
from plumbing.files import write_text
from plumbing.options import InputError, Positional, Unset, parse, run
from plumbing.picture_folder import name_of

ROOT = Path(__file__).parents[1]
PAIRS = """
![pairs of rows](samples.png)

*The same noise through the source model (upper row of each pair) and through this one (lower row).*
"""
LOAD = 'pipe = DiffusionPipeline.from_pretrained("{folder}")'
LOAD_CODE = """\
pipe = DiffusionPipeline.from_pretrained("{folder}", custom_pipeline="{folder}", trust_remote_code=True)"""


@dataclasses.dataclass
class Options:
    model: Positional[str]
    """Folder of a run, built-in source, file of weights, folder of diffusers or name on the Hugging Face
    Hub."""
    folder: Positional[str]
    """Folder to write; must not exist yet, or be empty."""
    source: Unset[str] = None
    """Where the source of the run is now, if it has moved."""
    arch: Unset[str] = None
    """Network of a published file that does not show it: see python -m checkpoints, or a JSON file."""


def joined(*files: str) -> str:
    """The text of these source files, each of which may use the ones before it: without the statements that
    import these files, `from unet import ...`."""
    modules = {Path(file).stem for file in files}
    texts = []
    for file in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        lines = text.splitlines()
        for statement in reversed(ast.parse(text).body):  # from the last, so that line numbers stay right
            if isinstance(statement, ast.ImportFrom) and statement.module in modules:
                del lines[statement.lineno - 1:statement.end_lineno]
        texts.append("\n".join(lines))
    return f"# Written by checkpoints/export.py, from {', '.join(files)}.\n\n" + "\n\n\n".join(texts) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file of JSON; its folder is made if need be."""
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(content, indent=1))


def write_model(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """A model in the form of diffusers: config.json and diffusion_pytorch_model.safetensors."""
    write_json(folder / "config.json", config)
    save_tensors(folder / "diffusion_pytorch_model.safetensors", weights, {"format": "pt"})


def why_code(network: Network) -> str | None:
    """Why diffusers' own UNet2DModel cannot be this network, in words; None: it can."""
    if adaptor.state_dict(network.model):
        return "diffusers has no adaptors of this form"
    try:
        unet_config(network.model)
    except ValueError as error:
        return str(error)
    return None


def write_unet(folder: Path, network: Network) -> None:
    """The U-Net, with its adaptors if it has any, as code of ours."""
    psi = next(iter(adaptor.blocks(network.model).values())).adaptor
    config = dict(_class_name="TANUNet", network=network.model.config,
                  adaptor_width=psi.down.out_channels if psi else None)
    write_model(folder, config, network.model.state_dict(prefix="unet."))
    write_text(folder / "tan_unet.py", joined("unet.py", "adaptor.py", "checkpoints/exported/tan_unet.py"))


def write_scheduler(folder: Path, network: Network, kind: str, **more: str) -> None:
    """The noise schedule, for schedulers of the class `kind`, with what the predicted x_0 is limited to.

    more   options of that class alone
    """
    write_json(folder / "scheduler_config.json", dict(
        schedule_config(network.schedule), _class_name=kind, clip_sample=network.clip is not None,
        clip_sample_range=network.clip or 1.0, **more))


def write_vae(folder: Path, network: Network, name: str) -> str:
    """The first stage; returns the name of its class.  InputError if diffusers has none for it."""
    try:
        config = first_stage_config(network.first_stage, network.scale_factor)
    except ValueError as error:
        raise InputError(f"{name}: this first stage cannot be exported ({error})") from None
    write_model(folder, config, first_stage_weights(network.first_stage))
    return config["_class_name"]


def write_plain(folder: Path, network: Network, name: str) -> None:
    """A pipeline of diffusers' own classes into `folder`; `name` is the model's, for errors."""
    index: dict[str, Any] = dict(_class_name="DDIMPipeline")
    if network.first_stage:
        kind = write_vae(folder / "vqvae", network, name)
        index = dict(_class_name="LDMPipeline", vqvae=["diffusers", kind])
    write_model(folder / "unet", unet_config(network.model), unet_weights(network.model))
    # From the last timestep, where x_t is noise, in steps of one length: the nearest to ddpm.Schedule.subset.
    write_scheduler(folder / "scheduler", network, "DDIMScheduler", timestep_spacing="trailing")
    write_json(folder / "model_index.json", dict(
        index, unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDIMScheduler"]))


def write_with_code(folder: Path, network: Network, name: str) -> None:
    """A pipeline of our own classes, and their code, into `folder`; `name` is the model's, for errors."""
    vae = [None, None]
    if network.first_stage:
        vae = ["diffusers", write_vae(folder / "vae", network, name)]
    write_unet(folder / "unet", network)
    write_scheduler(folder / "scheduler", network, "TANScheduler")
    code = joined("ddpm.py", "checkpoints/exported/tan_scheduler.py")
    write_text(folder / "scheduler" / "tan_scheduler.py", code)
    write_text(folder / "pipeline.py", joined("checkpoints/exported/pipeline.py"))
    write_json(folder / "model_index.json", dict(
        _class_name=["pipeline", "TANPipeline"], unet=["tan_unet", "TANUNet"],
        scheduler=["tan_scheduler", "TANScheduler"], vae=vae))


def model_card(network: Network, name: str, run_options: dict[str, Any] | None, pairs: bool, folder: str,
               code: bool) -> str:
    """README.md for the exported folder.

    run_options   those of train_tan.py; None for a source alone
    code          whether the folder has code
    """
    source = title_of(run_options["source"] if run_options else name)
    title, what = source, "A diffusion model, as it was before any adaptation."
    if run_options:
        target = name_of(run_options["target"])
        title = f"{target}, from {source}"
        form = run_options.get("adaptor", "bottleneck")
        how = f"--method {run_options['method']}" + (f" --adaptor {form}" if form != "bottleneck" else "")
        what = (f"The diffusion model `{source}`, adapted to the pictures `{target}` in "
                f"{run_options['iterations']} iterations of `train_tan.py {how}`.")
    size = f"{network.image_size}x{network.image_size} pixels"
    if network.first_stage:
        size += f" (the diffusion runs on latents of {'x'.join(map(str, network.shape))})"
    parameters = f"{sum(p.numel() for p in network.model.parameters()) / 1e6:.2f} M parameters"
    if psi := adaptor.state_dict(network.model):
        parameters += f", of which {sum(p.numel() for p in psi.values()) / 1e6:.2f} M are the adaptors'"
    card, loading = ((ROOT / "checkpoints/exported" / file).read_text(encoding="utf-8")
                     for file in ("card.md", "loading_code.md" if code else "loading.md"))
    loading = loading.format(load=(LOAD_CODE if code else LOAD).format(folder=folder),
                             shape=", ".join(map(str, network.shape)))
    return card.format(title=title, what=what, size=size, parameters=parameters, loading=loading,
                       pairs=PAIRS if pairs else "")


def main() -> None:
    options, _ = parse(Options, __doc__)
    out = Path(options.folder).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{options.folder}: is there already; choose a folder that does not exist yet")
    network, run_options = run_folder.load_model(options.model, options.arch, source=options.source)
    network = need_diffusion_model(network, options.model)
    reason, pairs = why_code(network), Path(options.model) / "samples.png"
    has_pairs = run_options is not None and pairs.exists()
    card = model_card(network, options.model, run_options, has_pairs, out.name, bool(reason))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{options.folder}: cannot be made ({error.strerror})") from None
    try:
        (write_with_code if reason else write_plain)(unfinished, network, options.model)
        if has_pairs:
            shutil.copyfile(pairs, unfinished / "samples.png")
        write_text(unfinished / "README.md", card)
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{options.folder}: {size:.1f} MB; with diffusers installed, and nothing of this project, it is "
          f"loaded by\n\n{(LOAD_CODE if reason else LOAD).format(folder=options.folder)}\n")
    if reason:
        print(f"which runs the code in the folder ({reason}): whoever gets it should read that, or trust you "
              "(README.md there says so)")


if __name__ == "__main__":
    run(main)
