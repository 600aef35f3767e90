"""Write an adapted model, or a source alone, as a folder that diffusers loads without this project.

  python -m checkpoints.export runs/sunglasses exported-sunglasses
  python -m checkpoints.export toyfaces exported-toyfaces

    DIR/pipeline.py              exported/pipeline.py
    DIR/unet/, DIR/scheduler/    weights and options, and one file of code each: theirs in exported/ after the modules it is built on
    DIR/vae/                     of latent models, the first stage as diffusers' own VQModel or AutoencoderKL
    DIR/README.md                model card; DIR/samples.png, the pairs of a run

Nothing here needs diffusers; whoever loads the folder does.
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import adaptor
from checkpoints import run_folder
from checkpoints.layouts import diffusers_config, diffusers_names
from checkpoints.network import Network
from checkpoints.published import BETA_SCHEDULES
from plumbing.files import write_atomic
from plumbing.options import REQUIRED, InputError, option, parse, run
from settings import METHODS

HERE = Path(__file__).parents[1]

CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusers, tan, few-shot-adaptation]
---
# {title}

{what}

{size}x{size} pixels{latent}, {parameters:.2f} M parameters{share}. Written by `export.py` of a PyTorch implementation of *Efficient Transfer Learning
in Diffusion Models via Adversarial Noise* (TAN), which is not needed to use it.
{pairs}
## Loading

```python
import torch
from diffusers import DiffusionPipeline

{load}
images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0), num_inference_steps=50).images
images = pipe(latents=torch.randn(4, {shape})).images  # from noise of your own
```

It needs PyTorch and `pip install diffusers` (tried with 0.42 and 0.30). With `generator=[torch.Generator().manual_seed(i) for i in range(4)]` each
picture has a seed of its own, and is the one that `sample.py` draws from that seed. `pipe.to("cuda", torch.float16)` works as everywhere in diffusers.
Other samplers can take the place of this one, e.g. `pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`; those that do not
limit the predicted picture can leave speckle. Classifier guidance is not part of the folder. To pass it on, copy the folder: `pipe.save_pretrained`
leaves out the code.

**Loading runs code of this folder**: `pipeline.py`, `unet/tan_unet.py` and `scheduler/tan_scheduler.py`, with all rights of your program. That is what
`trust_remote_code=True` consents to; old versions of diffusers do not even ask. Read the three files first, unless you trust who gave them to you.
The weights are safetensors, which hold numbers only.

## What to know before using it

The licence and the biases of the source model go on to what is made from it, and an adapted model can come close to its few training pictures: respect
the rights in both, and do not pass off its pictures of people as photographs. Whoever shares this folder should say here where they are from.
"""
PAIRS = """
![pairs of rows](samples.png)

*The same noise through the source model (upper row of each pair) and through this one (lower row).*
"""
LOAD = 'pipe = DiffusionPipeline.from_pretrained("{folder}", custom_pipeline="{folder}", trust_remote_code=True)'


@dataclasses.dataclass
class Options:
    model: str = option(REQUIRED, "folder of a run, built-in source, file of weights or folder of diffusers", positional=True)
    folder: str = option(REQUIRED, "folder to write; must not exist yet, or be empty", positional=True)
    arch: str | None = option(None, "network of a published file whose shapes do not show it (python -m checkpoints lists them), or a JSON file",
                              metavar="NAME")


def standalone(*files: str) -> str:
    """One text of these source files of ours, later ones using earlier ones: without the imports that name them."""
    ours = "|".join(Path(file).stem for file in files)
    texts = [re.sub(rf"^from (?:{ours}) import .*\n", "", (HERE / file).read_text(), flags=re.M) for file in files]
    return f"# Written by export.py, from {', '.join(files)}.\n\n" + "\n\n".join(texts)


def save_component(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """A model in the form of diffusers: config.json and diffusion_pytorch_model.safetensors."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    write_text(folder / "config.json", json.dumps(config, indent=1))
    write_atomic(folder / "diffusion_pytorch_model.safetensors", lambda temporary: save_file(tensors, temporary, {"format": "pt"}))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def first_stage_as_vae(network: Network, where: str) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of diffusers' VQModel or AutoencoderKL; InputError if it cannot be one."""
    try:
        config = diffusers_config(network.first_stage, network.scale_factor)
    except ValueError as error:
        raise InputError(f"{where}: this first stage cannot be exported ({error})") from None
    names = diffusers_names(network.first_stage)
    attention = re.compile(r"\.(to_[qkv]|to_out\.0)\.weight$")  # matrices there, 1x1 convolutions here
    weights = {names[key]: value.flatten(1) if attention.search(names[key]) else value for key, value in network.first_stage.state_dict().items()}
    return config, weights


def write(folder: Path, network: Network, name: str, card: str, pairs: Path) -> None:
    """Everything a consumer needs, into `folder`, which exists and is empty.

    name    of the model, for errors
    pairs   the picture that the card shows, if it exists
    """
    schedule = network.schedule.config
    index = dict(_class_name=["pipeline", "TANPipeline"], unet=["tan_unet", "TANUNet"], scheduler=["tan_scheduler", "TANScheduler"], vae=[None, None])
    write_text(folder / "pipeline.py", standalone("checkpoints/exported/pipeline.py"))
    write_text(folder / "unet" / "tan_unet.py", standalone("unet.py", "adaptor.py", "checkpoints/exported/tan_unet.py"))
    write_text(folder / "scheduler" / "tan_scheduler.py", standalone("ddpm.py", "checkpoints/exported/tan_scheduler.py"))
    first = next(iter(adaptor.blocks(network.model).values())).adaptor
    config = dict(_class_name="TANUNet", network=network.model.config, adaptor_width=first.down.out_channels if first else None)
    save_component(folder / "unet", config, {f"unet.{key}": value for key, value in network.model.state_dict().items()})
    theirs = {ours: name for name, ours in BETA_SCHEDULES.items()}
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(dict(
        _class_name="TANScheduler", num_train_timesteps=schedule["timesteps"], beta_start=schedule["beta_start"], beta_end=schedule["beta_end"],
        beta_schedule=theirs[schedule["name"]], clip_sample=network.first_stage is None), indent=1))
    if network.first_stage:
        config, weights = first_stage_as_vae(network, name)
        index["vae"] = ["diffusers", config["_class_name"]]
        save_component(folder / "vae", config, weights)
    if pairs.exists():
        shutil.copyfile(pairs, folder / "samples.png")
    write_text(folder / "README.md", card)
    write_text(folder / "model_index.json", json.dumps(index, indent=1))


def model_card(network: Network, name: str, run_options: dict | None, pairs: bool, load: str) -> str:
    """README.md for the exported folder.  run_options are None for a source alone; `load` is the line that loads the folder."""
    path = Path(run_options["source"] if run_options else name)
    source = path.parent.name if path.stem == "model" else path.stem  # pretrain.py calls its result model.safetensors; no paths of this machine
    facts = dict(title=source, what="A diffusion model, as it was before any adaptation.", size=network.image_size, latent="", share="", pairs="")
    if run_options:
        target, method = Path(run_options["target"]).name, run_options["method"]
        facts.update(title=f"{target}, from {source}", what=f"The diffusion model `{source}`, adapted to the pictures `{target}` in "
                     f"{run_options['iterations']} iterations of `train_tan.py --method {method}` ({METHODS[method]}).")
    if network.first_stage:
        facts["latent"] = f" (the diffusion runs on latents of {'x'.join(map(str, network.shape))})"
    psi = sum(tensor.numel() for tensor in adaptor.state_dict(network.model).values())
    count = sum(p.numel() for p in network.model.parameters())
    if psi:
        facts["share"] = f", of which {psi / 1e6:.2f} M are the adaptors'"
    if pairs:
        facts["pairs"] = PAIRS
    return CARD.format(**facts, parameters=count / 1e6, shape=", ".join(map(str, network.shape)), load=load)


def main() -> None:
    options, _ = parse(Options, description=__doc__)
    out, folder = Path(options.folder).resolve(), Path(options.model)
    pairs = folder / "samples.png"
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{options.folder}: is there already; choose a folder that does not exist yet")
    network, run_options = run_folder.load_model(options.model, options.arch)
    card = model_card(network, options.model, run_options, pairs.exists(), LOAD.format(folder=out.name))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{options.folder}: cannot be made ({error.strerror})") from None
    try:
        write(unfinished, network, options.model, card, pairs)
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    print(f"{options.folder}: {size:.1f} MB; with diffusers installed, and nothing of this project, it is loaded by\n\n"
          f"{LOAD.format(folder=options.folder)}\n\nwhich runs the code in the folder: whoever gets it should read that, or trust you (README.md there says so)")


if __name__ == "__main__":
    run(main)
